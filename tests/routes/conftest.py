"""What exporters find out anew for each model, found out once."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator

import pytest

from fxqfix._torch import quiet


@pytest.fixture(scope="session", autouse=True)
def onnx_functions() -> Iterator[None]:
    """Each torch.onnx.export parses the source of a thousand functions, which takes seconds."""
    try:
        with quiet():
            found = importlib.import_module("torch.onnx._internal.exporter._registration")
        apis = found.onnxscript_apis
        listed = apis.get_torchlib_ops
    except (ImportError, AttributeError):  # no onnxscript, or another torch
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apis, "get_torchlib_ops", functools.cache(listed))
        yield

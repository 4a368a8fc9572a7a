"""The routes' tests export models by the dozen."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def exports(onnx_functions: None) -> None:
    """See there."""

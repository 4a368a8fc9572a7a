"""Ops that `emulate` refuses by name at the level of this process are skipped, by that name."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from fxqfix.errors import UnsupportedError
from tests.engines.harness import AT_THIS_LEVEL


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """A refusal that names a level is what is asked for, and is listed."""
    try:
        return (yield)
    except UnsupportedError as error:
        if not any(text in error.what for text in AT_THIS_LEVEL):
            raise
        pytest.skip(f"refused at this level: {error.what}")

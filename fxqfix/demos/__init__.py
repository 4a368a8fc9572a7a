"""Demos: each replays a user report with the models and inputs of the report itself.

A demo prints what the person saw, the table of `compare`, the cause in numbers that are read from
the report object, and the same run after the fix. A new demo is a new file and a line here.
"""

from __future__ import annotations

import importlib
from typing import Any, TextIO

from fxqfix import _torch
from fxqfix.dialects.site import closest
from fxqfix.errors import UnknownNameError
from fxqfix.report import Report

__all__ = ["names", "run"]

# Imported when they are run: digits needs an optional package, all need torch.ao.quantization.
_MODULES = {
    "000": "fxqfix.demos.report_000",
    "002": "fxqfix.demos.report_002",
    "003": "fxqfix.demos.report_003",
    "004": "fxqfix.demos.report_004",
    "digits": "fxqfix.demos.digits",
}


_SAME = {"001": "000"}  # the same person's report of the same thing, with a repository


def names() -> list[str]:
    """Names of the demos, in the order to run them; "001" is another name of "000".

    Example:
        >>> from fxqfix import demos
        >>> demos.names()
        ['000', '002', '003', '004', 'digits']
    """
    return list(_MODULES)


def run(name: str, out: TextIO) -> Report | None:
    """Run one demo: the same text every time; engine, random state and warnings are put back.

    Args:
        name: One of `names()`, or "001".
        out: Where the text goes.

    Returns:
        The report that the demo's first table shows.

    Raises:
        UnknownNameError: There is no such demo.
        MissingDependencyError: The demo needs a package, or a part of torch, that is missing.
        DeviceError: This torch has no quantized engine that the demo needs.
    """
    name = _SAME.get(name, name)
    if name not in _MODULES:
        raise UnknownNameError(
            f"no demo is named {name!r}",
            where="demos.run",
            expected=f"one of {', '.join(names())}",
            remedy=f"did you mean {closest(name, names())[0]!r}?",
        )
    _torch.quantization()  # a clear error, before a demo's own import fails
    module: Any = importlib.import_module(_MODULES[name])
    report: Report | None = module.run(out)
    return report

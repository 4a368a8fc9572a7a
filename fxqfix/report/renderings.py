"""What reports and inspections are written as: a row per suffix, in the file that renders it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from fxqfix.registry import Registry

__all__ = ["FORMATS", "Rendering"]


@dataclass(frozen=True)
class Rendering:
    """A kind of file.

    Attributes:
        suffix: Of its name: ".csv".
        report: Renders a report.
        inspection: Renders an inspection, None where nothing does.

    Example:
        >>> from fxqfix.report.renderings import FORMATS
        >>> FORMATS[".dot"].inspection is None
        True
    """

    suffix: str
    report: Callable[[Any], str]
    inspection: Callable[[Any], str] | None = None


FORMATS: Registry[str, Rendering] = Registry("rendering", key=attrgetter("suffix"))

"""What can be told of a prepared model without data; a check is a row, a file holds a few."""

from __future__ import annotations

from operator import attrgetter

from fxqfix.checks._base import SEVERITIES, Check, Finding, Subject
from fxqfix.checks._draws import drawing
from fxqfix.checks.weights import not_finite
from fxqfix.registry import Registry

__all__ = ["SEVERITIES", "Check", "Finding", "Subject", "drawing", "not_finite", "registry"]


CHECKS: Registry[str, Check] = Registry("check", key=attrgetter("code"), parts=("summary",))
CHECKS.discover(__name__, "CHECK")


def registry() -> tuple[Check, ...]:
    """All checks, in the order in which their findings are listed.

    Example:
        >>> from fxqfix.checks import registry
        >>> registry()[0].code
        'uncalibrated'
    """
    return tuple(CHECKS.values())

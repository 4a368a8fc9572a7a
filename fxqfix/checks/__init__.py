"""What can be told of a prepared model without data; a check is a row, a file holds a few."""

from __future__ import annotations

from fxqfix.checks import kernels, modes, observers, ranges, weights, writes
from fxqfix.checks._base import SEVERITIES, Check, Finding, Subject
from fxqfix.checks._draws import drawing
from fxqfix.checks.weights import not_finite

__all__ = ["SEVERITIES", "Check", "Finding", "Subject", "drawing", "not_finite", "registry"]


def registry() -> tuple[Check, ...]:
    """All checks, in the order in which their findings are listed.

    Example:
        >>> from fxqfix.checks import registry
        >>> registry()[0].code
        'uncalibrated'
    """
    files = observers, modes, writes, ranges, weights, kernels
    return tuple(check for file in files for check in file.CHECKS)

"""What can be told of a prepared model without data; a check is a row, a file holds a few."""

from __future__ import annotations

from fxqfix.checks import kernels, modes, observers, ranges, writes
from fxqfix.checks._base import SEVERITIES, Check, Finding, Subject

__all__ = ["SEVERITIES", "Check", "Finding", "Subject", "registry"]


def registry() -> tuple[Check, ...]:
    """All checks, in the order in which their findings are listed.

    Example:
        >>> from fxqfix.checks import registry
        >>> registry()[0].code
        'uncalibrated'
    """
    return (*observers.CHECKS, *modes.CHECKS, *writes.CHECKS, *ranges.CHECKS, *kernels.CHECKS)

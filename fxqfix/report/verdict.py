"""Verdicts: one rule for every result, and the causes that each kind of record allows.

A result is *not ok* where something wrong was seen; else *not judged* where something was left
out; else *ok*. Nothing looked at is something left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Literal

from fxqfix._notebook import Shown
from fxqfix.causes import NOT_ATTRIBUTED

__all__ = ["ALLOWED", "Judged", "Verdict", "disallowed", "exit_code"]

Verdict = Literal["ok", "not ok", "not judged"]

# What a healthy deployment does: each moves a code by a rounding, and no pass can repair it.
_ROUNDINGS = frozenset({"rounding", "bias-int32", "requantization"})

ALLOWED: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "Report": _ROUNDINGS | {"bn-folding", "observer-only", "upstream"},
        "Certificate": _ROUNDINGS,
        # float32 sums may be taken in any order, and an integer engine has an integer bias.
        "Judgement": frozenset({"float-order", "bias-int32"}),
    }
)
"""Kind of record -> the causes that leave it ok. All others make it not ok."""


class Judged(Shown, ABC):
    """A result that has a verdict.

    Example:
        >>> from fxqfix import Report
        >>> Report(rows=()).verdict, Report(rows=()).left_out
        ('not judged', ('no site was compared',))
    """

    @property
    @abstractmethod
    def faults(self) -> tuple[str, ...]:
        """What makes it not ok, a sentence each."""

    @property
    @abstractmethod
    def left_out(self) -> tuple[str, ...]:
        """What was not looked at and why, a sentence each."""

    @property
    def verdict(self) -> Verdict:
        """One of "ok", "not ok" (there is a fault) and "not judged" (something was left out)."""
        if self.faults:
            return "not ok"
        return "not judged" if self.left_out else "ok"

    @property
    def ok(self) -> bool:
        """Whether the verdict is "ok"."""
        return self.verdict == "ok"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the verdict is not "ok": the faults, then what was left out."""
        return (*self.faults, *self.left_out)


def disallowed(kind: str, causes: Mapping[str, int]) -> dict[str, int]:
    """Cause -> codes, of those causes that a kind of record does not allow.

    Args:
        kind: A key of `ALLOWED`.
        causes: Cause -> codes.

    Example:
        >>> disallowed("Certificate", {"rounding": 3, "range-lost": 2})
        {'range-lost': 2}
    """
    judged = ALLOWED[kind] | {NOT_ATTRIBUTED}  # left out, which is no fault
    return {name: n for name, n in causes.items() if n and name not in judged}


def exit_code(results: Iterable[Judged]) -> int:
    """Exit status of a command: 0 where all are ok, 1 where one is not ok, else 2 (not judged).

    Example:
        >>> from fxqfix import Report
        >>> exit_code([Report(rows=())])
        2
    """
    verdicts = {result.verdict for result in results}
    return 1 if "not ok" in verdicts else 2 if "not judged" in verdicts else 0

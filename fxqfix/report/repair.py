"""Repair: what was repaired in a converted model, what was not, and the comparisons that say so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fxqfix._notebook import Shown
from fxqfix.report import text
from fxqfix.report.data import Report
from fxqfix.report.verdict import Judged

__all__ = ["Mend", "Refusal", "Repair"]


@dataclass(frozen=True)
class Mend(Shown):
    """One repair that was made and kept.

    Attributes:
        step: The pass that made it.
        site: The site.
        what: What was found, and what stands there now.

    Example:
        >>> from fxqfix.report import Mend
        >>> Mend("restore-range", "conv", "held in [0,127]").site
        'conv'
    """

    step: str
    site: str
    what: str


@dataclass(frozen=True)
class Refusal(Shown):
    """One thing that differs and was left as it is.

    Attributes:
        cause: The cause, or the pass that was tried and rolled back.
        site: The site; of a cause that several sites show, the first one.
        reason: Why it was left.

    Example:
        >>> from fxqfix.report import Refusal
        >>> Refusal("bias-int32", "conv", "nothing to repair: at most 1 code").cause
        'bias-int32'
    """

    cause: str
    site: str
    reason: str


@dataclass(frozen=True)
class Repair(Judged):
    """A converted model repaired.

    Attributes:
        graph_module: The repaired model, a new GraphModule.
        applied: What was repaired.
        refused: What was not, and why.
        before: The comparison of the model as it came; None without data.
        after: The comparison of `graph_module`, on the same data; None without data.

    Example:
        >>> from fxqfix import Repair
        >>> print(Repair(None))
        fxqfix repair: nothing to repair
    """

    graph_module: Any = field(repr=False)
    applied: tuple[Mend, ...] = ()
    refused: tuple[Refusal, ...] = ()
    before: Report | None = field(default=None, repr=False)
    after: Report | None = field(default=None, repr=False)

    @property
    def exact(self) -> bool:
        """Whether the comparison afterwards is."""
        return self.after is not None and self.after.exact

    @property
    def faults(self) -> tuple[str, ...]:
        """Those of the comparison afterwards."""
        return self.after.faults if self.after is not None else ()

    @property
    def left_out(self) -> tuple[str, ...]:
        """What the comparison afterwards left out; without data there is none."""
        if self.after is None:
            return ("no data: the model that is returned was not compared",)
        return self.after.left_out

    @property
    def modified(self) -> bool:
        """Whether anything was repaired."""
        return bool(self.applied)

    def __str__(self) -> str:
        parts = [f"fxqfix repair: {self._summary()}"]
        if self.applied:
            rows = [(m.step, m.site, m.what) for m in self.applied]
            parts.append("applied:\n" + text.listing(("pass", "site", "what"), rows, "simple"))
        if self.refused:
            lines = [(r.cause, r.site or "-", r.reason) for r in self.refused]
            head = ("cause", "site", "why it stays")
            parts.append("left as it is:\n" + text.listing(head, lines, "simple"))
        return "\n\n".join(parts)

    def _summary(self) -> str:
        done = f"{len(self.applied)} repaired" if self.applied else "nothing to repair"
        left = f", {len(self.refused)} left" if self.refused else ""
        if self.before is None or self.after is None:
            return done + left
        before, after = (_local(r) for r in (self.before, self.after))
        codes = f"codes that differ on the same inputs: {before:,} -> {after:,}"
        return f"{done}{left}; {codes}; {'exact' if self.exact else self.verdict}"


def _local(report: Report) -> int:
    return sum(row.local.differing for row in report.rows if row.local is not None)

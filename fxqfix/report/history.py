"""What a monitor saw over a training run: a record per check, as text, table and plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fxqfix._extras import require
from fxqfix._notebook import Shown
from fxqfix.measure import decibels
from fxqfix.report import text
from fxqfix.report.data import Report
from fxqfix.report.headline import percent
from fxqfix.report.lint import LintReport
from fxqfix.report.palette import colours

__all__ = ["Check", "checked", "flat", "plot", "table"]

_DRAWN = 8  # sites that a plot names


@dataclass(frozen=True)
class Check(Shown):
    """One look at a model in training.

    Attributes:
        step: The training step.
        milliseconds: What the look took.
        verdict: "ok", "not ok" or "not judged", of the frozen model's conversion.
        exact: Whether every code and output bit was equal.
        causes: Cause -> codes.
        findings: What lint found in the model as it trains: code -> findings.
        local: Site -> share (0 to 1) of codes that differ given the same inputs.
        accumulated: Site -> share of codes that differ from the prepared model's own.
        output_sqnr_db: Of the worst output, dB; inf where all are equal, None without outputs.
        problem: Why the model could not be compared, "" where it was.
        stop: Why training should stop, "" where it need not.

    Example:
        >>> print(Check(100, 12.3, "ok", False, causes={"rounding": 2}))
        step 100: ok; rounding 2; 12.3 ms
    """

    step: int
    milliseconds: float
    verdict: str = "not judged"
    exact: bool = False
    causes: Mapping[str, int] = field(default_factory=dict)
    findings: Mapping[str, int] = field(default_factory=dict)
    local: Mapping[str, float] = field(default_factory=dict)
    accumulated: Mapping[str, float] = field(default_factory=dict)
    output_sqnr_db: float | None = None
    problem: str = ""
    stop: str = ""

    @property
    def worst(self) -> tuple[str, float]:
        """The site that adds most, and its share of codes; ("", 0.0) where none adds any."""
        found = max(self.local.items(), key=lambda item: item[1], default=("", 0.0))
        return found if found[1] else ("", 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `Check(**values)` is the record again."""
        return asdict(self)

    def __str__(self) -> str:
        """One line, the cost last."""
        name, share = self.worst
        sqnr = self.output_sqnr_db
        parts = [
            "exact" if self.exact else self.verdict,
            f"output SQNR {decibels(sqnr)} dB" if sqnr is not None and sqnr != math.inf else "",
            f"worst {name} {percent(share)}" if name else "",
            ", ".join(f"{cause} {count}" for cause, count in self.causes.items()),
            f"not compared: {self.problem}" if self.problem else "",
            f"stop: {self.stop}" if self.stop else "",
            f"{self.milliseconds:.1f} ms",
        ]
        return f"step {self.step}: {'; '.join(filter(None, parts))}"


def checked(
    step: int, milliseconds: float, report: Report | None, lint: LintReport | None, problem: str
) -> Check:
    """The record of one look: the numbers of a report, without the report.

    Args:
        step: The training step.
        milliseconds: What it took.
        report: None where the model could not be compared.
        lint: None where it could not be linted.
        problem: Why.
    """
    findings: dict[str, int] = {}
    for finding in lint.findings if lint is not None else ():
        findings[finding.code] = findings.get(finding.code, 0) + 1
    if report is None:
        return Check(step, milliseconds, findings=findings, problem=problem)
    sites = [row for row in report.rows if row.kind != "output"]
    outputs = [row.cumulative.sqnr_db for row in report.rows if row.kind == "output"]
    return Check(
        step=step,
        milliseconds=milliseconds,
        verdict=report.verdict,
        exact=report.exact,
        causes=report.causes,
        findings=findings,
        local={row.name: row.local_share for row in sites if row.local is not None},
        accumulated={row.name: row.cumulative_share for row in sites},
        output_sqnr_db=min(outputs) if outputs else None,
    )


def flat(check: Check, causes: Sequence[str]) -> dict[str, Any]:
    """One flat record, with a column for each of these causes.

    Example:
        >>> flat(Check(1, 2.0), ["rounding"])["cause_rounding"]
        0
    """
    name, share = check.worst
    own = {n: getattr(check, n) for n in ("step", "milliseconds", "verdict", "exact")}
    return {
        **own,
        "output_sqnr_db": check.output_sqnr_db,
        "worst_site": name,
        "worst_local_share": share,
        "findings": " ".join(check.findings),
        **{f"cause_{cause.replace('-', '_')}": check.causes.get(cause, 0) for cause in causes},
        "problem": check.problem,
        "stop": check.stop,
    }


def table(history: Sequence[Check], fmt: str = "simple") -> str:
    """The history in any tabulate format.

    Example:
        >>> print(table([Check(100, 12.3)], "github").splitlines()[-1].split()[1:5])
        ['100', '|', 'not', 'judged']
    """
    heads = ("step", "verdict", "output SQNR dB", "worst site", "added", "causes", "ms")
    lines = []
    for check in history:
        name, share = check.worst
        sqnr = check.output_sqnr_db
        causes = ", ".join(f"{cause} {count}" for cause, count in check.causes.items())
        shown = "-" if sqnr is None else decibels(sqnr)
        verdict = "exact" if check.exact else check.verdict
        said = causes or check.problem
        cells = (str(check.step), verdict, shown, name or "-", percent(share), said)
        lines.append((*cells, f"{check.milliseconds:.1f}"))
    return text.listing(heads, lines, fmt)


def plot(history: Sequence[Check], ax: Any = None) -> Any:
    """Draw how each site's discrepancy moves over training.

    Args:
        history: The checks.
        ax: Axes to draw into; None makes a figure.

    Returns:
        The axes: share of the codes that differ given the same inputs, of the worst sites, and of
        every cause the number of codes, on an axis to the right.

    Raises:
        MissingDependencyError: matplotlib is not installed.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> ax = plot([Check(1, 2.0)])
        >>> ax.get_xlabel()
        'training step'
        >>> plt.close(ax.figure)
    """
    if ax is None:
        pyplot = require("matplotlib.pyplot", "plot", "Monitor.plot")
        _, ax = pyplot.subplots(figsize=(8.0, 4.5), layout="constrained")
    steps = [check.step for check in history]
    peak: dict[str, float] = {}
    for check in history:
        for name, share in check.local.items():
            peak[name] = max(peak.get(name, 0.0), share)
    worst = sorted(peak, key=lambda name: -peak[name])[:_DRAWN]
    for name in filter(peak.__getitem__, worst):
        shares = [100.0 * check.local.get(name, math.nan) for check in history]
        ax.plot(steps, shares, marker="o", markersize=3, label=name)
    ax.set_xlabel("training step")
    ax.set_ylabel("codes that differ on the same inputs, %")
    ax.grid(alpha=0.3)
    names = dict.fromkeys(cause for check in history for cause in check.causes)
    if names:
        right, palette = ax.twinx(), colours(names)
        for cause in names:
            counts = [check.causes.get(cause, 0) for check in history]
            right.plot(steps, counts, linestyle=":", color=palette[cause], label=cause)
        right.set_ylabel("codes of each cause (dotted)")
        right.set_ylim(bottom=0)
        right.legend(loc="upper left", bbox_to_anchor=(1.08, 0.5), fontsize=8, frameon=False)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper left", bbox_to_anchor=(1.08, 1.0), fontsize=8, frameon=False)
    return ax

"""Two reports of the same sites, one beside the other: before and after a repair, two epochs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from fxqfix._notebook import Shown
from fxqfix.errors import PairingError
from fxqfix.measure import decibels
from fxqfix.report import html, text
from fxqfix.report._files import save
from fxqfix.report.data import Report
from fxqfix.report.rows import Row

__all__ = ["Diff", "diff"]


@dataclass(frozen=True)
class Diff(Shown):
    """What became of each site between two reports.

    Attributes:
        before: The first report.
        after: The second one.
        names: What the two are called.

    Example:
        >>> from fxqfix import Report
        >>> print(Report(rows=()).diff(Report(rows=())))
        before: not judged, nothing was compared
        after: not judged, nothing was compared
    """

    before: Report
    after: Report
    names: tuple[str, str] = ("before", "after")

    @property
    def pairs(self) -> tuple[tuple[Row | None, Row | None], ...]:
        """Rows of one name, in the order of the second report; None where one report has none."""
        old = {row.name: row for row in self.before.rows}
        both = [(old.pop(row.name, None), row) for row in self.after.rows]
        return (*both, *((row, None) for row in old.values()))

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the sites whose numbers or causes differ between the two."""
        return tuple(_name(a, b) for a, b in self.pairs if _numbers(a) != _numbers(b))

    def __str__(self) -> str:
        """Both verdicts, and a table of the sites that changed."""
        reports = zip(self.names, (self.before, self.after), strict=True)
        lines = [f"{name}: {text.verdict(report)}" for name, report in reports]
        cells = list(self._cells())
        if cells:
            heads = ("site", "added here", "accumulated", "SQNR dB", "causes")
            lines += ["", text.listing(heads, cells)]
        return "\n".join(lines)

    def _cells(self) -> Iterator[tuple[str, ...]]:
        for old, new in self.pairs:
            a, b = _numbers(old), _numbers(new)
            if a != b:
                yield (_name(old, new), *(_arrow(x, y) for x, y in zip(a, b, strict=True)))

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """One page with both; written to `path` where given."""
        return save(html.render(self.after, self.before, self.names), path, "Diff.to_html")


def diff(before: Report, after: object, names: tuple[str, str]) -> Diff:
    """Put two reports side by side.

    Raises:
        PairingError: The other is no report, or has no site in common.
    """
    if not isinstance(after, Report):
        raise PairingError(
            "only a report can stand beside a report",
            where="Report.diff",
            found=type(after).__name__,
            expected="what compare returned",
        )
    common = {row.name for row in before.rows} & {row.name for row in after.rows}
    if (before.rows or after.rows) and not common:
        raise PairingError(
            "the two reports have no site in common",
            where="Report.diff",
            found=f"{len(before.rows)} and {len(after.rows)} rows of other names",
            expected="reports of one model",
        )
    return Diff(before, after, names)


def _name(*rows: Row | None) -> str:
    return next(row.name for row in rows if row is not None)


def _numbers(row: Row | None) -> tuple[str, str, str, str]:
    if row is None:
        return ("-", "-", "-", "-")
    local = row.local or row.cumulative
    return (
        f"{local.differing}",
        f"{row.cumulative.differing}",
        decibels(row.cumulative.sqnr_db),
        text.cause_text(row) or "none",
    )


def _arrow(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"

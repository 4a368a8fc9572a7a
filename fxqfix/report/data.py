"""Row and Report: what a comparison found, one row per site in graph order.

Numbers only. Each rendering (text, html, csv, json, dot, plot, tensorboard) is a file of its own
beside this one; the methods here hand over to them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fxqfix.causes import NOT_ATTRIBUTED, registry
from fxqfix.dialects.site import closest
from fxqfix.errors import CheckError, DataError, UnknownNameError, counting
from fxqfix.measure.culprits import Culprit
from fxqfix.report._files import save
from fxqfix.report.exports import Exports
from fxqfix.report.rows import GRIDS, Coverage, Row, names_own_grid
from fxqfix.report.verdict import Judged, disallowed

if TYPE_CHECKING:
    import pandas

    from fxqfix.report.blame import Origin
    from fxqfix.report.diff import Diff

__all__ = ["Report"]


@dataclass(frozen=True, repr=False)
class Report(Exports, Judged):
    """The result of a comparison.

    Attributes:
        rows: One row per paired site, in graph order, then one per output of the model.
        coverage: What was compared, and what not and why.
        engine: The quantized engine that the converted model ran on.
        batches: Batches read.
        notes: What a reader has to know, e.g. that observers were held still.
        corrected: What `culprits` gives; None where no site was corrected.
        isa: The instruction set that the int8 kernels ran on (see `fxqfix.Isa`); "" where the
            converted model has none.
        threads: How many threads they ran on; 0 where it has none.
        made: Versions of fxqfix and torch, the day, and the model's class where torch kept it.
        source: What `reproduce` reads models and data from; None in a report that was read from a
            file, merged or sent from another process.

    Example:
        >>> report = Report(rows=(), engine="fbgemm", batches=1)
        >>> report.merge(report).batches
        2
        >>> Report.from_json(report.to_json()) == report
        True
    """

    rows: tuple[Row, ...]
    coverage: Coverage = field(default_factory=Coverage)
    engine: str = ""
    batches: int = 0
    notes: tuple[str, ...] = ()
    corrected: tuple[Culprit, ...] | None = None
    isa: str = ""
    threads: int = 0
    made: Mapping[str, str] = field(default_factory=dict, compare=False)
    source: Any = field(default=None, repr=False, compare=False)

    def row(self, name: str) -> Row:
        """Return the row of that site name, or of that module path where only one has it.

        Raises:
            UnknownNameError: There is no such row; the nearest names are listed.
        """
        for row in self.rows:
            if row.name == name:
                return row
        same = [r for r in self.rows if r.module == name and r.kind == "activation"]
        if len(same) == 1:
            return same[0]
        raise UnknownNameError(
            f"no row is named {name!r}",
            where="Report.row",
            remedy=f"use one of {closest(name, [r.name for r in self.rows])}",
        )

    @property
    def exact(self) -> bool:
        """True where all was looked at, and every code and every output bit is equal."""
        return all(row.exact for row in self.rows) and not self.left_out

    @property
    def faults(self) -> tuple[str, ...]:
        """Codes out of range, causes that `ALLOWED` does not list, other grids, missing outputs."""
        return self._faults(frozenset())

    def _faults(self, allow: Collection[str]) -> tuple[str, ...]:
        outside = [row for row in self.rows if _out_of_range(row)]
        shifted = [row for row in self.rows if row.shift and not names_own_grid(row)]
        off_grid = [row for row in self.rows if row.off_grid or row.rescaled]
        bad = disallowed("Report", self.causes)
        found = [f"{name}: {count} codes" for name, count in bad.items() if name not in allow]
        if outside and "range-lost" not in allow:
            found.append(f"{sum(map(_out_of_range, outside))} codes out of range{_at(outside)}")
        if off_grid and not GRIDS & set(allow):
            found.append(f"values on another grid{_at(off_grid)}")
        if shifted:
            equal = "values equal, " if not any(row.differing for row in shifted) else ""
            found.append(f"{equal}codes shifted by {shifted[0].shift}{_at(shifted)}")
        return (*found, *(f"{gone.name}: {gone.reason}" for gone in self.coverage.lacking))

    def check(self, allow: Collection[str] = (), max_local_share: float | None = None) -> None:
        """Raise unless the report is ok, as a training script or a CI job asks for it.

        Args:
            allow: Names of causes that are accepted besides those of `ALLOWED`, e.g.
                {"scale-formula"} for a model that is converted without `freeze`.
            max_local_share: Largest share (0 to 1) of codes of one site that may differ given the
                same inputs; None for any.

        Raises:
            CheckError: The report is not ok, or was not judged; the message says why.
            UnknownNameError: There is no such cause.

        Example:
            >>> from fxqfix import Report
            >>> Report(rows=()).check()
            Traceback (most recent call last):
            fxqfix.errors.CheckError: Report.check: the report is not judged. Found: no site ...
        """
        known = [cause.name for cause in registry()]
        for name in allow:
            if name not in known:
                raise UnknownNameError(
                    f"no cause is named {name!r}",
                    where="Report.check",
                    expected=", ".join(known),
                )
        found = [*self._faults(frozenset(allow)), *self.left_out]
        state = "not ok" if len(found) > len(self.left_out) else "not judged"
        limit = 1.0 if max_local_share is None else max_local_share
        over = [row for row in self.rows if row.local_share > limit]
        if over:
            found.insert(0, f"more than {limit:g} of the codes differ{_at(over)}")
            state = "not ok"
        if found:
            raise CheckError(
                f"the report is {state}",
                where="Report.check",
                found="; ".join(found[:5]) + ("; ..." if len(found) > 5 else ""),
                remedy="print(report) shows each cause with its evidence, fxqfix.repair repairs "
                "what it can; allow= takes causes that you accept",
            )

    @property
    def left_out(self) -> tuple[str, ...]:
        """Sites without a row, outputs that were not compared, causes that were not asked for."""
        gone = (*self.coverage.unpaired, *self.coverage.unsupported)
        found = [f"{site.name} ({site.side}): {site.reason}" for site in gone]
        sites = [row for row in self.rows if row.kind != "output"]
        if not any(row.cumulative.elements for row in sites):
            found.append("no site was compared")
        elif not any(row.kind == "output" for row in self.rows):
            found.append("no output of the model was compared")
        else:
            empty = [row for row in self.rows if not row.cumulative.elements]
            found += [f"{row.name}: the batches held no value of it" for row in empty]
        unasked = sum(map(_without_cause, self.rows))
        if unasked:
            found.append(
                f"{unasked} codes differ without a cause: not asked for, or not known here"
            )
        if later := self.causes.get(NOT_ATTRIBUTED, 0):
            found.append(f"{later} codes of later batches differ, whose causes were not asked for")
        found += [f"{row.name}: {problem}" for row in self.rows for problem in row.problems]
        return tuple(found)

    @property
    def causes(self) -> dict[str, int]:
        """Codes per cause, summed over all rows, most first."""
        total: Counter[str] = Counter()
        for row in self.rows:
            total.update(row.causes)
        return dict(total.most_common())

    @property
    def unexplained(self) -> int:
        """Codes that no cause explains, summed over all rows."""
        return self.causes.get("unexplained", 0)

    def worst(self, n: int = 5) -> tuple[Row, ...]:
        """The n sites with the largest share of locally differing codes (then cumulative).

        Raises:
            OptionError: n is negative, or no whole number.
        """
        counting(n, "Report.worst", "n counts rows")

        def badness(row: Row) -> tuple[float, float]:
            return row.local_share, row.cumulative_share

        sites = (row for row in self.rows if row.kind != "output")
        return tuple(sorted(sites, key=badness, reverse=True)[:n])

    def merge(self, other: Report) -> Report:
        """Add up with the report of other data on the same pair of models.

        Raises:
            PairingError: The reports are of different models, or the other is none.
        """
        from fxqfix.report import merging

        return merging.merged(self, other)

    def diff(self, after: Report, names: tuple[str, str] = ("before", "after")) -> Diff:
        """This report beside a later one of the same sites: `str` and `to_html` show both.

        Args:
            after: Of the repaired model, of a later epoch.
            names: What to call the two.

        Raises:
            PairingError: The other is no report, or has no site in common.
        """
        from fxqfix.report import diff

        return diff.diff(self, after, names)

    def summary(self) -> str:
        """The verdict, its reasons, the outputs, the causes and the worst sites, in a few lines."""
        from fxqfix.report import text

        return text.summary(self)

    def __repr__(self) -> str:
        """One short line: what a notebook shows of a report in a list."""
        rows = f"{len(self.rows)} rows" if len(self.rows) != 1 else "1 row"
        state = "exact" if self.exact else self.verdict
        return f"<Report: {self.engine or 'unknown engine'}, {rows}, {state}>"

    def __str__(self) -> str:
        """Render the table, the causes and the coverage as text."""
        from fxqfix.report import text

        return text.render(self)

    def table(self, fmt: str = "simple", sort: str | None = None, limit: int | None = None) -> str:
        """Render the rows in any tabulate format; see `fxqfix.report.text.table`."""
        from fxqfix.report import text

        return text.table(self, fmt=fmt, sort=sort, limit=limit)

    def to_pandas(self) -> pandas.DataFrame:
        """One data frame row per site; see `fxqfix.report.frame.to_pandas`."""
        from fxqfix.report import frame

        return frame.to_pandas(self)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Comma-separated values; written to `path` where given."""
        from fxqfix.report import frame

        return save(frame.to_csv(self), path, "Report.to_csv")

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """JSON that `from_json` reads back without loss; written to `path` where given."""
        from fxqfix.report import json_

        return save(json_.to_json(self), path, "Report.to_json")

    @classmethod
    def from_json(cls, text_or_path: str | os.PathLike[str]) -> Report:
        """Read what `to_json` wrote: the text itself, or the path of a file."""
        from fxqfix.report import json_

        return json_.from_json(text_or_path)

    def to_html(self, path: str | os.PathLike[str] | None = None, *, title: str = "") -> str:
        """One HTML page on its own; written to `path` where given, called `title` where given."""
        from fxqfix.report import html

        return save(html.render(self, title=title), path, "Report.to_html")

    def to_dot(self, path: str | os.PathLike[str] | None = None) -> str:
        """The site graph in Graphviz' dot language, coloured by discrepancy."""
        from fxqfix.report import dot

        return save(dot.render(self), path, "Report.to_dot")

    def plot(self, ax: Any = None, *, kind: str = "sites", site: str | None = None) -> Any:
        """Draw with matplotlib, and return the axes; see `fxqfix.report.plot.plot`.

        Args:
            ax: Axes to draw into; None makes a figure.
            kind: "sites": SQNR and causes per site, two axes (with `ax` the SQNR alone); "depth",
                "local", "causes", "sqnr", or "codes" of one `site`.
            site: The row whose codes are drawn.
        """
        from fxqfix.report import plot

        return plot.draw(self, kind, site, ax)

    def reproduce(self, name: str, path: str | os.PathLike[str], **given: Any) -> str:
        """Write a script that shows the discrepancy of one site with torch alone.

        It holds inputs, weights and the op, and prints the codes that differ: what goes into a bug
        report. Models and data are those of the comparison, as long as you keep them; else, and in
        a report that was read from a file, give them.

        Args:
            name: A site of an int8 model.
            path: Where to write the script.
            given: `prepared`, `converted`, `data` in place of those of the comparison.

        Returns:
            The script.

        Raises:
            UnknownNameError: There is no such site.
            DataError: A model or the data is gone, or no code differs there on the same inputs.
            UnsupportedError: The op has no such script.
            WriteError: The path can't be written.
        """
        self.row(name)
        if self.source is None:
            raise DataError(
                "this report does not know its models",
                where="Report.reproduce",
                found="a report from a file, a merge or another process",
                remedy="compare again, and keep the models and the data",
            )
        written: str = self.source.reproduce(self, name, path, **given)
        return written

    def log(
        self, summary_writer: Any, step: int, *, prefix: str = "fxqfix", sites: bool = True
    ) -> None:
        """Write the report's sums, and the scalars of every row, to a TensorBoard SummaryWriter.

        A cause that is gone is written as 0, an SQNR that is infinite as 200 dB; see
        `fxqfix.report.tensorboard.log`.
        """
        from fxqfix.report import tensorboard

        tensorboard.log(self, summary_writer, step, prefix=prefix, sites=sites)

    def origin(self, name: str) -> Origin:
        """The path from where the error of this row was born down to this row.

        A tuple of rows, empty where the row is exact; `str` shows what each step added. See
        `fxqfix.report.blame.origin`.

        Raises:
            UnknownNameError: There is no such row.
        """
        from fxqfix.report import blame

        return blame.origin(self, name)

    def culprits(self, n: int | None = None) -> tuple[Culprit, ...]:
        """The sites whose correction, each alone, takes most noise from the end of the model.

        Args:
            n: How many; None for all that were corrected.

        Raises:
            DataError: The comparison did not correct any.
            OptionError: n is negative, or no whole number.
        """
        if self.corrected is None:
            raise DataError(
                "this report holds no culprits: they take a forward each",
                where="Report.culprits",
                remedy="compare(prepared, converted, data, culprits=5)",
            )
        if n is not None:
            counting(n, "Report.culprits", "n counts sites")
        return self.corrected[:n]


def _out_of_range(row: Row) -> int:
    return max(row.cumulative.out_of_range, row.local.out_of_range if row.local else 0)


def _without_cause(row: Row) -> int:
    local = row.local.differing if row.local else 0
    differing = max(row.differing, local, row.cumulative.differing)
    return max(differing - sum(row.causes.values()), 0)


def _at(rows: Sequence[Row]) -> str:
    """Where, for a sentence."""
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    return f" at {', '.join(row.name for row in rows[:3])}{more}"

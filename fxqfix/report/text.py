"""Text: the table of a report in every tabulate format, and the whole report for people.

The cells are made here once; the HTML page shows the same ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate, tabulate_formats

from fxqfix.dialects.site import Inspection, closest, digits_apart, grid_text
from fxqfix.errors import UnknownNameError, counting
from fxqfix.measure import decibels
from fxqfix.report.data import Report
from fxqfix.report.findings import counted, culprits, kernels, problems
from fxqfix.report.rows import Coverage, Row, Uncovered

__all__ = [
    "COLUMNS",
    "LEGEND",
    "Column",
    "causes",
    "check",
    "evidence",
    "how_paired",
    "inspection_table",
    "listing",
    "notes",
    "reasons",
    "render",
    "render_inspection",
    "summary",
    "table",
    "title",
    "verdict",
]

LEGEND = (
    "a -> b: prepared -> converted, one value where equal",
    'kernel "=": the standard kernel, quantized.OP; quantize_per_tensor for an input',
    "local, LSB: codes that differ given the same inputs, and by how much at most",
    "cumul., SQNR, out: against the prepared model's own values; out: codes outside its range",
    "floor: SQNR of the prepared model against itself, with all values multiplied by 1.000001",
)


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        key: What `sort=` takes.
        header: What stands above it.
        cell: Text of a row's cell.
        rank: Sort key of a row, smallest first: text from A to Z, figures from the worst.
        right: Whether cells are aligned to the right.

    Example:
        >>> [column.key for column in COLUMNS][:3]
        ['name', 'op', 'kernel']
    """

    key: str
    header: str
    cell: Callable[[Row], str]
    rank: Callable[[Row], Any]
    right: bool = False


def _text(key: str, header: str, cell: Callable[[Row], str]) -> Column:
    return Column(key, header, cell, cell)


def _count(key: str, header: str, count: Callable[[Row], int | None]) -> Column:
    def cell(row: Row) -> str:
        return "-" if (found := count(row)) is None else str(found)

    def rank(row: Row) -> float:
        return math.inf if (found := count(row)) is None else -found

    return Column(key, header, cell, rank, right=True)


def _sqnr(row: Row) -> str:
    floor = "" if row.noise_floor is None else f" (floor {decibels(row.noise_floor_db)})"
    return decibels(row.cumulative.sqnr_db) + floor


def _sqnr_rank(row: Row) -> float:
    # nan is worst; as a sort key of its own it would leave the rows in no order at all.
    value = row.cumulative.sqnr_db
    return -math.inf if math.isnan(value) else value


def _kernel(row: Row) -> str:
    usual = "quantize_per_tensor" if row.op == "input" else f"quantized.{row.op}"
    return "=" if row.kernel == usual else row.kernel or "-"


def _range(row: Row) -> str:
    if row.prepared is None or row.converted is None:
        return "float"
    grids = row.prepared, row.converted
    pair = [q.range_text for q in grids]
    if row.prepared.storage != row.converted.storage:
        kinds = (str(q.dtype).removeprefix("torch.") for q in grids)
        pair = [f"{text} {kind}" for text, kind in zip(pair, kinds, strict=True)]
    return " -> ".join(dict.fromkeys(pair))


def _grid(row: Row) -> str:
    if row.prepared is None or row.converted is None:
        return "-"
    if row.prepared.same_grid(row.converted):
        return grid_text(row.prepared)
    digits = digits_apart(row.prepared, row.converted)
    pair = grid_text(row.prepared, digits), grid_text(row.converted, digits)
    if pair[0] != pair[1]:
        return " -> ".join(pair)
    return f"{grid_text(row.prepared)} -> other channels"


def _causes(row: Row) -> str:
    return ", ".join(f"{name} {count}" for name, count in Counter(row.causes).most_common())


COLUMNS = (
    _text("name", "site", lambda row: row.name),
    _text("op", "op", lambda row: row.op),
    _text("kernel", "kernel", _kernel),
    _text("range", "range", _range),
    _text("qparams", "scale/zp", _grid),
    _count("elements", "elements", lambda row: row.cumulative.elements),
    _count("local", "local", lambda row: row.local.differing if row.local else None),
    _count("max_lsb", "LSB", lambda row: row.local.max_lsb if row.local else None),
    _count("cumulative", "cumul.", lambda row: row.cumulative.differing),
    Column("sqnr", "SQNR dB", _sqnr, _sqnr_rank),
    _count("out_of_range", "out", lambda row: row.cumulative.out_of_range),
    Column("causes", "causes", _causes, lambda row: -row.differing),
)


def check(fmt: str = "simple", sort: str | None = None) -> None:
    """Refuse a table format or a sort key that does not exist.

    Args:
        fmt: A format of tabulate.
        sort: Key of a column, or None.

    Raises:
        UnknownNameError: There is none of that name; the message lists those that exist.

    Example:
        >>> check("github", sort="local")
    """
    _one_of("table format", fmt, list(tabulate_formats))
    if sort is not None:
        _one_of("sort key", sort, [column.key for column in COLUMNS])


def _one_of(what: str, name: str, valid: list[str]) -> None:
    if name in valid:
        return
    nearest = closest(name, valid, count=1)[0]
    raise UnknownNameError(
        f"no {what} is named {name!r}",
        where="table",
        expected=f"one of {', '.join(valid)}",
        remedy=f"use {nearest!r} or another of these",
    )


def listing(headers: Sequence[str], lines: Iterable[Sequence[str]], fmt: str = "simple") -> str:
    """Render lines of text in a tabulate format, every cell as it is.

    Example:
        >>> print(listing(("name", "zp"), [("conv", "007")], "github"))
        | name   | zp   |
        |--------|------|
        | conv   | 007  |
    """
    check(fmt)
    return tabulate(list(lines), headers=list(headers), tablefmt=fmt, disable_numparse=True)


def table(
    report: Report, fmt: str = "simple", sort: str | None = None, limit: int | None = None
) -> str:
    """Render the rows of a report.

    Args:
        report: What to render.
        fmt: Any format of tabulate.
        sort: Key of a column: text sorts from A to Z, figures from the worst; None keeps the
            order of the graph, as do rows that are equal.
        limit: Rows to show, after sorting; None shows all.

    Returns:
        The table.

    Raises:
        UnknownNameError: There is no such format or key; the message lists those that exist.
        OptionError: The limit is negative, or no whole number.

    Example:
        >>> print(table(Report(rows=()), fmt="tsv").split()[:3])
        ['site', 'op', 'kernel']
    """
    check(fmt, sort)
    if limit is not None:
        counting(limit, "Report.table", "limit counts rows")
    rows = list(report.rows)
    if sort is not None:
        rows.sort(key=next(column.rank for column in COLUMNS if column.key == sort))
    return tabulate(
        [[column.cell(row) for column in COLUMNS] for row in rows[:limit]],
        headers=[column.header for column in COLUMNS],
        tablefmt=fmt,
        disable_numparse=True,
        colalign=["right" if column.right else "left" for column in COLUMNS],
    )


def verdict(report: Report) -> str:
    """The outcome in a few words.

    Example:
        >>> verdict(Report(rows=()))
        'not judged, nothing was compared'
    """
    wrong = sum(not row.exact for row in report.rows)
    if not report.rows:
        return "not judged, nothing was compared"
    if report.exact:
        return "exact"
    gone = len(report.coverage.unpaired) + len(report.coverage.unsupported)
    said = f"differs in {wrong} of {counted(len(report.rows), 'row')}"
    found = [report.verdict, said if wrong else "exact where compared"]
    return ", ".join([*found, f"{counted(gone, 'site')} left out"] if gone else found)


def reasons(report: Report) -> list[str]:
    """Why a report is not ok: its faults, or what it could not look at; coverage lists sites.

    Example:
        >>> reasons(Report(rows=()))
        ['no site was compared']
    """
    gone = len(report.coverage.unpaired) + len(report.coverage.unsupported)
    sites = [f"{counted(gone, 'site')} left out, see coverage"] if gone else []
    return [*report.faults, *sites, *report.left_out[gone:]]


def summary(report: Report, most: int = 5) -> str:
    """A report in a few lines: verdict, reasons, outputs, causes, and the sites that add most.

    Args:
        report: What to render.
        most: Lines of each kind.

    Example:
        >>> print(summary(Report(rows=(), engine="fbgemm")))
        fxqfix report: engine fbgemm, 0 batches, 0 rows: not judged, nothing was compared
        - no site was compared
    """
    outputs = [row for row in report.rows if row.kind == "output"]
    worst = [row for row in report.worst(most) if row.local_share]
    lines = [
        *(f"- {reason}" for reason in reasons(report)[:most]),
        *(f"{row.name}: {_apart(row)}" for row in outputs[:most]),
        *causes(report)[:most],
        *(f"worst: {row.name} ({row.op}): {_apart(row)}; {_causes(row)}" for row in worst),
    ]
    return "\n".join([title(report), *lines])


def title(report: Report) -> str:
    """The first line of a report.

    Example:
        >>> title(Report(rows=(), engine="x86", batches=2))
        'fxqfix report: engine x86, 2 batches, 0 rows: not judged, nothing was compared'
    """
    rows = counted(len(report.rows), "row")
    size = f"{counted(report.batches, 'batch', 'es')}, {rows}"
    return f"fxqfix report: engine {report.engine or 'unknown'}, {size}: {verdict(report)}"


def _apart(row: Row) -> str:
    found = row.cumulative
    values = "values" if row.kind == "output" else "codes"
    local = "" if row.local is None else f", {row.local.differing} on the same inputs"
    return (
        f"{found.differing} of {found.elements} {values} differ{local}, SQNR "
        f"{decibels(found.sqnr_db)}"
    )


def evidence(report: Report) -> Iterator[tuple[str, int, int, str]]:
    """Yield the causes, most codes first, each with the evidence of its worst row.

    Yields:
        (cause, codes, rows, "site: evidence" of the row with most codes of that cause).

    Example:
        >>> list(evidence(Report(rows=())))
        []
    """
    for cause, codes in report.causes.items():
        rows = [row for row in report.rows if row.causes.get(cause)]
        if not rows:
            continue
        # A row that has a sentence says more than a slightly worse one without.
        worst = max(rows, key=lambda row: (bool(row.evidence.get(cause)), row.causes[cause]))
        said = worst.evidence.get(cause)
        yield cause, codes, len(rows), f"{worst.name}: {said}" if said else f"most in {worst.name}"


def causes(report: Report) -> list[str]:
    """A line per cause: its codes, and the evidence of its worst row.

    Example:
        >>> causes(Report(rows=()))
        []
    """
    return [
        f"- {cause}: {counted(codes, 'code')} in {counted(count, 'row')}; {why}"
        for cause, codes, count, why in evidence(report)
    ]


def how_paired(coverage: Coverage) -> str:
    """How many sites were paired, in which way.

    Example:
        >>> how_paired(Coverage((("conv", "conv_0", "dataflow"), ("x", "x", "name"))))
        '2 sites paired: by dataflow 1, by name 1'
    """
    ways = Counter(way for _, _, way in coverage.paired)
    by = ", ".join(f"by {way} {count}" for way, count in sorted(ways.items()))
    return f"{counted(len(coverage.paired), 'site')} paired" + (f": {by}" if by else "")


def notes(report: Report) -> list[str]:
    """What a reader has to know: of the report, of single rows, and what no code shows.

    Values on another grid differ where no code does, and codes behind them with them.

    Example:
        >>> notes(Report(rows=(), notes=("observers were held still",)))
        ['observers were held still']
    """
    found = [*report.notes, *(f"{row.name}: {row.note}" for row in report.rows if row.note)]
    rows = [row for row in report.rows if row.off_grid]
    if rows:
        named = ", ".join(f"{row.name} ({_grid(row)})" for row in rows[:3])
        more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
        found.append(f"on another grid, where no code differs but values do: {named}{more}")
    shifted = [row for row in report.rows if row.shift and not row.differing]
    if shifted:
        named = ", ".join(f"{row.name} (by {row.shift})" for row in shifted[:3])
        more = f" and {len(shifted) - 3} more" if len(shifted) > 3 else ""
        found.append(f"another zero point, so that equal values have other codes: {named}{more}")
    return found


def _left_out(what: str, sites: Iterable[Uncovered]) -> list[str]:
    return [f"- {what}: {site.name} ({site.side}): {site.reason}" for site in sites]


def render(
    report: Report, fmt: str = "simple", sort: str | None = None, limit: int | None = None
) -> str:
    """Render a whole report: verdict, table, causes, coverage and notes.

    Args:
        report: What to render.
        fmt: Format of the table, see `table`.
        sort: Order of the table, see `table`.
        limit: Rows of the table, see `table`.

    Returns:
        Text of several lines; with fmt="github" it reads as Markdown too.

    Example:
        >>> print(render(Report(rows=(), engine="fbgemm", batches=1)).splitlines()[0])
        fxqfix report: engine fbgemm, 1 batch, 0 rows: not judged, nothing was compared
    """
    rows = counted(len(report.rows), "row")
    parts = [title(report), table(report, fmt, sort, limit)]
    if limit is not None and limit < len(report.rows):
        parts.append(f"{limit} of {rows} shown")
    if report.rows:
        parts.append("\n".join(LEGEND))
    coverage = [
        f"- {how_paired(report.coverage)}",
        *_left_out("unpaired", report.coverage.unpaired),
        *_left_out("unsupported", report.coverage.unsupported),
    ]
    sections = {
        "verdict": [f"- {reason}" for reason in reasons(report)],
        "causes": causes(report),
        "culprits": [f"- {line}" for line in culprits(report)],
        "problems": [f"- {line}" for line in problems(report)],
        "kernels": [f"- {line}" for line in kernels(report)],
    }
    said = [f"- {note}" for note in notes(report)]
    for head, lines in {**sections, "coverage": coverage, "notes": said}.items():
        if lines:
            parts.append("\n".join([f"{head}:", *lines]))
    return "\n\n".join(parts)


def inspection_table(inspection: Inspection, fmt: str = "simple") -> str:
    """Render the sites of an inspection in any tabulate format.

    Example:
        >>> print(inspection_table(Inspection("fx-prepared", ()), "tsv").split()[:2])
        ['site', 'kind']
    """
    return listing(Inspection.HEADERS, (site.cells for site in inspection), fmt)


def render_inspection(inspection: Inspection, fmt: str = "simple") -> str:
    """Render a whole inspection: the sites, the total, and what could not be read.

    Example:
        >>> print(render_inspection(Inspection("fx-prepared", ())).splitlines()[-1])
        fx-prepared: 0 sites
    """
    unread = [f"- not read: {name}: {reason}" for name, reason in inspection.unsupported]
    parts = [inspection_table(inspection, fmt), inspection.total]
    return "\n\n".join([*parts, "\n".join(unread)] if unread else parts)

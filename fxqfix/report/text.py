"""Text: the whole report for people, and its parts in sentences; the HTML page says the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from fxqfix.dialects.site import Inspection
from fxqfix.measure import decibels
from fxqfix.report.data import Report
from fxqfix.report.findings import counted, culprits, kernels, problems
from fxqfix.report.renderings import Rendering
from fxqfix.report.rows import Coverage, Row, Uncovered
from fxqfix.report.table import (
    COLUMNS,
    LEGEND,
    Column,
    cause_text,
    check,
    grid_cell,
    legend,
    listing,
    table,
)

__all__ = [
    "COLUMNS",
    "LEGEND",
    "Column",
    "cause_text",
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
        *(f"worst: {row.name} ({row.op}): {_apart(row)}; {cause_text(row)}" for row in worst),
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
        named = ", ".join(f"{row.name} ({grid_cell(row)})" for row in rows[:3])
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
        parts.append("\n".join(legend(report)))
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


RENDERING = Rendering(
    ".md",
    lambda report: report.to_markdown(),
    lambda inspection: render_inspection(inspection, "github") + "\n",
)

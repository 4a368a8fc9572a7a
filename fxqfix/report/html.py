"""One HTML page on its own: no script, no font and no style from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape

from fxqfix.dialects.site import Inspection
from fxqfix.report import text
from fxqfix.report.data import Report
from fxqfix.report.findings import culprits, kernels, problems
from fxqfix.report.rows import Row

__all__ = ["page", "render", "render_inspection"]

STYLE = """
:root { color-scheme: light dark; --line: #8884; --bad: #d33; --good: #2a8f4e; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 110rem;
  padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.bad { color: var(--bad); }
.good { color: var(--good); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: left;
  vertical-align: top; white-space: nowrap; }
th { font-weight: 600; }
td.right, th.right { text-align: right; font-variant-numeric: tabular-nums; }
td.text { white-space: normal; }
tr.differs td:first-child { border-left: 3px solid var(--bad); }
tr.inherits td:first-child { border-left: 3px solid #e6a23c; }
tr.equal td:first-child { border-left: 3px solid var(--good); }
.small { font-size: .85rem; opacity: .75; }
""".strip()

TITLE = "fxqfix report"


def page(title: str, body: Iterable[str]) -> str:
    """Wrap finished HTML into a page.

    Args:
        title: Plain text; it is escaped here.
        body: Lines of HTML, escaped already.

    Returns:
        The page.

    Example:
        >>> "<title>1 &lt; 2</title>" in page("1 < 2", [])
        True
    """
    head = (
        f'<meta charset="utf-8">\n<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style>\n'
        '<meta name="viewport" content="width=device-width">'
    )
    lines = "\n".join(body)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n'
        f"<body>\n{lines}\n</body>\n</html>\n"
    )


def render(report: Report) -> str:
    """Render a whole report as a page.

    Args:
        report: What to render.

    Returns:
        HTML text.

    Example:
        >>> render(Report(rows=())).count("nothing was compared")
        1
    """
    return page(TITLE, _body(report))


def render_inspection(inspection: Inspection) -> str:
    """Render an inspection as a page.

    Args:
        inspection: What to render.

    Returns:
        HTML text.

    Example:
        >>> render_inspection(Inspection("fx-prepared", ())).count("fx-prepared: 0 sites")
        1
    """
    body = [
        f"<h1>{escape(inspection.total)}</h1>",
        *_table(Inspection.HEADERS, (site.cells for site in inspection)),
    ]
    if inspection.unsupported:
        body += ["<h2>Not read</h2>", *_table(("name", "reason"), inspection.unsupported)]
    return page("fxqfix inspection", body)


def _body(report: Report) -> Iterator[str]:
    colour = "good" if report.ok or report.exact else "bad"
    yield f"<h1>{TITLE}</h1>"
    yield f'<p><strong class="{colour}">{escape(text.verdict(report))}</strong><br>'
    yield f"engine {escape(report.engine or 'unknown')}, batches read: {report.batches}</p>"
    if reasons := text.reasons(report):
        yield f"<ul>{''.join(f'<li>{escape(reason)}</li>' for reason in reasons)}</ul>"
    if report.rows:
        yield "<h2>Sites</h2>"
        yield from _sites(report)
        yield f'<p class="small">{"<br>".join(map(escape, text.LEGEND))}</p>'
    if report.causes:
        yield "<h2>Causes</h2>"
        found = [
            (cause, str(codes), str(rows), worst)
            for cause, codes, rows, worst in text.evidence(report)
        ]
        yield from _table(("cause", "codes", "rows", "worst row and its evidence"), found)
    yield from _evidence(report.rows)
    lists = {"Culprits": culprits, "Problems": problems, "Kernels": kernels}
    for head, listed in lists.items():
        lines = listed(report)
        if lines:
            yield f"<h2>{head}</h2>"
            yield f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
    yield "<h2>Coverage</h2>"
    yield f"<p>{escape(text.how_paired(report.coverage))}</p>"
    left_out = [
        (state, site.name, site.side, site.reason)
        for state in ("unpaired", "unsupported")
        for site in getattr(report.coverage, state)
    ]
    if left_out:
        yield from _table(("left out", "site", "model", "reason"), left_out)
    notes = text.notes(report)
    if notes:
        yield "<h2>Notes</h2>"
        yield f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>"


def _sites(report: Report) -> Iterator[str]:
    sides = [' class="right"' if column.right else "" for column in text.COLUMNS]
    heads = (
        f"<th{side}>{escape(column.header)}</th>"
        for column, side in zip(text.COLUMNS, sides, strict=True)
    )
    yield f'<div class="wide"><table>\n<thead><tr>{"".join(heads)}</tr></thead>\n<tbody>'
    for row in report.rows:
        cells = (
            f"<td{side}>{escape(column.cell(row))}</td>"
            for column, side in zip(text.COLUMNS, sides, strict=True)
        )
        yield f'<tr class="{_state(row)}">{"".join(cells)}</tr>'
    yield "</tbody></table></div>"


def _state(row: Row) -> str:
    if row.exact:
        return "equal"
    return "differs" if row.local_share else "inherits"


def _evidence(rows: Iterable[Row]) -> Iterator[str]:
    found = [
        (row.name, cause, str(row.causes.get(cause, 0)), said)
        for row in rows
        for cause, said in row.evidence.items()
    ]
    if found:
        yield f"<details><summary>Evidence of every row ({len(found)})</summary>"
        yield from _table(("site", "cause", "codes", "evidence"), found)
        yield "</details>"


def _table(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> Iterator[str]:
    yield f'<div class="wide"><table>\n<thead><tr>{_cells("th", heads)}</tr></thead>\n<tbody>'
    for line in lines:
        yield f"<tr>{_cells('td', line)}</tr>"
    yield "</tbody></table></div>"


def _cells(tag: str, texts: Iterable[str]) -> str:
    *short, last = texts
    cells = [f"<{tag}>{escape(cell)}</{tag}>" for cell in short]
    return "".join([*cells, f'<{tag} class="text">{escape(last)}</{tag}>'])

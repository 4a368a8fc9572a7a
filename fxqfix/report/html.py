"""One HTML page on its own: no font, no style and no script from elsewhere.

The table stands in the page as it is, so that it reads without a script too. The script of the page
(assets/report.js) sorts and filters it, draws the model and opens the details of a row.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cache
from html import escape
from importlib import resources

from fxqfix.dialects.site import Inspection
from fxqfix.measure import decibels
from fxqfix.report import text
from fxqfix.report.data import Report
from fxqfix.report.findings import counted, culprits, kernels, problems
from fxqfix.report.headline import headline, percent
from fxqfix.report.palette import colours
from fxqfix.report.remedies import advice
from fxqfix.report.renderings import Rendering
from fxqfix.report.rows import Row
from fxqfix.report.table import range_cell
from fxqfix.report.view import state, view

__all__ = ["page", "render", "render_inspection"]

TITLE = "fxqfix report"

_HEADS = (
    ("name", "site", ""),
    ("local", "added here", "right"),
    ("lsb", "LSB", "right"),
    ("cumulative", "accumulated", "right"),
    ("sqnr", "SQNR dB", "right"),
    ("out", "out", "right"),
    ("causes", "causes", ""),
)
_LEGEND = (
    "added here: codes that differ given the same inputs; LSB: by how much at most",
    "accumulated, SQNR, out: against the prepared model's own values; out: codes outside its range",
    text.LEGEND[-1],
)


@cache
def _asset(name: str) -> str:
    return (
        resources.files(__package__).joinpath("assets").joinpath(name).read_text(encoding="utf-8")
    )


def page(title: str, body: Iterable[str], data: object = None) -> str:
    """Wrap finished HTML into a page.

    Args:
        title: Plain text; it is escaped here.
        body: Lines of HTML, escaped already.
        data: Plain values for the page's script; None for a page without one.

    Returns:
        The page.

    Example:
        >>> "<title>1 &lt; 2</title>" in page("1 < 2", [])
        True
    """
    script = _asset("report.js") if data is not None else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # No other script runs, whatever a name holds, and nothing is fetched.
    rule = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = (
        f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{rule}">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_asset('report.css')}</style>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
    )
    lines = "\n".join(body)
    if data is not None:
        lines += f'\n<script type="application/json" id="data">{_in_script(data)}</script>'
        lines += f"\n<script>{script}</script>"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n'
        f"<body>\n{lines}\n</body>\n</html>\n"
    )


def _in_script(data: object) -> str:
    """JSON in which nothing can end the script element."""
    plain = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def render(
    report: Report,
    before: Report | None = None,
    names: tuple[str, str] = ("before", "after"),
    title: str = "",
) -> str:
    """Render a whole report as a page.

    Args:
        report: What to render.
        before: An earlier report of the same sites to show beside it.
        names: What to call the two.
        title: What to call the page; else it is called after the model, where that is known.

    Returns:
        HTML text.

    Example:
        >>> render(Report(rows=())).count("Nothing was compared")
        1
    """
    earlier = {} if before is None else {row.name: row for row in before.rows}
    shown = view(report, earlier)
    palette = colours((*report.causes, *(before.causes if before is not None else ())))
    about = f"{names[0]} and {names[1]}" if before is not None else report.made.get("model")
    title = title or (f"{TITLE}: {about}" if about else TITLE)
    data = {**shown, "colours": palette, "names": list(names)}
    return page(title, _body(report, before, names, (title, palette)), data)


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
        f"<main><h1>{escape(inspection.total)}</h1>",
        *_table(Inspection.HEADERS, (site.cells for site in inspection)),
    ]
    if inspection.unsupported:
        body += ["<h2>Not read</h2>", *_table(("name", "reason"), inspection.unsupported)]
    return page("fxqfix inspection", [*body, "</main>"])


def _body(
    report: Report,
    before: Report | None,
    names: tuple[str, str],
    look: tuple[str, dict[str, str]],
) -> Iterator[str]:
    title, palette = look
    yield '<a class="skip" href="#sites">to the table</a>'
    yield from _header(report, title, palette)
    yield "<main>"
    if before is not None:
        yield f"<h2>{escape(names[0])} → {escape(names[1])}</h2><ul>"
        yield f"<li>{escape(names[0])}: {escape(headline(before))}</li>"
        yield f"<li>{escape(names[1])}: {escape(headline(report))}</li></ul>"
    yield '<div class="both">'
    yield from _drawing()
    yield '<section aria-label="sites">'
    if report.rows:
        earlier = {} if before is None else {row.name: row for row in before.rows}
        yield from _tools(report)
        yield from _sites(report, earlier, palette)
        yield f'<p class="small">{"<br>".join(map(escape, _LEGEND))}</p>'
    yield "</section></div>"
    yield from _sections(report)
    yield "</main>"


def _header(report: Report, title: str, palette: dict[str, str]) -> Iterator[str]:
    colour = {"ok": "good", "not ok": "bad", "not judged": "warn"}[report.verdict]
    said = "exact" if report.exact else report.verdict
    about = [f"engine {report.engine or 'unknown'}", counted(report.batches, "batch", "es")]
    about += [f"instruction set {report.isa}"] if report.isa else []
    about += [counted(report.threads, "thread")] if report.threads else []
    known = [(tool, report.made[tool]) for tool in ("fxqfix", "torch") if tool in report.made]
    about += [f"{tool} {version.partition(',')[0]}" for tool, version in known]
    about += [report.made["date"]] if "date" in report.made else []
    yield f'<header><div class="top"><h1>{escape(title)}</h1>'
    yield f'<strong class="verdict {"good" if report.exact else colour}">{said}</strong>'
    yield f'<span class="small">{escape(", ".join(about))}</span>'
    yield '<div class="push tools" hidden><button type="button" id="theme">light / dark</button>'
    yield "</div></div>"
    yield f'<p class="headline">{escape(headline(report))}</p>'
    yield f'<p class="small">{escape(text.verdict(report))}</p>'
    total = sum(report.causes.values())
    if total:
        parts = "".join(
            f'<span style="flex: {count} 0 0; background: {palette[cause]}"></span>'
            for cause, count in report.causes.items()
        )
        yield f'<div class="bar" aria-hidden="true">{parts}</div><ul class="legend">'
        for cause, count in report.causes.items():
            yield (
                f'<li><button type="button" class="chip" aria-pressed="false" '
                f'data-cause="{escape(cause)}"><i style="background: {palette[cause]}"></i>'
                f"{escape(cause)} {count:,} ({percent(count / total)})</button></li>"
            )
        yield "</ul>"
    if reasons := text.reasons(report):
        listed = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
        yield f"<details><summary>Why {escape(report.verdict)}</summary><ul>{listed}</ul></details>"
    yield "</header>"


def _drawing() -> Iterator[str]:
    yield '<section class="drawing" aria-label="drawing"><div class="tools" hidden>'
    yield '<label>colour <select id="colour"><option value="local">added here</option>'
    yield '<option value="cumulative">accumulated</option><option value="cause">cause</option>'
    yield "</select></label>"
    for name, said in (
        ("fold", "fold"), ("unfold", "unfold"), ("out", "-"), ("in", "+"), ("fit", "fit"),
    ):  # fmt: skip
        label = {"out": "smaller", "in": "larger", "fold": "fold all", "unfold": "unfold all"}
        spoken = label.get(name, "fit into the window")
        yield f'<button type="button" id="{name}" aria-label="{spoken}">{said}</button>'
    yield '</div><div class="canvas" id="canvas" tabindex="-1"><svg></svg></div>'
    yield '<p class="small">thick edges: the way of the error to the output; a click on a node '
    yield "opens its row, on a module folds it</p></section>"


def _tools(report: Report) -> Iterator[str]:
    equal = sum(state(row) == "equal" for row in report.rows)
    yield '<div class="tools" hidden><label>find <input type="search" id="search"></label>'
    yield '<label>cause <select id="which"><option value="">any</option>'
    yield from (f"<option>{escape(cause)}</option>" for cause in report.causes)
    yield '</select></label><label>order <select id="by"><option value="order">graph</option>'
    yield from (f'<option value="{key}">{head}</option>' for key, head, _ in _HEADS)
    yield f'</select></label><label><input type="checkbox" id="equal"> equal rows ({equal})</label>'
    yield '<span class="small" id="count" role="status"></span></div>'


def _sites(report: Report, before: dict[str, Row], palette: dict[str, str]) -> Iterator[str]:
    heads = "".join(
        f'<th scope="col" data-sort="{key}" class="{side}" aria-sort="none">'
        f'<button type="button" class="{side}">{head}</button></th>'
        for key, head, side in _HEADS
    )
    yield f'<table id="sites"><thead><tr>{heads}</tr></thead>\n<tbody>'
    for index, row in enumerate(report.rows):
        cells = _cells_of(row, before.get(row.name), palette)
        own = f'<tr id="row-{index}" data-row="{index}" class="{state(row)} {row.kind}">'
        yield f"{own}{''.join(cells)}</tr>"
    yield "</tbody></table>"


def _cells_of(row: Row, was: Row | None, palette: dict[str, str]) -> Iterator[str]:
    range_ = range_cell(row)
    about = f"{row.op} · {range_}" if "->" in range_ else row.op
    yield (
        '<td class="name"><button type="button" aria-expanded="false">'
        f'{escape(row.name)}</button><br><span class="small">{escape(about)}</span></td>'
    )
    bar = f'<span class="share">{_filled(row.local_share)}</span>'
    parts = (percent(row.local_share), "", percent(row.cumulative_share), "", "")
    now = _figures(row)
    earlier = now if was is None else _figures(was)
    for (_, head, _), old, new, part in zip(_HEADS[1:6], earlier, now, parts, strict=True):
        shown = new if old == new else f"{old} → {new}"
        share = f'<span class="part">{part}</span>' if part not in ("", "0%") else ""
        yield f'<td class="right" data-head="{head}">{bar}{shown}{share}</td>'
        bar = ""
    causes = "".join(
        f'<span class="cause"><i style="background: {palette[cause]}"></i>'
        f"{escape(cause)} {count:,}</span> "
        for cause, count in sorted(row.causes.items(), key=lambda item: -item[1])
        if count
    )
    yield f'<td class="causes">{causes}</td>'


def _filled(share: float) -> str:
    return f'<b style="width: {100 * share:.4g}%"></b>' if share else ""


def _figures(row: Row) -> tuple[str, ...]:
    found, total = row.local or row.cumulative, row.cumulative
    return (
        f"{found.differing:,}",
        str(found.max_lsb),
        f"{total.differing:,}",
        decibels(total.sqnr_db),
        f"{total.out_of_range:,}",
    )


def _sections(report: Report) -> Iterator[str]:
    """What is said of the report as a whole."""
    if report.causes:
        yield "<h2>Causes</h2>"
        found = [
            (cause, str(codes), str(rows), worst, advice(cause))
            for cause, codes, rows, worst in text.evidence(report)
        ]
        heads = ("cause", "codes", "rows", "worst row and its evidence", "what to do")
        yield from _table(heads, found)
    lists = {"Culprits": culprits, "Problems": problems, "Kernels": kernels}
    for head, listed in lists.items():
        if lines := listed(report):
            yield f"<h2>{head}</h2>"
            yield f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
    yield "<h2>Coverage</h2>"
    yield f"<p>{escape(text.how_paired(report.coverage))}</p>"
    left_out = [
        (kind, site.name, site.side, site.reason)
        for kind in ("unpaired", "unsupported")
        for site in getattr(report.coverage, kind)
    ]
    if left_out:
        yield from _table(("left out", "site", "model", "reason"), left_out)
    if said := text.notes(report):
        yield "<h2>Notes</h2>"
        yield f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in said)}</ul>"


def _table(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> Iterator[str]:
    yield f'<div class="wide"><table>\n<thead><tr>{_cells("th", heads)}</tr></thead>\n<tbody>'
    for line in lines:
        yield f"<tr>{_cells('td', line)}</tr>"
    yield "</tbody></table></div>"


def _cells(tag: str, texts: Iterable[str]) -> str:
    *short, last = texts
    cells = [f"<{tag}>{escape(cell)}</{tag}>" for cell in short]
    return "".join([*cells, f'<{tag} class="text">{escape(last)}</{tag}>'])


RENDERING = Rendering(".html", render, render_inspection)

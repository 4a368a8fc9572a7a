"""What other programs show of a report: Model Explorer, graph editors, pull requests, notebooks."""

from __future__ import annotations

import os
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any, cast

from fxqfix._extras import require
from fxqfix.report._files import save

if TYPE_CHECKING:
    from fxqfix.report.data import Report
    from fxqfix.report.rows import Row

__all__ = ["Exports"]

_HEADS = ("site", "op", "added here", "LSB", "accumulated", "SQNR dB", "causes")
_WORST = 5


class Exports:
    """Renderings for other programs, by which `Report` is extended."""

    __slots__ = ()

    @property
    def _report(self) -> Report:
        return cast("Report", self)

    def to_graphml(self, path: str | os.PathLike[str] | None = None) -> str:
        """The site graph as GraphML, for graph editors; written to `path` where given."""
        import networkx as nx

        from fxqfix.report import dot

        plain = nx.DiGraph(dot.graph(self._report).edges)
        for row in self._report.rows:
            found = row.local or row.cumulative
            plain.add_node(
                row.name,
                **{name: _printable(getattr(row, name)) for name in ("kind", "module", "op")},
                local_share=row.local_share,
                cumulative_share=row.cumulative_share,
                max_lsb=found.max_lsb,
                causes=_printable(", ".join(f"{n} {c}" for n, c in row.causes.items())),
            )
        names = {name: _printable(name) for name in plain}
        lines = nx.generate_graphml(nx.relabel_nodes(plain, names))
        return save("\n".join([*lines, ""]), path, "Report.to_graphml")

    def to_model_explorer(self, path: str | os.PathLike[str] | None = None) -> str:
        """Node data for Google's Model Explorer: per node the share of codes that differ.

        Keys are the names of the prepared graph's nodes; load it beside that graph. Written to
        `path` where given.
        """
        from fxqfix.report import json_

        rows = [row for row in self._report.rows if row.kind == "activation"]
        data = {
            "name": "fxqfix: % of codes that differ on the same inputs",
            "results": {row.name: {"value": 100.0 * row.local_share} for row in rows},
            "gradient": [{"stop": 0, "bgColor": "#ffffff"}, {"stop": 1, "bgColor": "#d62728"}],
        }
        return save(json_.dumps(data), path, "Report.to_model_explorer")

    def to_markdown(self, path: str | os.PathLike[str] | None = None) -> str:
        """Markdown for a pull request: the headline and the worst rows, the rest folded.

        Written to `path` where given.
        """
        from fxqfix.report import text
        from fxqfix.report.headline import headline

        report = self._report
        worst = [row for row in report.worst(_WORST) if not row.exact]
        ends = [row for row in report.rows if row.kind == "output" and not row.exact]
        lines = [f"### fxqfix: {_state(report)}", "", _cell(headline(report)), ""]
        if worst or ends:
            lines += [*_table([*ends[:_WORST], *worst]), ""]
        lines += _folded("Causes", [f"- {_cell(line[2:])}" for line in text.causes(report)])
        reasons = [f"- {_cell(reason)}" for reason in text.reasons(report)]
        lines += _folded(f"Why {report.verdict}", reasons)
        lines += _folded(f"All {len(report.rows)} rows", list(_table(report.rows)))
        return save("\n".join(lines), path, "Report.to_markdown")

    def _repr_html_(self) -> str:
        """HTML for a notebook: the headline, the worst rows and their causes."""
        from fxqfix.report.headline import headline
        from fxqfix.report.palette import colours

        report = self._report
        palette = colours(report.causes)
        sites = [row for row in report.worst(2 * _WORST) if not row.exact]
        rows = [*(r for r in report.rows if r.kind == "output"), *sites]
        heads = "".join(f'<th style="text-align: left">{head}</th>' for head in _HEADS)
        body = ""
        for row in rows:
            *plain, _ = _cells(row)
            cells = "".join(f"<td>{escape(cell)}</td>" for cell in plain)
            causes = " ".join(
                f'<span style="border-left: .6em solid {palette[cause]}; padding-left: .3em; '
                f'margin-right: .6em">{escape(cause)} {count:,}</span>'
                for cause, count in row.causes.items()
            )
            body += f'<tr>{cells}<td style="text-align: left">{causes}</td></tr>'
        more = len(report.rows) - len(rows)
        note = f"{more} more rows; " if more else ""
        return (
            f"<div><p><strong>fxqfix: {_state(report)}</strong> {escape(headline(report))}</p>"
            f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
            f"<p>{note}<code>report.to_html(path)</code> writes the page with all of it.</p></div>"
        )

    def __rich__(self) -> Any:
        """What `rich.print` shows: the headline, and a table of the rows that are not exact."""
        from fxqfix.report.headline import headline

        report = self._report
        made = require("rich.table", "rich", "rich.print(report)").Table
        escaped = require("rich.markup", "rich", "rich.print(report)").escape
        colour = {"ok": "green", "not ok": "red", "not judged": "yellow"}[report.verdict]
        state = f"[bold {colour}]{_state(report)}[/]"
        said = escaped(headline(report))
        table = made(title=f"fxqfix: {state} {said}", title_justify="left")
        for head in _HEADS:
            table.add_column(head, overflow="fold", justify="left" if head in _TEXT else "right")
        for row in report.rows:
            if not row.exact:
                table.add_row(*map(escaped, _cells(row)), style="red" if row.local_share else "")
        return table


_TEXT = ("site", "op", "causes")


def _state(report: Report) -> str:
    return "exact" if report.exact else report.verdict


def _cells(row: Row) -> tuple[str, ...]:
    from fxqfix.measure import decibels

    found, total = row.local or row.cumulative, row.cumulative
    return (
        row.name,
        row.op,
        f"{found.differing:,} of {found.elements:,}",
        str(found.max_lsb),
        f"{total.differing:,}",
        decibels(total.sqnr_db),
        ", ".join(f"{cause} {count:,}" for cause, count in row.causes.items()),
    )


def _table(rows: Iterable[Row]) -> Iterable[str]:
    yield f"| {' | '.join(_HEADS)} |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | --- |"
    for row in rows:
        yield f"| {' | '.join(map(_cell, _cells(row)))} |"


def _folded(head: str, lines: list[str]) -> list[str]:
    if not lines:
        return []
    return [f"<details><summary>{escape(head)}</summary>", "", *lines, "", "</details>", ""]


def _cell(text: str) -> str:
    """Text that Markdown takes as it is, in one line."""
    flat = escape(" ".join(text.split()), quote=False)
    for mark in "\\|*_`[]":
        flat = flat.replace(mark, f"\\{mark}")
    return flat


def _printable(text: str) -> str:
    """Text without what XML can't hold."""
    return "".join(c if c.isprintable() or c in "\t\n" else "\ufffd" for c in text)

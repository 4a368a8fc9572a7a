"""The graph of the sites, for networkx and in Graphviz' dot language."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import networkx as nx

from fxqfix.measure import decibels
from fxqfix.report.data import Report
from fxqfix.report.owners import owner
from fxqfix.report.renderings import Rendering
from fxqfix.report.rows import Row

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["graph", "render"]


def graph(report: Report) -> nx.DiGraph:
    """Build the graph of the sites: an edge from each input to what is computed from it.

    Args:
        report: Where the rows and their inputs stand.

    Returns:
        A graph whose nodes are site names with Graphviz attributes, and with the `row` itself
        where the site was compared.

    Example:
        >>> len(graph(Report(rows=())))
        0
    """
    found = nx.DiGraph()
    for row in report.rows:
        found.add_node(row.name, row=row, **_attributes(row))
    for row in report.rows:
        for name in row.inputs:
            if name not in found:
                found.add_node(name, label=f"{name}\nnot compared", style="dashed", shape="box")
            found.add_edge(name, row.name)
    return found


def _attributes(row: Row) -> dict[str, str]:
    local = row.local or row.cumulative
    lines = [
        row.name,
        f"{row.op}: {local.differing} of {local.elements} codes",
        f"SQNR {decibels(row.cumulative.sqnr_db)}",
        *(f"{cause} {count}" for cause, count in row.causes.items()),
    ]
    return {
        "label": "\n".join(lines),
        "shape": "ellipse" if row.kind == "weight" else "box",
        "style": "filled",
        "fillcolor": _colour(row.local_share),
    }


def _colour(share: float) -> str:
    """White where nothing differs, then from pale to full red (hue, saturation, value)."""
    if not share:
        return "#ffffff"
    # Logarithmic, from one code in 100000 up: on a linear scale a single code would stay white.
    saturation = 0.15 + 0.75 * max(0.0, 1.0 + math.log10(share) / 5.0)
    return f"0.02 {saturation:.3f} 1.0"


def render(report: Report) -> str:
    """Write the graph in the dot language, coloured by the share of locally differing codes.

    Args:
        report: What to draw.

    Returns:
        The text for `dot -Tsvg`.

    Example:
        >>> print(render(Report(rows=())))
        digraph fxqfix {
          node [fontname="sans-serif"];
        }
    """
    drawn = graph(report)
    for row in report.rows:
        own = owner(row, report) if row.kind == "weight" else ""
        if own and own != row.name:
            drawn.add_edge(row.name, own)
    lines = ["digraph fxqfix {", '  node [fontname="sans-serif"];']
    for name, attributes in drawn.nodes(data=True):
        lines.append(f"  {_quoted(name)} [{_listed(attributes)}];")
    lines += [f"  {_quoted(source)} -> {_quoted(target)};" for source, target in drawn.edges]
    return "\n".join([*lines, "}", ""])


def _listed(attributes: Mapping[str, object]) -> str:
    pairs = ((key, value) for key, value in attributes.items() if isinstance(value, str))
    return ", ".join(f"{key}={_quoted(value)}" for key, value in pairs)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


RENDERINGS = (
    Rendering(".dot", render),
    Rendering(".graphml", lambda report: report.to_graphml()),
)

"""Where each node of a drawing stands: by graphviz's dot where it is there, else by networkx."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

__all__ = ["Layout", "layout"]

HEIGHT = 44.0
_CHARACTER = 7.2  # of the page's font, at the size of a node's name
_GAP = 26.0
_POINTS = 72.0  # per inch, in which dot counts
_SECONDS = 30
# Above it, dot's search for few crossings takes seconds; networkx takes none.
_MOST = 1500


@dataclass(frozen=True)
class Layout:
    """Boxes and curves, in CSS pixels; the origin is at the top left.

    Attributes:
        by: What laid it out: "dot" or "networkx".
        boxes: Node -> (x and y of its middle, width, height).
        curves: Edge -> control points of a chain of cubic Bezier curves; empty where the layout
            gives none.
    """

    by: str
    boxes: Mapping[str, tuple[float, float, float, float]]
    curves: Mapping[tuple[str, str], Sequence[tuple[float, float]]]


def layout(graph: nx.DiGraph, groups: Mapping[str, Sequence[str]]) -> Layout:
    """Place the nodes of a graph in layers, inputs at the top.

    Args:
        graph: Nodes with a `label`, whose longest line sets the width.
        groups: Node -> the modules that hold it, the outermost first; dot keeps each together.

    Returns:
        Where everything stands.

    Example:
        >>> drawn = nx.DiGraph([("x", "conv")])
        >>> found = layout(drawn, {})
        >>> found.boxes["x"][1] < found.boxes["conv"][1]
        True
    """
    widths = {node: _width(str(data.get("label", node))) for node, data in graph.nodes(data=True)}
    program = shutil.which("dot") if 0 < len(graph) <= _MOST else None
    if program is not None:
        try:
            return _by_dot(program, graph, groups, widths)
        except (OSError, ValueError, subprocess.SubprocessError):
            pass  # a broken installation of dot: the other layout needs none
    return _by_networkx(graph, widths)


def _width(label: str) -> float:
    return 24.0 + _CHARACTER * max(map(len, label.split("\n")))


def _by_dot(
    program: str,
    graph: nx.DiGraph,
    groups: Mapping[str, Sequence[str]],
    widths: Mapping[str, float],
) -> Layout:
    ids = {node: f"n{i}" for i, node in enumerate(graph)}  # names never reach dot
    lines = ["digraph {", "nodesep=0.25; ranksep=0.35; node [shape=box, fixedsize=true];"]
    for node, name in ids.items():
        size = f"width={widths[node] / _POINTS:.3f}, height={HEIGHT / _POINTS:.3f}"
        lines.append(f"{name} [{size}];")
    lines += _clusters(graph, groups, ids)
    lines += [f"{ids[a]} -> {ids[b]};" for a, b in graph.edges]
    text = "\n".join([*lines, "}"])
    done = subprocess.run(
        [program, "-Tplain"], input=text, capture_output=True, text=True, timeout=_SECONDS,
        check=True,
    )  # fmt: skip
    return _read_plain(done.stdout, {name: node for node, name in ids.items()})


def _clusters(
    graph: nx.DiGraph, groups: Mapping[str, Sequence[str]], ids: Mapping[str, str]
) -> list[str]:
    """A cluster per module, inside of that of the module that holds it."""
    inside: dict[str, list[str]] = {}
    holder: dict[str, str] = {}
    for node in graph:
        path = groups.get(node, ())
        for outer, inner in zip(("", *path), path, strict=False):
            holder.setdefault(inner, outer)
        inside.setdefault(path[-1] if path else "", []).append(ids[node])
    count = iter(range(len(holder) + 1))

    def block(module: str) -> str:
        kids = "".join(block(inner) for inner, outer in holder.items() if outer == module)
        own = " ".join(f"{name};" for name in inside.get(module, ()))
        return f'subgraph cluster_{next(count)} {{ label=" "; fontsize=8; {own} {kids} }}'

    return [block(module) for module, outer in holder.items() if not outer]


def _read_plain(text: str, nodes: Mapping[str, str]) -> Layout:
    """Dot's plain format: inches, the origin at the bottom left."""
    boxes: dict[str, tuple[float, float, float, float]] = {}
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    top = 0.0
    for line in text.splitlines():
        kind, *words = shlex.split(line) or [""]
        if kind == "graph":
            top = float(words[2])
        elif kind == "node":
            x, y, width, height = (_POINTS * float(word) for word in words[1:5])
            boxes[nodes[words[0]]] = x, _POINTS * top - y, width, height
        elif kind == "edge":
            numbers = [_POINTS * float(word) for word in words[3 : 3 + 2 * int(words[2])]]
            pairs = zip(numbers[::2], numbers[1::2], strict=True)
            points = [(x, _POINTS * top - y) for x, y in pairs]
            curves[nodes[words[0]], nodes[words[1]]] = points
    return Layout("dot", boxes, curves)


def _by_networkx(graph: nx.DiGraph, widths: Mapping[str, float]) -> Layout:
    layered = nx.DiGraph(graph.edges)
    layered.add_nodes_from(graph)
    for layer, nodes in enumerate(nx.topological_generations(layered)):
        for node in nodes:
            layered.nodes[node]["layer"] = layer
    places = nx.multipartite_layout(layered, subset_key="layer", align="horizontal", scale=1)
    rows: dict[int, list[str]] = {}
    for node, data in layered.nodes(data=True):
        rows.setdefault(data["layer"], []).append(node)
    boxes = {}
    widest = max((sum(widths[n] + _GAP for n in row) for row in rows.values()), default=0.0)
    for layer, row in rows.items():
        ordered = sorted(row, key=lambda node: float(places[node][0]))
        x = (widest - sum(widths[n] + _GAP for n in ordered)) / 2
        for node in ordered:
            middle = x + (widths[node] + _GAP) / 2
            boxes[node] = middle, (layer + 0.5) * 1.6 * HEIGHT, widths[node], HEIGHT
            x += widths[node] + _GAP
    return Layout("networkx", boxes, {})

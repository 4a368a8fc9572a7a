"""What the page of a report draws: plain values, one record per row, made for JSON.

The page's script puts every text into the document as text, never as markup.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import networkx as nx

from fxqfix.dialects.site import qparams_text
from fxqfix.measure import decibels
from fxqfix.measure.discrepancy import Discrepancy
from fxqfix.qparams import QParams
from fxqfix.report import blame, table
from fxqfix.report.data import Report
from fxqfix.report.layout import layout
from fxqfix.report.owners import owner
from fxqfix.report.remedies import advice, code
from fxqfix.report.rows import Row

__all__ = ["state", "view"]

_LABEL = 24  # characters of a node's name


def view(report: Report, before: Mapping[str, Row] | None = None) -> dict[str, Any]:
    """The rows, the drawing and the causes of a report.

    Args:
        report: What to show.
        before: Rows of an earlier report, by name, to show beside it.

    Returns:
        Dicts, lists, numbers and texts.

    Example:
        >>> view(Report(rows=()))["rows"]
        []
    """
    index = {row.name: i for i, row in enumerate(report.rows)}
    owners = {row.name: owner(row, report) for row in report.rows if row.kind == "weight"}
    came_from = blame.steps(report)
    earlier = before or {}
    return {
        "rows": [
            {
                **_row(row, report),
                "owner": index.get(owners.get(row.name, "")),
                "from": index.get(came_from.get(row.name, "")),
                "was": _was(earlier.get(row.name)),
            }
            for row in report.rows
        ],
        "causes": list(report.causes.items()),
        "advice": {cause: advice(cause) for cause in report.causes},
        "graph": _graph(report, index, {n for n, own in owners.items() if own}),
    }


def _row(row: Row, report: Report) -> dict[str, Any]:
    own = [name for name, count in Counter(row.causes).most_common() if count]
    return {
        **{n: getattr(row, n) for n in ("name", "kind", "module", "op", "kernel", "source")},
        **{n: getattr(row, n) for n in ("engine", "accumulator", "saturation", "note")},
        "state": state(row),
        "local": _numbers(row.local),
        "cumulative": _numbers(row.cumulative),
        "floor": None if row.noise_floor is None else decibels(row.noise_floor_db),
        "quantization": row.quantization and decibels(row.quantization.sqnr_db),
        "causes": [[name, row.causes[name]] for name in own],
        "evidence": dict(row.evidence),
        "problems": list(row.problems),
        "qparams": {"prepared": _grid(row.prepared), "converted": _grid(row.converted)},
        "range": table.range_cell(row),
        "grid": table.grid_cell(row),
        "codes": _codes(row),
        "remedy": code(own, report.engine),
    }


def state(row: Row) -> str:
    """Whether an error is born in a row ("differs"), comes from before it ("inherits"), or "equal".

    Example:
        >>> same = Discrepancy(elements=1)
        >>> state(Row("x", "activation", "", "input", "", None, None, same, same))
        'equal'
    """
    if row.exact:
        return "equal"
    return "differs" if row.local_share or row.off_grid or row.shift else "inherits"


def _was(row: Row | None) -> dict[str, Any] | None:
    if row is None:
        return None
    sums = {"local": _numbers(row.local), "cumulative": _numbers(row.cumulative)}
    return {**sums, "causes": [list(item) for item in Counter(row.causes).most_common()]}


def _numbers(found: Discrepancy | None) -> dict[str, Any] | None:
    if found is None:
        return None
    names = ("elements", "differing", "max_lsb", "out_of_range", "saturated_low", "saturated_high")
    sqnr = found.sqnr_db
    return {
        **{name: getattr(found, name) for name in names},
        "mean_lsb": round(found.mean_lsb, 4),
        "max_abs": float(f"{found.max_abs:.4g}") if math.isfinite(found.max_abs) else None,
        "sqnr": decibels(sqnr),
        "rank": sqnr if math.isfinite(sqnr) else (1e9 if sqnr > 0 else -1e9),
    }


def _grid(grid: QParams | None) -> dict[str, Any] | None:
    if grid is None:
        return None
    return {
        "text": qparams_text(grid),
        "min": grid.quant_min,
        "max": grid.quant_max,
        "axis": grid.axis,
        "dtype": str(grid.dtype).removeprefix("torch."),
    }


def _codes(row: Row) -> dict[str, Any] | None:
    """The histogram without the empty bins at both ends."""
    counts = row.histogram
    if counts is None or not sum(counts.prepared):
        return None
    used = [i for i, n in enumerate(zip(counts.prepared, counts.converted, strict=True)) if any(n)]
    low, high = used[0], used[-1] + 1
    sides = {side: list(getattr(counts, side)[low:high]) for side in ("prepared", "converted")}
    return {"first": counts.first + low, **sides}


def _graph(report: Report, index: dict[str, int], hidden: set[str]) -> dict[str, Any]:
    """Sites and outputs; a weight is a mark on its op. Names that have no row are left out."""
    drawn = nx.DiGraph()
    for row in report.rows:
        if row.name not in hidden:
            # The second line is the op and a share, as the page writes them.
            drawn.add_node(row.name, label=f"{_label(row.name)}\n{row.op} · 99.9%")
    # A row stands behind its inputs; a name that is its own input comes from a broken file.
    for row in report.rows:
        known = (name for name in row.inputs if name in drawn and row.name in drawn)
        drawn.add_edges_from((name, row.name) for name in known if index[name] < index[row.name])
    groups = {row.name: _holders(row) for row in report.rows if row.name in drawn}
    placed = layout(drawn, groups)
    return {
        "by": placed.by,
        "nodes": [
            {
                "row": index[name],
                "label": _label(name),
                "box": [round(number, 1) for number in placed.boxes[name]],
                "groups": groups[name],
            }
            for name in drawn
        ],
        "edges": [
            [index[a], index[b], [round(c, 1) for p in placed.curves.get((a, b), ()) for c in p]]
            for a, b in drawn.edges
        ],
    }


def _label(name: str) -> str:
    flat = " ".join(name.split())
    return flat if len(flat) <= _LABEL else f"…{flat[1 - _LABEL :]}"


def _holders(row: Row) -> list[str]:
    """The modules that hold a row's op, the outermost first; its own module is not one of them."""
    parts = row.module.split(".")[:-1]
    return [".".join(parts[: i + 1]) for i in range(len(parts))]

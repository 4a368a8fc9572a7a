"""Where an error was born, on the graph of the sites."""

from __future__ import annotations

import networkx as nx

from fxqfix._notebook import Shown
from fxqfix.report.data import Report
from fxqfix.report.dot import graph
from fxqfix.report.rows import Row

__all__ = ["Origin", "origin", "steps"]


class Origin(Shown, tuple[Row, ...]):
    """The rows from where an error was born down to the row that was asked for.

    Example:
        >>> str(Origin())
        'exact'
    """

    __slots__ = ()

    @property
    def added(self) -> tuple[tuple[str, int, int], ...]:
        """(site, codes that it adds given the same inputs, by how many LSB at most) per step."""
        steps = ((row.name, row.local or row.cumulative) for row in self)
        return tuple((name, found.differing, found.max_lsb) for name, found in steps)

    def __str__(self) -> str:
        """One line per step."""
        lines = []
        for row in self:
            local, total = row.local or row.cumulative, row.cumulative
            adds = f"adds {local.differing} codes of {local.elements}, up to {local.max_lsb} LSB"
            if row.off_grid:
                adds = f"another grid, no code differs, but values do by up to {total.max_abs:.2g}"
            lines.append(f"{row.name}: {adds}; {total.differing} differ by now")
        return "\n".join(lines) or "exact"


def origin(report: Report, name: str) -> Origin:
    """The path to a row on which most was added.

    Only sites whose values differ from the prepared model's own hand an error on. Of all paths
    through them, this is the one whose steps add up to the largest share of codes that differ given
    the same inputs.

    Args:
        report: The report.
        name: The row that the path ends in.

    Returns:
        The rows, from the birth of the error downwards; empty where the row is exact.

    Raises:
        UnknownNameError: There is no such row.
    """
    end = report.row(name)
    if end.exact:
        return Origin()
    sites = graph(report)
    rows = nx.get_node_attributes(sites, "row")
    handing_on = {n for n, row in rows.items() if not row.cumulative.exact} | {end.name}
    wrong = sites.subgraph(handing_on & (nx.ancestors(sites, end.name) | {end.name}))
    best: dict[str, tuple[float, float, tuple[str, ...]]] = {}
    for site in nx.topological_sort(wrong):
        before = [best[up] for up in wrong.predecessors(site)]
        so_far, _, path = max(before, key=lambda x: x[:2], default=(0.0, 0.0, ()))
        row = rows[site]
        best[site] = (so_far + row.local_share, row.cumulative_share, (*path, site))
    return Origin(rows[site] for site in best[end.name][2])


def steps(report: Report) -> dict[str, str]:
    """Of every row that differs, the input on whose path most was added: `origin`, step by step.

    Args:
        report: The report. A row stands behind its inputs.

    Returns:
        Row -> input; rows where an error is born have none.

    Example:
        >>> steps(Report(rows=()))
        {}
    """
    found: dict[str, str] = {}
    best: dict[str, tuple[float, float]] = {}
    for row in report.rows:
        if row.cumulative.exact:
            continue
        before = [name for name in row.inputs if name in best]
        if before:
            found[row.name] = max(before, key=lambda name: best[name])
        so_far = best[found[row.name]][0] if before else 0.0
        best[row.name] = so_far + row.local_share, row.cumulative_share
    return found

"""Two panels per report: SQNR beside its noise floor, and which causes differ by how much.

matplotlib is imported when something is drawn, and nothing is ever shown: the caller has the axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from fxqfix._extras import require
from fxqfix.report.data import Report
from fxqfix.report.palette import colours
from fxqfix.report.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["causes", "plot", "sqnr"]


def plot(report: Report, ax: Any = None) -> Any:
    """Draw SQNR and causes, one above the other.

    Args:
        report: What to draw.
        ax: Axes to draw the SQNR into, and nothing else; None makes a figure with both panels.

    Returns:
        The axes that were given, or the pair (SQNR axes, causes axes) of the new figure.

    Raises:
        MissingDependencyError: matplotlib is not installed.

    Example:
        >>> upper, lower = plot(Report(rows=()))
        >>> lower.get_ylabel()
        'differing codes, %'
        >>> import matplotlib.pyplot as plt
        >>> plt.close(lower.figure)
    """
    if ax is not None:
        sqnr(report, ax)
        return ax
    pyplot = require("matplotlib.pyplot", "plot", "Report.plot")
    width = min(max(6.4, 2.5 + 0.28 * len(report.rows)), 20.0)
    _, (upper, lower) = pyplot.subplots(
        2, 1, sharex=True, figsize=(width, 7.0), layout="constrained"
    )
    sqnr(report, upper)
    causes(report, lower)
    upper.tick_params(labelbottom=False)
    return upper, lower


def sqnr(report: Report, ax: Axes) -> None:
    """Draw the SQNR of every site, and the noise floor that it has to be judged by.

    Sites that are equal to the bit have no finite SQNR; they stand on a line of their own above.

    Args:
        report: What to draw.
        ax: Axes to draw into.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> sqnr(Report(rows=()), ax)
        >>> ax.get_ylabel()
        'SQNR, dB (higher is better)'
    """
    values = [row.cumulative.sqnr_db for row in report.rows]
    floors = [row.noise_floor_db if row.noise_floor else math.nan for row in report.rows]
    finite = [value for value in (*values, *floors) if math.isfinite(value)]
    top = 10.0 * math.ceil(max(finite, default=20.0) / 10.0) + 10.0
    bottom = 10.0 * math.floor(min(finite, default=0.0) / 10.0)

    def placed(figures: Iterable[float]) -> list[float]:
        return [min(max(figure, bottom), top) for figure in figures]

    places = range(len(report.rows))
    ax.axhline(top, color="#888888", linewidth=0.8, linestyle=":")
    # The floor is wider than the dot, so that both are seen where they coincide.
    ax.plot(
        places,
        placed(floors),
        "_",
        color="#2ca02c",
        markersize=12,
        markeredgewidth=2,
        label="noise floor",
    )
    ax.plot(places, placed(values), "o", color="#d62728", markersize=5, label="converted")
    ax.set_ylim(bottom, top + 0.06 * (top - bottom))
    ax.text(1.005, top, "exact", transform=ax.get_yaxis_transform(), va="center", fontsize=8)
    ax.set_ylabel("SQNR, dB (higher is better)")
    ax.grid(axis="y", alpha=0.3)
    _legend(ax, "lower left", 0.0)
    _name_sites(report.rows, ax)


def causes(report: Report, ax: Axes) -> None:
    """Draw the share of differing codes of every site, stacked by cause.

    Args:
        report: What to draw.
        ax: Axes to draw into.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> causes(Report(rows=()), ax)
        >>> len(ax.patches)
        0
    """
    places = range(len(report.rows))
    base = [0.0] * len(report.rows)
    palette = colours(report.causes)
    for cause in report.causes:
        shares = [
            100.0 * row.causes.get(cause, 0) / max(row.cumulative.elements, 1)
            for row in report.rows
        ]
        ax.bar(places, shares, bottom=base, width=0.8, color=palette[cause], label=cause)
        base = [low + share for low, share in zip(base, shares, strict=True)]
    ax.set_ylabel("differing codes, %")
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    if report.causes:
        _legend(ax, "upper left", 1.0)
    _name_sites(report.rows, ax)


def _legend(ax: Axes, corner: Literal["lower left", "upper left"], height: float) -> None:
    # Beside the axes: inside, it would hide sites.
    ax.legend(loc=corner, bbox_to_anchor=(1.0, height), fontsize=8, frameon=False)


def _name_sites(rows: tuple[Row, ...], ax: Axes) -> None:
    names = [row.name if len(row.name) <= 28 else f"…{row.name[-27:]}" for row in rows]
    # Upright names need no room beside each other, and at 60 sites a smaller font still reads.
    size = 8.0 if len(rows) <= 30 else 7.0 if len(rows) <= 60 else 5.0
    ax.set_xticks(range(len(rows)), names, rotation=90, fontsize=size)
    ax.set_xlim(-0.8, max(len(rows), 1) - 0.2)

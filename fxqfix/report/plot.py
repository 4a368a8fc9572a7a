"""Two panels per report: SQNR beside its noise floor, and which causes differ by how much.

matplotlib is imported when something is drawn, and nothing is ever shown: the caller has the axes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from fxqfix._extras import require
from fxqfix.errors import DataError, UnknownNameError
from fxqfix.report.data import Report
from fxqfix.report.palette import colours
from fxqfix.report.renderings import Rendering
from fxqfix.report.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["KINDS", "as_svg", "causes", "draw", "plot", "sqnr"]

_NAMED = 60  # sites whose names there is room for


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
    _, (upper, lower) = pyplot.subplots(
        2, 1, sharex=True, figsize=_size(report), layout="constrained"
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
    if any(row.noise_floor for row in report.rows):
        # The floor is wider than the dot, so that both are seen where they coincide.
        look: dict[str, Any] = {"color": "#2ca02c", "markersize": 12, "markeredgewidth": 2}
        ax.plot(places, placed(floors), "_", label="noise floor", **look)
    ax.plot(places, placed(values), "o", color="#d62728", markersize=5, label="converted")
    ax.set_ylim(bottom, top + 0.06 * (top - bottom))
    ticks = [tick for tick in ax.get_yticks() if bottom <= tick <= top - 5.0]
    # A tick of its own: at that height stands no figure.
    ax.set_yticks([*ticks, top], [*(f"{tick:g}" for tick in ticks), "exact"])
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


def _apart(places: Iterable[int], least: int) -> set[int]:
    """Those of the places, the first ones first, that stand so far from each other."""
    kept: set[int] = set()
    for place in places:
        if all(abs(place - other) >= least for other in kept):
            kept.add(place)
    return kept


def _name_sites(rows: tuple[Row, ...], ax: Axes) -> None:
    names = [row.name if len(row.name) <= 28 else f"…{row.name[-27:]}" for row in rows]
    if len(rows) > _NAMED:  # of more there is only room for those that add most
        worst = sorted(range(len(rows)), key=lambda i: -rows[i].local_share)
        kept = _apart(worst, 2 * len(rows) // _NAMED)
        names = [name if i in kept else "" for i, name in enumerate(names)]
    # Upright names need no room beside each other, and at 60 sites a smaller font still reads.
    size = 8.0 if len(rows) <= 30 else 7.0 if len(rows) <= 60 else 5.0
    ax.set_xticks(range(len(rows)), names, rotation=90, fontsize=size)
    ax.set_xlim(-0.8, max(len(rows), 1) - 0.2)


def as_svg(report: Report) -> str:
    """The plot of SQNR and causes as SVG text.

    Example:
        >>> as_svg(Report(rows=())).rstrip().endswith("</svg>")
        True
    """
    require("matplotlib.pyplot", "plot", "Report.plot")
    figure = require("matplotlib.figure", "plot", "Report.plot").Figure
    made = figure(figsize=_size(report), layout="constrained")
    upper, lower = made.subplots(2, 1, sharex=True)
    sqnr(report, upper)
    causes(report, lower)
    upper.tick_params(labelbottom=False)
    out = io.StringIO()
    made.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _size(report: Report) -> tuple[float, float]:
    return min(max(6.4, 2.5 + 0.28 * len(report.rows)), 20.0), 7.0


def draw(report: Report, kind: str = "sites", site: str | None = None, ax: Any = None) -> Any:
    """Draw one kind of plot.

    Args:
        report: What to draw.
        kind: A key of `KINDS`, or "sites" for `plot`.
        site: The row whose codes "codes" draws; None for the one that adds most.
        ax: Axes to draw into; None makes a figure.

    Returns:
        The axes; of "sites" without `ax` both.

    Raises:
        UnknownNameError: There is no such kind, or no such site.
        DataError: The codes of that site were not counted.
        MissingDependencyError: matplotlib is not installed.

    Example:
        >>> from matplotlib.figure import Figure
        >>> draw(Report(rows=()), "depth", ax=Figure().subplots()).get_xlabel()
        'site, in the order of the graph'
    """
    if kind == "sites":
        return plot(report, ax)
    if kind not in KINDS:
        raise UnknownNameError(
            f"no plot is named {kind!r}", where="Report.plot", expected=", ".join(["sites", *KINDS])
        )
    if ax is None:
        pyplot = require("matplotlib.pyplot", "plot", "Report.plot")
        _, ax = pyplot.subplots(figsize=(8.0, 4.5), layout="constrained")
    KINDS[kind](report, site, ax)
    return ax


def _sites_of(report: Report) -> list[Row]:
    return [row for row in report.rows if row.kind == "activation"]


def _depth(report: Report, site: str | None, ax: Axes) -> None:
    """What each site adds, and what has come together by then."""
    rows = _sites_of(report)
    for share, label, colour in (
        ([100 * row.local_share for row in rows], "added here", "#d62728"),
        ([100 * row.cumulative_share for row in rows], "accumulated", "#1f77b4"),
    ):
        ax.plot(range(len(rows)), share, marker="o", markersize=3, color=colour, label=label)
    ax.set_xlabel("site, in the order of the graph")
    ax.set_ylabel("codes that differ, %")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)


def _local(report: Report, site: str | None, ax: Axes) -> None:
    """Local against cumulative; the sites that add most are named."""
    rows = _sites_of(report)
    ax.scatter(
        [100 * row.local_share for row in rows], [100 * row.cumulative_share for row in rows], s=18
    )
    for row in report.worst(5):
        if row.local_share and row.kind == "activation":
            at = 100 * row.local_share, 100 * row.cumulative_share
            ax.annotate(row.name, at, fontsize=8, xytext=(4, 4), textcoords="offset points")
    ax.set_xlabel("codes that differ on the same inputs, %")
    ax.set_ylabel("codes that differ by now, %")
    ax.grid(alpha=0.3)


def _shares(report: Report, site: str | None, ax: Axes) -> None:
    """Codes of each cause over all rows."""
    found, palette = report.causes, colours(report.causes)
    bars = ax.barh(list(found), list(found.values()), color=[palette[cause] for cause in found])
    total = sum(found.values())
    ax.bar_label(bars, [f" {100 * n / total:.1f}%" for n in found.values()], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("codes")


def _against_floor(report: Report, site: str | None, ax: Axes) -> None:
    """SQNR against the noise floor: on the line, a site is as good as rounding lets it be."""
    rows = [row for row in _sites_of(report) if row.noise_floor is not None]
    both = [(row.noise_floor_db, row.cumulative.sqnr_db) for row in rows]
    pairs = [pair for pair in both if all(map(math.isfinite, pair))]
    ax.scatter([a for a, _ in pairs], [b for _, b in pairs], s=18)
    if pairs:
        span = [min(map(min, pairs)), max(map(max, pairs))]
        ax.plot(span, span, color="#888888", linestyle=":")
    ax.set_xlabel("noise floor, SQNR dB")
    ax.set_ylabel("converted, SQNR dB")
    ax.set_title(f"{len(rows) - len(pairs)} exact sites are not drawn", fontsize=9)
    ax.grid(alpha=0.3)


def _codes(report: Report, site: str | None, ax: Axes) -> None:
    """The codes of both models at one site."""
    worst = report.worst(1)
    if site is None and not worst:
        return
    row = report.row(site) if site is not None else worst[0]
    counts = row.histogram
    if counts is None:
        raise DataError(
            "the codes of this row were not counted",
            where="Report.plot",
            found=row.name,
            expected="a site of 8 bits, in a report of this version",
        )
    edges = [counts.first - 0.5 + i for i in range(len(counts.prepared) + 1)]
    ax.stairs(counts.prepared, edges, fill=True, alpha=0.45, color="#1f77b4", label="prepared")
    ax.stairs(counts.converted, edges, color="#d9730d", label="converted")
    if row.prepared is not None:
        for limit in (row.prepared.quant_min - 0.5, row.prepared.quant_max + 0.5):
            ax.axvline(limit, color="#d62728", linestyle=":", linewidth=1)
    ax.set_yscale("symlog", linthresh=1)
    ax.set_xlabel(f"integer values (codes) of {row.name}; dotted: the declared range")
    ax.set_ylabel("how often")
    ax.legend(frameon=False)


KINDS: Mapping[str, Callable[[Report, str | None, Axes], None]] = {
    "depth": _depth,
    "local": _local,
    "causes": _shares,
    "sqnr": _against_floor,
    "codes": _codes,
}


RENDERING = Rendering(".svg", as_svg)

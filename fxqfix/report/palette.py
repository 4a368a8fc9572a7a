"""A colour per cause, the same in the page and in plots."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle

__all__ = ["colours"]

# Fixed, so that a cause keeps its colour from report to report; others take the rest in turn.
_FIXED = {
    "upstream": "#b8b8b8",
    "unexplained": "#7a7a7a",
    "range-lost": "#d62728",
    "stale-qparams": "#ff7f0e",
    "rounding": "#1f77b4",
    "scale-formula": "#17becf",
    "requantization": "#9467bd",
    "bn-folding": "#2ca02c",
    "kernel-defect": "#8c564b",
    "shared-qparams": "#e377c2",
    "moving-observer": "#bcbd22",
}
_OTHERS = ("#7f0000", "#00427f", "#5a7f00", "#7f005f", "#007f74", "#c49a00", "#4b3a8c", "#f7b6d2")


def colours(causes: Iterable[str]) -> dict[str, str]:
    """Cause -> colour, as CSS and matplotlib take it.

    Example:
        >>> colours(["range-lost"])
        {'range-lost': '#d62728'}
    """
    spare = cycle(_OTHERS)
    return {cause: _FIXED.get(cause) or next(spare) for cause in dict.fromkeys(causes)}

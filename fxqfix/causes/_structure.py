"""What the converted model computes at a site that the prepared one doesn't."""

from __future__ import annotations

from fxqfix.evidence.view import View

__all__ = ["added", "narrowed"]


def added(view: View) -> str:
    """Keys of the ops that only the converted model has between the same sites, "" for none."""
    if view.emulated is None or view.recompute is None:
        return ""
    return ", ".join(sorted(view.emulated.ops - view.recompute.ops))


def narrowed(view: View) -> str:
    """The converted range, where it leaves out codes of the same grid's prepared one; else ""."""
    mine, theirs = view.grid, view.target
    within = theirs.quant_min <= mine.quant_min and theirs.quant_max >= mine.quant_max
    if within or not mine.same_grid(theirs):
        return ""
    return f"[{theirs.quant_min}, {theirs.quant_max}]"

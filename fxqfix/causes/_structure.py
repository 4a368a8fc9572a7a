"""What the converted model computes at a site that the prepared one doesn't, or otherwise."""

from __future__ import annotations

from fxqfix.evidence.structure import counted, otherwise
from fxqfix.evidence.view import View

__all__ = ["edited", "narrowed"]


def edited(view: View) -> list[str]:
    """Ops that only the converted model has between the same sites, and other options of ops."""
    if view.emulated is None or view.recompute is None:
        return []
    mine, theirs = view.recompute.ops, view.emulated.ops
    added = ", ".join(sorted(counted(theirs) - counted(mine)))
    said = [f"only the converted model computes {added} here"] if added else []
    return [*said, *otherwise(mine, theirs)]


def narrowed(view: View) -> str:
    """The converted range, where it leaves out codes of the same grid's prepared one; else ""."""
    mine, theirs = view.grid, view.target
    within = theirs.quant_min <= mine.quant_min and theirs.quant_max >= mine.quant_max
    if within or not mine.same_grid(theirs):
        return ""
    return f"[{theirs.quant_min}, {theirs.quant_max}]"

"""range-lost: the declared [quant_min, quant_max] is not held by the converted model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxqfix.causes._base import Cause
from fxqfix.evidence.view import View

__all__ = ["CAUSE", "RangeLost"]


@dataclass(frozen=True)
class RangeLost(Cause):
    """Codes leave the declared range because the kernel only knows its dtype's.

    Looks for codes outside [quant_min, quant_max], of the site and of its weights. Counterfactual:
    clamp this node's codes to the declared range; the codes that then equal the prepared op's are
    explained. So are those that the prepared op gives with the wider weights.
    """

    def explains(self, view: View) -> Tensor:
        """Codes out of range that a clamp brings to the prepared op's; those of wider weights."""
        low, high = view.grid.quant_min, view.grid.quant_max
        outside = (view.raw < low) | (view.raw > high)
        clamped = view.actual.clamp(low, high)
        found = outside & (clamped == view.expected)
        if wide := _wider_weights(view):
            pairs = view.weights.items()
            weights = {path: p.theirs if path in wide else p.mine for path, p in pairs}
            found |= view.agrees(view.recomputed(weights), view.grid, clamped)
        return found

    def evidence(self, view: View) -> str:
        """The range of codes found and the range declared."""
        low, high = (int(x) for x in view.found.raw.aminmax())
        if low < view.grid.quant_min or high > view.grid.quant_max:
            return f"codes {low}..{high} where {view.grid.range_text} is declared"
        path = _wider_weights(view)[0]
        pair = view.weights[path]
        low, high = (int(x) for x in pair.theirs.codes.aminmax())
        declared = pair.mine.qparams.range_text
        return f"weight of {path!r}: codes {low}..{high}, declared {declared}"


def _wider_weights(view: View) -> list[str]:
    """Paths of the weights whose codes differ by nothing but a clamp to the declared range."""
    return [path for path, pair in view.weights.items() if pair.widened]


PLACE = 10
CAUSE = RangeLost(
    name="range-lost",
    summary="quant_min / quant_max are lost: the kernel clamps to its dtype's whole range",
    repair="restore-range",
    advice="convert with fxqfix.to_int8, which holds them, or with fxqfix.to_decomposed, whose ops "
    "carry them",
)

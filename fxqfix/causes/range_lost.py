"""range-lost: the declared [quant_min, quant_max] is not held by the converted model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxqfix.causes._base import Cause
from fxqfix.causes._view import View

__all__ = ["CAUSE", "RangeLost"]


@dataclass(frozen=True)
class RangeLost(Cause):
    """Codes leave the declared range because the kernel only knows its dtype's.

    Looks for codes outside [quant_min, quant_max]. Counterfactual: clamp this node's codes to the
    declared range; the codes that then equal the prepared op's are explained.
    """

    def explains(self, view: View) -> Tensor:
        """Codes out of range that a clamp brings to the prepared op's."""
        low, high = view.grid.quant_min, view.grid.quant_max
        outside = (view.raw < low) | (view.raw > high)
        return outside & (view.actual.clamp(low, high) == view.expected)

    def evidence(self, view: View) -> str:
        """The range of codes found and the range declared."""
        low, high = int(view.raw.min()), int(view.raw.max())
        return f"codes {low}..{high} where {view.grid.range_text} is declared"


CAUSE = RangeLost(
    name="range-lost",
    summary="quant_min / quant_max are lost: the kernel clamps to its dtype's whole range",
    repair="restore-range",
    advice="convert with fxqfix.to_int8, which holds them, or with fxqfix.to_decomposed, whose ops "
    "carry them",
)

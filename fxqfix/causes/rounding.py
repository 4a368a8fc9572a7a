"""rounding: the exact value lies on a tie that float32 arithmetic rounds to either side."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxqfix.causes._base import Cause
from fxqfix.evidence.view import View

__all__ = ["CAUSE", "Rounding"]


@dataclass(frozen=True)
class Rounding(Cause):
    """Both codes are roundings of one value, within float32 arithmetic.

    Counterfactual: the prepared op in float64, on the exact integers; the codes that are a
    rounding of that value, give or take the float32 roundings of a kernel and the float32 error
    that the shadow itself is measured to make, are explained. The native quantize op, which in
    some builds adds the zero point before it rounds, is covered by this. On two grids a value that
    is a tie of one is as good as any on the other: there the grids are the cause.

    A weight, or a constant, on one grid may hold such codes too. Counterfactual, for what reads it:
    the prepared op with these codes.
    """

    def explains(self, view: View) -> Tensor | None:
        """Codes that are a rounding of the exact value, as the shadow's are."""
        if not view.grid.same_grid(view.target):
            return None
        codes = view.unbiased(view.grid)
        actual = view.agrees(view.exact, view.grid, codes)
        if (other := view.otherwise_rounded) is not None:
            actual |= view.agrees(other, view.grid, codes)
        return actual & view.agrees(view.exact, view.grid, view.expected)

    def evidence(self, view: View) -> str:
        """The largest difference between float32 and float64, in codes."""
        if view.otherwise_rounded is not None:
            return "a code of its weight is rounded to the other side of a tie"
        error = view.own_error / max(view.grid.scales)
        return f"float32 is up to {float(error):.2g} codes away from float64 here"


PLACE = 100
CAUSE = Rounding(
    name="rounding",
    summary="the exact value is within float32 rounding of a tie; both codes round it",
    repair="",
    advice="nothing to repair: at most 1 code apart, on ties only",
)

"""rounding: the exact value lies on a tie that float32 arithmetic rounds to either side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxqfix.causes._base import Cause
from fxqfix.causes._view import View

__all__ = ["CAUSE", "Rounding"]


@dataclass(frozen=True)
class Rounding(Cause):
    """Both codes are roundings of one value, within float32 arithmetic.

    Counterfactual: the prepared op in float64, on the exact integers; the codes that are a
    rounding of that value, give or take the float32 roundings of a kernel and the float32 error
    that the shadow itself is measured to make, are explained. The native quantize op, which in
    some builds adds the zero point before it rounds, is covered by this. So is a weight with
    fractional zero points (an embedding's), to which the decomposed quantize adds them last and
    cuts the sum off.
    """

    def explains(self, view: View) -> Tensor:
        """Codes that are a rounding of the exact value, as the shadow's are."""
        whole = all(float(z).is_integer() for z in view.grid.zero_points)
        if view.weight is not None and not whole:
            return view.actual == _cut_off(view)
        actual = view.agrees(view.exact, view.grid, view.actual)
        return actual & view.agrees(view.exact, view.grid, view.expected)

    def evidence(self, view: View) -> str:
        """The largest difference between float32 and float64, in codes."""
        error = (view.value.double() - view.exact).abs().max() / max(view.grid.scales)
        return f"float32 is up to {float(error):.2g} codes away from float64 here"


def _cut_off(view: View) -> Tensor:
    """What the decomposed quantize_per_channel gives where zero points are fractions."""
    scale, point = view.grid.tensors(view.value)
    codes = torch.round(view.value.float() * (1.0 / scale)) + point
    return codes.clamp(view.grid.quant_min, view.grid.quant_max).to(torch.int32)


CAUSE = Rounding(
    name="rounding",
    summary="the exact value is within float32 rounding of a tie; both codes round it",
    repair="",
    advice="nothing to repair: at most 1 code apart, on ties only",
)

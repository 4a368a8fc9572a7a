"""degenerate-scale: the site's scale is so small that its codes count the noise of float32."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxqfix.causes._base import Cause
from fxqfix.evidence.view import View
from fxqfix.qparams import FLOOR

__all__ = ["CAUSE", "DegenerateScale"]

_STEP = 2.0**-12  # the smallest scale that quantizers for deployment give


@dataclass(frozen=True)
class DegenerateScale(Cause):
    """The observed value was constant: a code of it is less than float32 arithmetic is off by.

    A normalization divides the rounding errors of a constant by the root of its epsilon. Looks for
    8-bit grids with a scale at an observer's floor. Counterfactual: on a grid of scale 2^-12, the
    smallest that is of any use, both values have one code.
    """

    def explains(self, view: View) -> Tensor | None:
        """Codes that are one on a grid of a healthy scale."""
        scale = max(view.grid.scales)
        if scale > FLOOR or view.grid.bits > 8 or view.weight is not None:
            return None
        apart = (view.actual - view.expected).abs().double() * scale
        return view.differs_locally & (apart < _STEP)

    def evidence(self, view: View) -> str:
        """The scale."""
        return f"scale {max(view.grid.scales):.3g}: the value that was observed is a constant"


PLACE = 210
CAUSE = DegenerateScale(
    name="degenerate-scale",
    summary="a constant was observed: the scale is so small that codes count float32's rounding",
    repair="",
    advice="calibrate on real data, or keep this op in float",
)

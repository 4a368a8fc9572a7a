"""bias-int32: qnnpack rounds the bias to an integer of scale input scale * weight scale."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxqfix.causes._base import Cause
from fxqfix.engines import Qnnpack
from fxqfix.evidence.view import View

__all__ = ["CAUSE", "BiasInt32"]


@dataclass(frozen=True)
class BiasInt32(Cause):
    """The accumulator starts from ``rne(bias / (input scale * weight scale))``, an int32.

    Looks at ops with a weight and a bias that run on qnnpack. Counterfactual: the converted op in
    its engine's integers gives the codes found, and the prepared op's once the bias is not rounded.
    Where something else has to be corrected too, the code goes to that cause, which is asked later
    and sees the codes of the bias that is not rounded.
    """

    def explains(self, view: View) -> Tensor | None:
        """Codes that the engine's integers give only because the bias is rounded."""
        found = view.owed_to(self.name)
        return None if found is None else found & (view.unbiased(view.grid) == view.expected)

    def evidence(self, view: View) -> str:
        """How far a bias moves, in output codes."""
        modules = view.emulated.weighted if view.emulated is not None else ()
        moved = [float(m.bias_error.max()) for m in modules if isinstance(m, Qnnpack)]
        return f"the rounded bias moves values by up to {max(moved, default=0.0):.2g} codes"


PLACE = 90
CAUSE = BiasInt32(
    name="bias-int32",
    summary="qnnpack rounds the bias to an int32 of the accumulator's scale",
    repair="",
    advice="nothing to repair: at most 1 code; train with biases on that grid to avoid it",
)

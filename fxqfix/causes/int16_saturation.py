"""int16-saturation: pairs of products overflow 16 bits on CPUs without VNNI."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxqfix.causes._base import Cause
from fxqfix.engines import saturation_possible
from fxqfix.evidence.view import View

__all__ = ["CAUSE", "Int16Saturation"]


@dataclass(frozen=True)
class Int16Saturation(Cause):
    """The kernel adds u8 x s8 products in pairs, in int16 with saturation.

    Looks at ops with a weight. Counterfactual: the converted op in its engine's integers gives the
    codes found, and other ones once its sums of pairs are exact. Only reduce_range (activations in
    [0, 127]), another engine or a CPU with VNNI helps.
    """

    def explains(self, view: View) -> Tensor | None:
        """Codes that the engine's integers give only because pairs saturate."""
        return view.owed_to(self.name)

    def evidence(self, view: View) -> str:
        """How many pairs of weights are large enough."""
        call = view.emulated.call if view.emulated is not None else None
        if call is None or call.weight is None:
            return ""
        low, high = int(call.weight.codes.min()), int(call.weight.codes.max())
        return (
            f"activation codes up to {call.source.container[1]} times weight codes {low}..{high}: "
            f"{saturation_possible(call)} pairs of products may leave int16"
        )


PLACE = 180
CAUSE = Int16Saturation(
    name="int16-saturation",
    summary="pairs of u8 x s8 products saturate in int16 on CPUs without VNNI",
    repair="",
    advice="use reduce_range (activations in [0, 127]), the qnnpack engine, or a CPU with VNNI",
)

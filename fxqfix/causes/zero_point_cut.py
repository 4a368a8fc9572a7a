"""zero-point-cut: a zero point that is a fraction is cut off by the conversion's quantize op."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxqfix.causes._base import Cause
from fxqfix.evidence.view import View
from fxqfix.evidence.weights import cut

__all__ = ["CAUSE", "ZeroPointCut"]


@dataclass(frozen=True)
class ZeroPointCut(Cause):
    """A weight with float zero points (an embedding's) is rounded in another order.

    The fake-quant rounds ``w / scale + zero_point``. The decomposed quantize op rounds
    ``w / scale``, adds the zero point and cuts the sum off. Counterfactual, for the weight and for
    what reads it: the prepared weight quantized so.
    """

    def explains(self, view: View) -> Tensor | None:
        """Codes that the prepared weight has too once its zero points are cut off."""
        if view.weight is not None:
            return view.places.take(cut(view.weight.mine, view.weight.theirs))
        if not any(pair.cut for pair in view.weights.values()):
            return None
        return view.corrected_by(self.name)

    def evidence(self, view: View) -> str:
        """How many codes have their zero points cut."""
        pairs = {"": view.weight} if view.weight is not None else view.weights
        return "; ".join(
            f"{f'weight of {path!r}: ' if path else ''}{pair.cut} of "
            f"{pair.theirs.codes.numel()} codes have the fraction of their zero point cut off"
            for path, pair in pairs.items()
            if pair.cut
        )


PLACE = 80
CAUSE = ZeroPointCut(
    name="zero-point-cut",
    summary="the conversion cuts the fraction of a float zero point off; the fake-quant rounds it",
    repair="",
    advice="use an observer with whole zero points (torch.per_channel_affine or symmetric), or "
    "judge by the converted model",
)

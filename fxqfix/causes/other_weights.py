"""other-weights: the converted weights, or biases, are not those of the prepared model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxqfix.causes._base import Cause
from fxqfix.evidence.view import View
from fxqfix.evidence.weights import WeightPair, of_its_own

__all__ = ["CAUSE", "OtherWeights"]


@dataclass(frozen=True)
class OtherWeights(Cause):
    """The values differ, not the grid: another checkpoint, a lost bias, a channel set to zero.

    Looks for weight codes that are no rounding of the prepared weight on the converted grid, and
    for another bias, and for float constants and layers of other values. Counterfactual: the
    prepared op with the converted weights and biases; the
    codes that then agree, within float32 rounding, and did not with the converted qparams alone,
    are explained.
    """

    def explains(self, view: View) -> Tensor | None:
        """Codes that the prepared op gives too once it has the converted weights and biases."""
        if view.weight is not None:
            return view.places.take(of_its_own(view.weight.mine, view.weight.theirs))
        if not self._found(view):
            return None
        return view.corrected_by(self.name)

    def evidence(self, view: View) -> str:
        """How many weight codes are other values, and how far a bias is off."""
        if view.weight is None:
            return f"{'; '.join(self._found(view))}: these may be two checkpoints"
        return f"{_codes(view.weight)}: these may be two checkpoints"

    def _found(self, view: View) -> list[str]:
        found, step = [], min(view.target.scales)
        for path, pair in view.weights.items():
            mine, theirs = pair.mine, pair.theirs
            if pair.own:
                found.append(f"weight of {path!r}: {_codes(pair)}")
            if apart := pair.bias_apart(step):
                lost = mine.bias is not None and (theirs.bias is None or not theirs.bias.any())
                what = "lost, a difference of" if lost else "off by"
                found.append(
                    f"bias of {path!r}: {what} up to {apart:.3g} ({apart / step:.3g} codes)"
                )
        others = view.recompute.own_others if view.recompute is not None else ()
        return [*found, *(f"{name} has other values" for name in others)]


def _codes(pair: WeightPair) -> str:
    count = pair.theirs.codes.numel()
    return f"{pair.own} of {count} codes are no rounding of the prepared weight"


PLACE = 170
CAUSE = OtherWeights(
    name="other-weights",
    summary="the values of weights or biases are not those of the prepared model",
    repair="restore-qparams",
    advice="compare the models of one checkpoint; fxqfix.repair puts the prepared weights back",
)

"""bias-int32: qnnpack rounds the bias to an integer of scale input scale * weight scale."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxqfix.causes._base import Cause
from fxqfix.causes._view import View
from fxqfix.dialects.weights import WeightView

__all__ = ["CAUSE", "BiasInt32"]


@dataclass(frozen=True)
class BiasInt32(Cause):
    """The accumulator starts from ``rne(bias / (input scale * weight scale))``, an int32.

    Looks at ops with a weight and a bias on the qnnpack engine. Counterfactual: the converted
    integers in float64, with the bias rounded like that; the codes that then agree are explained.
    """

    def explains(self, view: View) -> Tensor | None:
        """Codes that the exact value gives too once the bias is rounded to int32."""
        weights = _rounded(view)
        if not weights:
            return None
        return view.agrees(view.recomputed(weights), view.target, view.raw)

    def evidence(self, view: View) -> str:
        """How far a bias moves, in output codes."""
        moved = (view.recomputed(_rounded(view)) - view.converted).abs().max()
        codes = float(moved) / view.target.scales[0]
        return f"the rounded bias moves values by up to {codes:.2g} codes"


def _rounded(view: View) -> dict[str, WeightView]:
    """The converted weights with their biases rounded; empty where this engine doesn't round."""
    if torch.backends.quantized.engine != "qnnpack":
        return {}
    if view.recompute is None or view.local is None or len(view.local.codes) != 1:
        return {}
    inputs, pairs = view.local.codes[0], view.recompute.own_weights
    if inputs is None or len(pairs) != 1:
        return {}
    (path, (mine, theirs)) = next(iter(pairs.items()))
    bias = theirs.bias if theirs.bias is not None else mine.bias
    if bias is None:
        return {}
    scale, _ = theirs.qparams.tensors(theirs.codes)
    # Per output channel; the product is rounded to float32 before it is inverted, as in qnnpack.
    step = (scale.double().reshape(-1) * inputs[1].scales[0]).float()
    rounded = torch.round(bias.detach() * (1.0 / step)).double() * step.double()
    return {path: replace(theirs, bias=rounded)}


CAUSE = BiasInt32(
    name="bias-int32",
    summary="qnnpack rounds the bias to an int32 of the accumulator's scale",
    repair="",
    advice="nothing to repair: at most 1 code; train with biases on that grid to avoid it",
)

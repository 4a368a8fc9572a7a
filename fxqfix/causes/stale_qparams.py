"""stale-qparams: scale and zero point that don't follow from the observed range any more."""

from __future__ import annotations

from dataclasses import dataclass

from fxqfix.causes._qparams import OtherQParams

__all__ = ["CAUSE", "StaleQParams"]


@dataclass(frozen=True)
class StaleQParams(OtherQParams):
    """One of the models holds qparams that the observer's min/max don't give (any more).

    A plain fake-quant whose observer is off uses its buffers, conversion asks the observer; an
    exporter copies buffers that the fused kernel wrote before the range moved; a state_dict was
    loaded after the conversion. Not `scale-formula`: that is two rules for the same min/max.
    Counterfactual: the prepared op with the converted qparams; the codes that then agree, within
    float32 rounding, are explained.
    """


PLACE = 130
CAUSE = StaleQParams(
    name="stale-qparams",
    summary="scale and zero point are not those that the observed range gives (any more)",
    repair="freeze-qparams",
    advice="convert fxqfix.freeze(prepared), or repair the converted model with fxqfix.repair",
)

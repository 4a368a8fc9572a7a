"""scale-formula: conversion writes other qparams into the model than the fake-quant used."""

from __future__ import annotations

from dataclasses import dataclass

from fxqfix.causes._qparams import OtherQParams

__all__ = ["CAUSE", "ScaleFormula"]


@dataclass(frozen=True)
class ScaleFormula(OtherQParams):
    """The observer's formula differs from the fused kernel's, and conversion asks the observer.

    Looks for a scale or zero point, of the weight or of the output, that differs between both
    models although both are of the same observed range. Counterfactual: the prepared op with the
    converted weights, quantized with the converted qparams; the codes that then agree, within
    float32 rounding, are explained.
    """


PLACE = 140
CAUSE = ScaleFormula(
    name="scale-formula",
    summary="conversion bakes the observer's qparams, not those that the fused fake-quant used",
    repair="freeze-qparams",
    advice="convert fxqfix.freeze(prepared), or repair the converted model with fxqfix.repair",
)

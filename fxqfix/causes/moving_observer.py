"""moving-observer: an observer that is on has moved the qparams since the conversion, or in it."""

from __future__ import annotations

from dataclasses import dataclass

from fxqfix.causes._qparams import OtherQParams

__all__ = ["CAUSE", "MovingObserver"]


@dataclass(frozen=True)
class MovingObserver(OtherQParams):
    """An observer is on: every batch moves its range, in eval mode too, and so does conversion.

    Activations: the converted qparams are of an earlier range. Weights: conversion shows a QAT
    module's observer the weight once more. Only the move counts here; another formula for the range
    before it is `scale-formula`. Where most observers that are on still give what was converted, or
    the scale is the same, nothing moved: `other-qparams`. Counterfactual: the prepared op with the
    converted qparams; the codes that then agree, within float32 rounding, are explained.
    """


PLACE = 150
CAUSE = MovingObserver(
    name="moving-observer",
    summary="an observer is on: the qparams move with every batch, and did since the conversion",
    repair="freeze-qparams",
    advice="disable_observer, then convert fxqfix.freeze(prepared), or repair with fxqfix.repair",
)

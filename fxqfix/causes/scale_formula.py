"""scale-formula: conversion bakes other qparams than the fake-quant used."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxqfix.causes._base import Cause
from fxqfix.causes._view import View

__all__ = ["CAUSE", "ScaleFormula"]


@dataclass(frozen=True)
class ScaleFormula(Cause):
    """The observer's formula differs from the fused kernel's, and conversion asks the observer.

    Looks for a scale or zero point, of the weight or of the output, that differs between both
    models. Counterfactual: the prepared op with the converted weights, quantized with the
    converted qparams; the codes that then agree, within float32 rounding, are explained.
    """

    def explains(self, view: View) -> Tensor | None:
        """Codes that the prepared op gives too once it has the converted qparams."""
        if view.grid.same_grid(view.target) and not view.weights_differ:
            return None
        return view.agrees(view.converted, view.target, view.raw)

    def evidence(self, view: View) -> str:
        """The qparams that differ, prepared against converted."""
        if not view.grid.same_grid(view.target):
            return _difference(view.pair.prepared.site.name, view.grid, view.target)
        assert view.recompute is not None  # weights_differ was true
        pairs = view.recompute.own_weights.items()
        path, (mine, theirs) = next(
            (p, x) for p, x in pairs if not x[0].qparams.same_grid(x[1].qparams)
        )
        return _difference(f"{path}.weight", mine.qparams, theirs.qparams)


def _difference(name: str, mine: object, theirs: object) -> str:
    return f"{name}: fake-quant used {mine}, conversion baked {theirs}"


CAUSE = ScaleFormula(
    name="scale-formula",
    summary="conversion bakes the observer's qparams, not those that the fused fake-quant used",
    repair="freeze-qparams",
    advice="convert fxqfix.freeze(prepared) instead of prepared",
)

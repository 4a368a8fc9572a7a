"""requantization: the converted model rounds to a grid in between, the prepared one doesn't."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxqfix.causes._base import Cause
from fxqfix.causes._view import View

__all__ = ["CAUSE", "Requantization"]


@dataclass(frozen=True)
class Requantization(Cause):
    """A quantized kernel rounds its output, where no fake-quant simulates it.

    Eager mode observes no pools, for one: int8 pools round to their input's grid, and the prepared
    model goes on in float. Looks for values that only the converted model quantizes.
    Counterfactual: the converted op in float64, rounded to that grid in between; the codes that
    then agree are explained.
    """

    def explains(self, view: View) -> Tensor | None:
        """Codes that the exact value gives too once it is rounded in between."""
        if view.requantized is None:
            return None
        return view.agrees(view.requantized, view.target, view.raw)

    def evidence(self, view: View) -> str:
        """Where the converted model rounds."""
        inner = view.recompute.own_inner if view.recompute is not None else {}
        return "; ".join(f"{name!r} is rounded to {q}" for name, q in inner.items())


CAUSE = Requantization(
    name="requantization",
    summary="a kernel rounds its output to a grid where the prepared model has no fake-quant",
    repair="",
    advice="prepare with FX, which observes these ops, or judge by the converted model",
)

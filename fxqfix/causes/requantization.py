"""requantization: the engine rounds where, or in a way that, the prepared model doesn't."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxqfix.causes._base import Cause
from fxqfix.causes._structure import edited, narrowed
from fxqfix.evidence.view import View

__all__ = ["CAUSE", "Requantization"]

_REACH = 1.5  # codes: rounded, that is one code
_ROUNDED = 2.0**-10  # codes: folding BatchNorm in another order moves a bias by less


@dataclass(frozen=True)
class Requantization(Cause):
    """A quantized kernel rounds in between, or in its own arithmetic.

    In between: eager mode observes no pools, for one; int8 pools round to their input's grid, and
    the prepared model goes on in float. Counterfactual: the converted op in float64, rounded to
    that grid in between; the codes that then agree are explained, and so are those that the
    engine's integers give, whose kernels round a tie in between to either side.

    In its own arithmetic: an average of codes, a fixed-point sum, a table. Counterfactual: the
    engine's integers give exactly the codes found; float64 on the same converted integers gives
    the prepared model's, and is at most one code away from the codes found. Another op, or a range
    that cuts codes off, is no arithmetic: codes that it moves stay unexplained.
    """

    def explains(self, view: View) -> Tensor | None:
        """Codes that rounding in between, or the engine's own arithmetic, makes."""
        same = _same_bias(view) and not edited(view)
        found = view.owed_to() if same else None
        if found is not None and view.requantized is None:
            found = found & _near(view)
            if not view.weights_differ:
                found = found & view.agrees(view.converted, view.grid, view.expected)
        if view.requantized is None:
            return found
        between = view.agrees(view.requantized, view.target, view.raw)
        return between if found is None else between | found

    def evidence(self, view: View) -> str:
        """Where the converted model rounds."""
        inner = view.recompute.own_inner if view.recompute is not None else {}
        if inner:
            return "; ".join(f"{name!r} is rounded to {q}" for name, q in inner.items())
        call = view.emulated.call if view.emulated is not None else None
        return f"{call.engine}'s own arithmetic of {call.key}" if call is not None else ""


def _same_bias(view: View) -> bool:
    """Whether the converted op has the prepared one's bias: without it, this is another op."""
    pairs = view.recompute.own_weights.values() if view.recompute is not None else ()
    step = min(view.target.scales)
    for pair in pairs:
        biases = pair.mine.bias, pair.theirs.bias
        held = [b if b is not None else torch.zeros(()) for b in biases]
        if float((held[0].detach() - held[1].detach()).abs().max()) > _ROUNDED * step:
            return False
    return True


def _near(view: View) -> Tensor:
    """Codes found that are at most one away from float64 on the converted integers."""
    scale, point = view.places.grid(view.target)
    wanted = (view.converted / scale + point).clamp(view.target.quant_min, view.target.quant_max)
    near = (view.raw.double() - wanted).abs() <= _REACH
    if narrowed(view):
        near &= (view.raw > view.target.quant_min) & (view.raw < view.target.quant_max)
    return near


PLACE = 200
CAUSE = Requantization(
    name="requantization",
    summary="a kernel rounds in between or in its own arithmetic, where no fake-quant does",
    repair="",
    advice="prepare with FX, which observes more ops, or judge by the converted model",
)

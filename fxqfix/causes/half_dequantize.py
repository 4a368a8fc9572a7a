"""half-dequantize: the conversion dequantizes in half precision, which 16-bit codes don't fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxqfix.causes._base import Cause
from fxqfix.dialects._dtypes import HALVES
from fxqfix.evidence.view import View
from fxqfix.passes._shadow_modules import Local

__all__ = ["CAUSE", "HalfDequantize", "in_half"]


@dataclass(frozen=True)
class HalfDequantize(Cause):
    """With `out_dtype`, the decomposed dequantize subtracts the zero point in half precision.

    bfloat16 holds integers of 8 bits, float16 of 11; a fake-quant computes in float32 and rounds
    once. Looks for inputs whose values are others so. Counterfactual: the prepared op, in its own
    arithmetic, on inputs that are dequantized so; the codes that then agree are explained.
    """

    def explains(self, view: View) -> Tensor | None:
        """Codes that the prepared op gives on the inputs that the conversion makes of the codes."""
        if view.local is None or view.recompute is None:
            return None
        inputs = in_half(view.local)
        if inputs is None:
            return None
        value = view.recompute.folded(replace(view.local, inputs=inputs))
        return view.places.quantize(view.places.take(value), view.grid) == view.actual

    def evidence(self, view: View) -> str:
        """How many values of the inputs move."""
        inputs = in_half(view.local) if view.local is not None else None
        pairs = zip(inputs or (), view.local.inputs if view.local is not None else (), strict=False)
        moved = sum(int(torch.count_nonzero(a != b)) for a, b in pairs if isinstance(a, Tensor))
        return f"{moved} values that it reads are rounded to half precision before they are scaled"


def in_half(local: Local) -> tuple[object, ...] | None:
    """The inputs, dequantized in half precision; None where that changes none of them.

    Args:
        local: A shadow's record.
    """
    found, moved = list[object](), False
    for value, pair in zip(local.inputs, local.codes, strict=True):
        if pair is None or not isinstance(value, Tensor) or value.dtype not in HALVES:
            found.append(value)
            continue
        codes, grid = pair
        own = (codes.to(value.dtype) - int(grid.zero_points[0])) * grid.scales[0]
        moved |= not torch.equal(own, value)
        found.append(own)
    return tuple(found) if moved else None


PLACE = 70
CAUSE = HalfDequantize(
    name="half-dequantize",
    summary="the conversion dequantizes in half precision, which 16-bit codes don't fit",
    repair="to_decomposed",
    advice="convert with fxqfix.to_decomposed, which dequantizes such codes in float32",
)

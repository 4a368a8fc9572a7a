"""Activations of one quantized tensor.

Clamps work on the codes. The others are functions of one code, and so tables (see `_lookup`).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxqfix.engines._arithmetic import real, single, to_codes
from fxqfix.engines._base import Call, Exact, kernel
from fxqfix.engines._lookup import Function, Lookup, Rounding, codes_of, vectorized
from fxqfix.qparams import quantize_native

__all__ = ["Clamp"]

_SHARED = ("fbgemm", "onednn")
_ALL = (*_SHARED, "qnnpack")


class Clamp(Exact):
    """Codes held between two codes; the grid stays.

    Args:
        low: Lowest code.
        high: Highest code.
        permutes: Whether a channels-last tensor's memory is taken for a contiguous one's, as
            qnnpack's clamp does.
    """

    def __init__(self, low: int, high: int, permutes: bool = False) -> None:
        super().__init__()
        self.low, self.high, self.permutes = low, high, permutes

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        found = codes.clamp(self.low, self.high)
        if not self.permutes:
            return found
        if not codes.is_contiguous() and codes.is_contiguous(memory_format=torch.channels_last):
            found = found.permute(0, 2, 3, 1)
        return found.reshape(codes.shape).contiguous()

    def extra_repr(self) -> str:
        """The bounds."""
        return f"{self.low}, {self.high}"


def _code(value: float, call: Call) -> int:
    return int(quantize_native(torch.tensor([float(value)]), call.source, call.point_first))


@kernel("relu", engines=_ALL)
def _relu(call: Call) -> nn.Module:
    return Clamp(int(call.source.zero_points[0]), call.source.container[1])


@kernel("relu6", "hardtanh", "clamp", engines=_ALL)
def _clamp(call: Call) -> nn.Module:
    low, high = _bounds(call)
    source = call.source
    if call.engine == "qnnpack" and (low is None or high is None):
        raise call.refuse("its kernel takes no clamp with one bound only")
    codes = (
        source.container[0] if low is None else _code(low, call),
        source.container[1] if high is None else _code(high, call),
    )
    return Clamp(*codes, permutes=call.engine == "qnnpack" and not call.in_memory_order)


def _bounds(call: Call) -> tuple[float | None, float | None]:
    if call.key == "relu6":
        return 0.0, 6.0
    names = ("min_val", "max_val") if call.key == "hardtanh" else ("min", "max")
    defaults = (-1.0, 1.0) if call.key == "hardtanh" else (None, None)
    low, high = (call.option(n, d) for n, d in zip(names, defaults, strict=True))
    return low, high


@kernel("hardswish", engines=_SHARED)
def _hardswish(call: Call) -> nn.Module:
    def function(x: Tensor) -> Tensor:
        return x * (x + 3.0).clamp(0, 6) / 6.0

    return vectorized(call, function, wide=True)


@kernel("hardsigmoid", engines=_SHARED)
def _hardsigmoid(call: Call) -> nn.Module:
    return vectorized(call, lambda x: (x + 3.0).clamp(0, 6) / 6.0)


@kernel("tanh", engines=_SHARED)
def _tanh(call: Call) -> nn.Module:
    call.check_vectors()
    return vectorized(call, torch.tanh)


@kernel("sigmoid", engines=_SHARED)
def _sigmoid(call: Call) -> nn.Module:
    """Its vector body dequantizes as the tail does, and the tail divides in double."""
    x = real(codes_of(call)[0], call.source)
    rounding = Rounding(call, call.grid)
    tail = (1.0 / (1.0 + torch.exp(-x.double()).float().double())).float()
    return Lookup(call, rounding.body(torch.sigmoid(x)), rounding.tail(tail))


@kernel("leaky_relu", engines=_ALL)
def _leaky_relu(call: Call) -> nn.Module:
    slope = float(call.option("negative_slope", 0.01))
    return vectorized(call, functools.partial(F.leaky_relu, negative_slope=slope))


@kernel("elu", "celu", engines=_ALL)
def _elu(call: Call) -> nn.Module:
    alpha = float(call.option("alpha", 1.0))
    # celu(x) is elu with input scale 1 / alpha.
    inner = single(1.0 / alpha) if call.key == "celu" else float(call.option("input_scale", 1.0))
    scale = float(call.option("scale", 1.0)) if call.module is None else 1.0

    def function(x: Tensor) -> Tensor:
        below = torch.expm1(x * single(inner)) * single(single(alpha) * single(scale))
        return torch.where(x >= 0, x * single(scale), below)

    return vectorized(call, function, contiguous=True)


@kernel("threshold", engines=_ALL)
def _threshold(call: Call) -> nn.Module:
    threshold, value = float(call.option("threshold")), float(call.option("value"))
    return vectorized(call, lambda x: torch.where(x > single(threshold), x, single(value)))


@kernel("hardswish", "hardsigmoid", "sigmoid", "tanh", engines=("qnnpack",))
def _table(call: Call) -> nn.Module:
    source, grid = call.source, call.grid
    if call.key == "sigmoid" and grid.scales[0] != 1 / 256:
        raise call.refuse("its kernel takes an output scale of 1/256 only")
    x = real(codes_of(call)[0], source)
    curves: dict[str, Function] = {
        "hardswish": lambda x: x * (x + 3.0).clamp(0, 6) / 6.0,
        "hardsigmoid": lambda x: (x + 3.0).clamp(0, 6) / 6.0,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
    }
    scaled = curves[call.key](x) * single(1.0 / single(grid.scales[0]))
    return Lookup(call, to_codes(torch.round(scaled + int(grid.zero_points[0])), grid))

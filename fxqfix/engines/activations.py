"""Activations of one quantized tensor.

Clamps work on the codes. The others are functions of one code, and so tables of 256 entries: one
for the vector body and one for the scalar tail, which round differently (see `_loops`):

* body: ``x = fma(s, q, f(-(zp * s)))``, the function, ``rne(f(y * f(1/os))) + zo``
* tail: ``x = f(s * (q - zp))``, the function, ``rne(f(f(y * f(1/os)) + zo))``
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxqfix.engines._arithmetic import fma, real, single, to_codes
from fxqfix.engines._base import Call, kernel
from fxqfix.engines._loops import in_tail
from fxqfix.qparams import QParams, quantize_native

__all__ = ["Clamp", "Curve"]

_SHARED = ("fbgemm", "onednn")
_ALL = (*_SHARED, "qnnpack")


class Clamp(nn.Module):
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


def _code(value: float, qparams: QParams) -> int:
    return int(quantize_native(torch.tensor([float(value)]), qparams))


@kernel("relu", engines=_ALL)
def _relu(call: Call) -> nn.Module:
    return Clamp(int(call.source.zero_points[0]), call.source.container[1])


@kernel("relu6", "hardtanh", "clamp", engines=_ALL)
def _clamp(call: Call) -> nn.Module:
    low, high = _bounds(call)
    source = call.source
    codes = (
        source.container[0] if low is None else _code(low, source),
        source.container[1] if high is None else _code(high, source),
    )
    permutes = call.engine == "qnnpack" and source.storage == torch.uint8
    return Clamp(*codes, permutes)


def _bounds(call: Call) -> tuple[float | None, float | None]:
    if call.key == "relu6":
        return 0.0, 6.0
    names = ("min_val", "max_val") if call.key == "hardtanh" else ("min", "max")
    defaults = (-1.0, 1.0) if call.key == "hardtanh" else (None, None)
    low, high = (call.option(n, d) for n, d in zip(names, defaults, strict=True))
    return low, high


class Curve(nn.Module):
    """A function of one code."""

    body: Tensor
    tail: Tensor

    def __init__(self, body: Tensor, tail: Tensor, low: int, contiguous: bool = False) -> None:
        super().__init__()
        self.low, self.contiguous = low, contiguous
        self.register_buffer("body", body)
        self.register_buffer("tail", tail)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        index = codes.int() - self.low
        layout = torch.contiguous_format if self.contiguous else torch.preserve_format
        found = torch.empty_like(codes, dtype=self.body.dtype, memory_format=layout)
        found.copy_(self.body[index])
        if torch.equal(self.body, self.tail):
            return found
        return torch.where(in_tail(found, codes), self.tail[index], found)


_Function = Callable[[Tensor], Tensor]


def _curve(
    call: Call, function: _Function, *, contiguous: bool = False, wide: bool = False
) -> Curve:
    """A curve by the vector/tail rule; `wide`: 1/os is divided in double."""
    source, grid = call.source, call.grid
    low, high = source.container
    codes = torch.arange(low, high + 1)
    scale, step = single(source.scales[0]), grid.scales[0]
    inverse = single(1.0 / (step if wide else single(step)))
    start, point = single(-(source.zero_points[0] * scale)), int(grid.zero_points[0])
    fused = fma(codes.float(), scale, torch.tensor(start))
    body = torch.round(function(fused) * inverse) + point
    tail = torch.round(function(real(codes, source)) * inverse + point)
    return Curve(to_codes(body, grid), to_codes(tail, grid), low, contiguous)


@kernel("hardswish", engines=_SHARED)
def _hardswish(call: Call) -> nn.Module:
    def function(x: Tensor) -> Tensor:
        return x * (x + 3.0).clamp(0, 6) / 6.0

    return _curve(call, function, wide=True)


@kernel("hardsigmoid", engines=_SHARED)
def _hardsigmoid(call: Call) -> nn.Module:
    return _curve(call, lambda x: (x + 3.0).clamp(0, 6) / 6.0)


@kernel("tanh", engines=_SHARED)
def _tanh(call: Call) -> nn.Module:
    return _curve(call, torch.tanh)


@kernel("sigmoid", engines=_SHARED)
def _sigmoid(call: Call) -> nn.Module:
    return _curve(call, torch.sigmoid)


@kernel("leaky_relu", engines=_ALL)
def _leaky_relu(call: Call) -> nn.Module:
    slope = float(call.option("negative_slope", 0.01))
    return _curve(call, functools.partial(F.leaky_relu, negative_slope=slope))


@kernel("elu", "celu", engines=_ALL)
def _elu(call: Call) -> nn.Module:
    alpha = float(call.option("alpha", 1.0))
    # celu(x) is elu with input scale 1 / alpha.
    inner = single(1.0 / alpha) if call.key == "celu" else float(call.option("input_scale", 1.0))
    scale = float(call.option("scale", 1.0)) if call.module is None else 1.0

    def function(x: Tensor) -> Tensor:
        below = torch.expm1(x * single(inner)) * single(single(alpha) * single(scale))
        return torch.where(x >= 0, x * single(scale), below)

    return _curve(call, function, contiguous=True)


@kernel("threshold", engines=_ALL)
def _threshold(call: Call) -> nn.Module:
    threshold, value = float(call.option("threshold")), float(call.option("value"))
    return _curve(call, lambda x: torch.where(x > single(threshold), x, single(value)))


class Table(nn.Module):
    """A function of one code, wherever it stands: qnnpack's own kernels."""

    codes: Tensor

    def __init__(self, codes: Tensor, low: int) -> None:
        super().__init__()
        self.low = low
        self.register_buffer("codes", codes)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        return torch.empty_like(codes).copy_(self.codes[codes.int() - self.low])


@kernel("hardswish", "hardsigmoid", "sigmoid", "tanh", engines=("qnnpack",))
def _table(call: Call) -> nn.Module:
    source, grid = call.source, call.grid
    low, high = source.container
    if call.key == "sigmoid" and grid.scales[0] != 1 / 256:
        raise call.refuse("its kernel takes an output scale of 1/256 only")
    x = real(torch.arange(low, high + 1), source)
    curves: dict[str, _Function] = {
        "hardswish": lambda x: x * (x + 3.0).clamp(0, 6) / 6.0,
        "hardsigmoid": lambda x: (x + 3.0).clamp(0, 6) / 6.0,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
    }
    scaled = curves[call.key](x) * single(1.0 / single(grid.scales[0]))
    return Table(to_codes(torch.round(scaled + int(grid.zero_points[0])), grid), low)

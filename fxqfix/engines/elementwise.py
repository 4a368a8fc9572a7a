"""Add, multiply and cat.

Vector body: ``x = fma(s, q, f(-(zp * s)))``, result ``rne(f(v * f(1/os))) + zo``; scalar tail:
``x = f(s * (q - zp))``, result ``rne(f(f(v * f(1/os)) + zo))``. mul is one formula for both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxqfix.engines._arithmetic import fma, real, single, to_codes
from fxqfix.engines._base import Call, kernel
from fxqfix.engines._loops import in_tail, result_like
from fxqfix.qparams import QParams, quantize_native

__all__ = ["Add", "Mul", "Scalar"]

_SHARED = ("fbgemm", "onednn")


class Add(nn.Module):
    """The sum of two quantized tensors, on the path that fbgemm and onednn share."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.left, self.right = _pair(call)
        self.grid, self.relu = call.grid, call.relu

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Codes in, codes out."""
        inverse = single(1.0 / single(self.grid.scales[0]))
        point = int(self.grid.zero_points[0])
        result = result_like(a, b)
        body = self._relu(_fused(a, self.left) + _fused(b, self.right))
        found = torch.round(body * inverse) + point
        tail = in_tail(result, a, b)
        if bool(tail.any()):
            plain = self._relu(real(a, self.left) + real(b, self.right))
            found = torch.where(tail, torch.round(plain * inverse + point), found)
        return result.copy_(to_codes(found, self.grid))

    def _relu(self, x: Tensor) -> Tensor:
        return x.clamp(min=0) if self.relu else x


def _fused(codes: Tensor, qparams: QParams) -> Tensor:
    scale = single(qparams.scales[0])
    start = single(-(qparams.zero_points[0] * scale))
    return fma(codes.float(), scale, torch.tensor(start, device=codes.device))


def _pair(call: Call) -> tuple[QParams, QParams]:
    if len(call.qparams) != 2 or None in call.qparams:
        raise call.refuse("it takes two quantized tensors")
    left, right = call.qparams
    assert left is not None and right is not None  # noqa: PT018  # just checked
    if left.storage != torch.uint8 and left.storage != torch.int8:
        raise call.refuse(f"its kernel takes no {left.dtype}")
    return left, right


class Mul(nn.Module):
    """``rne(f(f(product of the integers) * f(sa * sb * (1 / so)))) + zo``."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.left, self.right = _pair(call)
        self.grid, self.relu = call.grid, call.relu

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Codes in, codes out."""
        sa, sb, so = (single(q.scales[0]) for q in (self.left, self.right, self.grid))
        multiplier = single(single(sa * sb) * single(1.0 / so))
        x = a.int() - int(self.left.zero_points[0])
        y = b.int() - int(self.right.zero_points[0])
        found = torch.round((x * y).float() * multiplier) + int(self.grid.zero_points[0])
        return result_like(a, b).copy_(to_codes(found, self.grid, relu=self.relu))


class Scalar(nn.Module):
    """Add or multiply by a number: codes stay (or are mirrored), scale and zero point move."""

    def __init__(self, source: QParams, grid: QParams, relu: bool, negative: bool) -> None:
        super().__init__()
        self.source, self.grid, self.relu, self.negative = source, grid, relu, negative

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        found = codes.int()
        if self.negative:
            low, high = self.source.container
            found = high + low - found
        return to_codes(found, self.grid, relu=self.relu)


def _number(call: Call) -> float | None:
    found = call.arguments.get("b")
    return float(found) if isinstance(found, int | float) else None


@kernel("add", "mul", engines=(*_SHARED, "qnnpack"))
def _binary(call: Call) -> nn.Module:
    if len(call.inputs) == 1 and call.output is not None and _number(call) is not None:
        return _scalar(call)
    if call.key == "mul":
        return Mul(call)
    return Qnnadd(call) if call.engine == "qnnpack" and _uint8(call) else Add(call)


def _uint8(call: Call) -> bool:
    return all(q is not None and q.storage == torch.uint8 for q in (*call.qparams, call.output))


class Qnnadd(Add):
    """qnnpack's add of quint8: 22-bit fixed point, rounded half away from zero.

    Broadcasting goes to the shared kernel.
    """

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        so = single(self.grid.scales[0])
        ratios = [torch.tensor(single(q.scales[0])) / so for q in (self.left, self.right)]
        largest = max(float(r) for r in ratios)
        exponent = torch.frexp(torch.tensor(largest)).exponent.item() - 1
        self.shift = int(21 - exponent)
        self.factors = [int(torch.round(r.double() * 2.0**self.shift)) for r in ratios]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Codes in, codes out."""
        if a.shape != b.shape:
            return super().forward(a, b)
        x = (a.long() - int(self.left.zero_points[0])) * self.factors[0]
        y = (b.long() - int(self.right.zero_points[0])) * self.factors[1]
        total = x + y
        half = 1 << (self.shift - 1)
        away = torch.sign(total) * ((total.abs() + half) >> self.shift)
        found = away + int(self.grid.zero_points[0])
        return result_like(a, b).copy_(to_codes(found, self.grid, relu=self.relu))


@kernel("add_scalar", "mul_scalar", engines=(*_SHARED, "qnnpack"))
def _scalar(call: Call) -> nn.Module:
    number = _number(call)
    if number is None:
        raise call.refuse("its number is not a constant")
    negative = call.key.startswith("mul") and number < 0
    return Scalar(call.source, call.grid, call.relu, negative)


class Cat(nn.Module):
    """Values of several grids on one.

    Channels-last and along the channels: vector body and scalar tail of each input's channels;
    else dequantized, joined and quantized anew.
    """

    def __init__(self, sources: tuple[QParams, ...], grid: QParams, dim: int, relu: bool) -> None:
        super().__init__()
        self.sources, self.grid, self.dim, self.relu = sources, grid, dim, relu

    def forward(self, *codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        dim = self.dim % codes[0].dim()
        last = torch.channels_last
        image = codes[0].dim() == 4 and dim == 1
        if image and all(c.is_contiguous(memory_format=last) for c in codes):
            parts = [self._channels(c, q) for c, q in zip(codes, self.sources, strict=True)]
            return torch.cat(parts, 1).contiguous(memory_format=last)
        values = [real(c, q) for c, q in zip(codes, self.sources, strict=True)]
        joined = torch.cat(values, dim)
        joined = joined.clamp(min=0) if self.relu else joined
        return quantize_native(joined, self.grid).to(self.grid.storage)

    def _channels(self, codes: Tensor, source: QParams) -> Tensor:
        if source.same_grid(self.grid) and not self.relu:
            return codes
        inverse = single(1.0 / single(self.grid.scales[0]))
        point = int(self.grid.zero_points[0])
        fused, plain = _fused(codes, source), real(codes, source)
        if self.relu:
            fused, plain = fused.clamp(min=0), plain.clamp(min=0)
        found = torch.round(fused * inverse) + point
        tail = torch.round(plain * inverse + point)
        channel = torch.arange(codes.shape[1], device=codes.device).reshape(1, -1, 1, 1)
        return to_codes(torch.where(channel < codes.shape[1] // 8 * 8, found, tail), self.grid)


@kernel("cat", engines=(*_SHARED, "qnnpack"))
def _cat(call: Call) -> nn.Module:
    sources = tuple(q for q in call.qparams if q is not None)
    if len(sources) != len(call.inputs):
        raise call.refuse("one of its inputs is not quantized")
    return Cat(sources, call.grid, int(call.option("dim", 0)), call.relu)

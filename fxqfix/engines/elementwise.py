"""Add, multiply and cat: functions of one or two codes (see `_lookup`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxqfix.engines._arithmetic import real, single, to_codes
from fxqfix.engines._base import Call, Exact, kernel
from fxqfix.engines._lookup import Lookup, Rounding, codes_of, fused, select, vectorized
from fxqfix.qparams import QParams, quantize_native

__all__ = ["Cat", "Qnnadd", "Stack"]

_ALL = ("fbgemm", "onednn", "qnnpack")


@kernel("add", "mul", engines=_ALL)
def _binary(call: Call) -> nn.Module:
    if len(call.inputs) == 1:
        return _scalar(call)
    if len(call.inputs) != 2:
        raise call.refuse("it takes two quantized tensors")
    if call.key == "mul":
        return Lookup(call, _product(call))
    shared = vectorized(call, torch.add, count=2)
    return Qnnadd(call, shared) if call.engine == "qnnpack" else shared


def _centered(call: Call) -> list[Tensor]:
    """``q - z`` of two inputs, int64."""
    points = (int(call.grid_of(index).zero_points[0]) for index in (0, 1))
    return [codes - point for codes, point in zip(codes_of(call, 2), points, strict=True)]


def _product(call: Call) -> Tensor:
    """``rne(f(f(product of the integers) * f(sa * sb * (1 / so)))) + zo``."""
    x, y = _centered(call)
    sa, sb, so = (single(q.scales[0]) for q in (call.grid_of(0), call.grid_of(1), call.grid))
    multiplier = single(single(sa * sb) * single(1.0 / so))
    found = torch.round((x * y).float() * multiplier) + int(call.grid.zero_points[0])
    return to_codes(found, call.grid, relu=call.relu)


class Qnnadd(Exact):
    """qnnpack's add of quint8: 22-bit fixed point, rounded half away from zero.

    Broadcasting goes to the shared kernel.
    """

    def __init__(self, call: Call, shared: Lookup) -> None:
        super().__init__()
        self.shared, self.own = shared, Lookup(call, _fixed_point_sum(call))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Codes in, codes out."""
        found: Tensor = (self.own if a.shape == b.shape else self.shared)(a, b)
        return found


def _fixed_point_sum(call: Call) -> Tensor:
    so = torch.tensor(single(call.grid.scales[0]))
    ratios = [torch.tensor(single(call.grid_of(i).scales[0])) / so for i in (0, 1)]
    exponent = torch.frexp(torch.stack(ratios).max()).exponent.item() - 1
    shift = int(21 - exponent)
    factors = [int(torch.round(r.double() * 2.0**shift)) for r in ratios]
    x, y = _centered(call)
    total = x * factors[0] + y * factors[1]
    away = torch.sign(total) * ((total.abs() + (1 << (shift - 1))) >> shift)
    return to_codes(away + int(call.grid.zero_points[0]), call.grid, relu=call.relu)


@kernel("add_scalar", "mul_scalar", engines=_ALL)
def _scalar(call: Call) -> nn.Module:
    number = call.arguments.get("b", call.arguments.get("other"))
    if not isinstance(number, int | float):
        raise call.refuse("its number is not a constant")
    make = _plus if call.key.startswith("add") else _times
    found = make(call, codes_of(call)[0], float(number))
    return Lookup(call, to_codes(found, call.grid, relu=call.relu))


def _plus(call: Call, codes: Tensor, number: float) -> Tensor:
    """``rne(f((q - z + rne(c / s)) * m)) + z'`` with ``m = f(s * f(1 / s'))``.

    Codes stay and the zero point moves, as long as it stays in the container; else the grid widens.
    """
    source, grid = call.source, call.grid
    steps = round(number / source.scales[0]) - int(source.zero_points[0])
    multiplier = single(single(source.scales[0]) * single(1.0 / single(grid.scales[0])))
    return torch.round((codes + steps).float() * multiplier) + int(grid.zero_points[0])


def _times(call: Call, codes: Tensor, number: float) -> Tensor:
    """Codes stay, are mirrored by a negative number, and are all the zero point for 0."""
    if number == 0:
        return torch.full_like(codes, int(call.grid.zero_points[0]))
    return sum(call.source.container) - codes if number < 0 else codes


class Cat(Exact):
    """Values of several grids on one: a table of codes for each input.

    Channels-last and along the channels: body and tail of each input's channels, and codes of the
    result's own grid are copied; else dequantized, joined and quantized anew.
    """

    tables: Tensor

    def __init__(self, call: Call, sources: tuple[QParams, ...], dim: int) -> None:
        super().__init__()
        self.dim, self.lows = dim, [q.container[0] for q in sources]
        tables = [self._tables(call, q) for q in sources]
        self.register_buffer("tables", torch.stack(tables))

    @staticmethod
    def _tables(call: Call, source: QParams) -> Tensor:
        """Rows: vector body, scalar tail, quantized anew; a column per code."""
        low, high = source.container
        if high - low != 255:
            raise call.refuse(f"its kernel takes no {source.dtype}")
        codes = torch.arange(low, high + 1)
        rounding = Rounding(call, call.grid)
        plain = real(codes, source)
        body = plain if call.scalar else fused(codes, source)
        if call.relu:
            body, plain = body.clamp(min=0), plain.clamp(min=0)
        anew = quantize_native(plain, call.grid, call.point_first).to(call.grid.storage)
        if source.same_grid(call.grid) and not call.relu:
            return torch.stack([codes.to(anew.dtype), codes.to(anew.dtype), anew])
        return torch.stack([rounding.body(body), rounding.tail(plain), anew])

    def forward(self, *codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        dim, last = self.dim % codes[0].dim(), torch.channels_last
        image = codes[0].dim() == 4 and dim == 1
        if not image or not all(c.is_contiguous(memory_format=last) for c in codes):
            whole = zip(self.tables, codes, self.lows, strict=True)
            return torch.cat([select(t[2], c, low) for t, c, low in whole], dim)
        parts = []
        for tables, given, low in zip(self.tables, codes, self.lows, strict=True):
            vectors = given.shape[1] // 8 * 8
            parts.append(select(tables[0], given[:, :vectors], low))
            parts.append(select(tables[1], given[:, vectors:], low))
        return torch.cat(parts, 1).contiguous(memory_format=last)


class Stack(Cat):
    """torch.stack is torch.cat along a new dimension."""

    def forward(self, *codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        dim = self.dim % (codes[0].dim() + 1)
        found = [select(t[2], c, n) for t, c, n in zip(self.tables, codes, self.lows, strict=True)]
        return torch.stack(found, dim)


@kernel("cat", "stack", engines=_ALL)
def _cat(call: Call) -> nn.Module:
    sources = tuple(q for q in call.qparams if q is not None)
    if len(sources) != len(call.inputs):
        raise call.refuse("one of its inputs is not quantized")
    return (Cat if call.key == "cat" else Stack)(call, sources, int(call.option("dim", 0)))

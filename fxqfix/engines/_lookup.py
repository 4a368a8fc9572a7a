"""A function of one or two codes is a table of 256 or 65,536 codes, made once.

Element-wise kernels have a vector body and a scalar tail that round differently:

* body: ``x = fma(s, q, f(-(zp * s)))``, the function, ``rne(f(y * f(1/os))) + zo``
* tail: ``x = f(s * (q - zp))``, the function, ``rne(f(f(y * f(1/os)) + zo))``; where native
  quantize adds the zero point behind the rounding (`Call.point_first`), as in the body

Where ATen runs scalar code, the body has the tail's ``x``, quantized as ``quantize_per_tensor``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxqfix.engines._arithmetic import fma, real, single, to_codes
from fxqfix.engines._base import Call, Exact
from fxqfix.engines._loops import result_like, tail_positions
from fxqfix.qparams import QParams, quantize_native, round_native

__all__ = ["Lookup", "Rounding", "codes_of", "fused", "select", "vectorized"]

Function = Callable[..., Tensor]


class Lookup(Exact):
    """A function of codes, by its tables.

    Args:
        call: The op; its inputs' grids say which codes there are.
        body: Result for each code, (256,), or for each pair of codes, (256, 256).
        tail: The same for elements of the scalar tail; None where it is `body`.
        contiguous: Whether the kernel gives a contiguous result whatever it takes.
    """

    body: Tensor
    tail: Tensor | None

    def __init__(
        self, call: Call, body: Tensor, tail: Tensor | None = None, *, contiguous: bool = False
    ) -> None:
        super().__init__()
        self.lows = [q.container[0] for q in call.qparams if q is not None]
        self.contiguous, self.threads = contiguous, call.threads
        same = tail is None or torch.equal(body, tail)
        self.register_buffer("body", body.flatten())
        self.register_buffer("tail", None if same or tail is None else tail.flatten())

    def forward(self, *codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        index = result_like(*codes, dtype=torch.int32)
        index = index.contiguous() if self.contiguous else index
        index.copy_(codes[0]).sub_(self.lows[0])
        for other, low in zip(codes[1:], self.lows[1:], strict=True):
            index.mul_(256).add_(other.to(torch.int32) - low)
        found = torch.empty_like(index, dtype=self.body.dtype)
        steps, into = (t.as_strided((t.numel(),), (1,)) for t in (index, found))
        torch.index_select(self.body, 0, steps, out=into)
        if self.tail is not None:
            where = tail_positions(found, *codes, threads=self.threads)
            into[where] = torch.index_select(self.tail, 0, steps[where])
        return found


def codes_of(call: Call, count: int = 1) -> list[Tensor]:
    """All codes of each of `count` inputs, shaped so that they broadcast to all pairs.

    Raises:
        UnsupportedError: An input is not quantized to 8 bits.
    """
    found = []
    for index in range(count):
        source = call.grid_of(index)
        low, high = source.container
        if high - low != 255:
            raise call.refuse(f"its kernel takes no {source.dtype}")
        found.append(torch.arange(low, high + 1).reshape([-1] + [1] * (count - 1 - index)))
    return found


def fused(codes: Tensor, source: QParams) -> Tensor:
    """Float values as the vector body has them."""
    scale = single(source.scales[0])
    return fma(codes.float(), scale, single(-(source.zero_points[0] * scale)))


class Rounding:
    """From float values to the codes of a grid.

    Args:
        call: The op.
        grid: The grid of the result.
        wide: Whether 1/os is divided in double.
    """

    def __init__(self, call: Call, grid: QParams, *, wide: bool = False) -> None:
        self.grid, self.point = grid, int(grid.zero_points[0])
        self.point_first, self.scalar = call.point_first, call.scalar
        self.inverse = single(1.0 / (grid.scales[0] if wide else single(grid.scales[0])))

    def body(self, y: Tensor) -> Tensor:
        """The zero point is added to whole numbers; scalar code quantizes as torch does."""
        if self.scalar:
            return quantize_native(y, self.grid, self.point_first).to(self.grid.storage)
        return to_codes(torch.round(y * self.inverse) + self.point, self.grid)

    def tail(self, y: Tensor) -> Tensor:
        """The zero point is added before the rounding, by some builds of torch."""
        return to_codes(round_native(y * self.inverse, self.point, self.point_first), self.grid)


def vectorized(
    call: Call,
    function: Function,
    *,
    count: int = 1,
    contiguous: bool = False,
    wide: bool = False,
) -> Lookup:
    """A function of the float values of `count` inputs, by the rule of body and tail.

    A fused relu works on the float values.
    """
    rounding = Rounding(call, call.grid, wide=wide)
    codes = codes_of(call, count)
    sources = [call.grid_of(index) for index in range(count)]

    def values(reals: Callable[[Tensor, QParams], Tensor]) -> Tensor:
        y = function(*(reals(c, q) for c, q in zip(codes, sources, strict=True)))
        return y.clamp(min=0) if call.relu else y

    tail = rounding.tail(values(real))
    body = rounding.body(values(real if call.scalar else fused))
    return Lookup(call, body, tail, contiguous=contiguous)


def select(table: Tensor, codes: Tensor, low: int) -> Tensor:
    """`table[codes - low]`, laid out as an element-wise op does it."""
    index = codes.to(torch.int32) - low
    found = torch.empty_like(index, dtype=table.dtype)
    steps, into = (t.as_strided((t.numel(),), (1,)) for t in (index, found))
    torch.index_select(table, 0, steps, out=into)
    return found

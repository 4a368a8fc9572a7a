"""From exact sums to codes: each engine's own roundings (measured).

``A = f(acc)`` is the exact sum, ``xs, ws, os`` the scales of input, weight and output, ``b`` the
float bias.

* fbgemm: ``rne(f(v * m)) + zo`` with ``m = f(f(xs * ws) / os)``. v is A; with a bias
  ``f(A + f(b / f(xs * ws)))`` per channel, ``fma(b, f(1 / f(xs * ws)), A)`` per tensor.
* onednn: ``rne(f(f(p * O) + zo))``, relu on p. The scales are inverted on their way to oneDNN and
  back: ``X = f(1 / f(1 / xs))`` and ``O = f(1 / f(1 / f(1 / os)))``, the innermost in double.
  ``W = f(ws)`` in convolutions; in linear ``f(1 / f(1 / ws))``, with ws rounded to float32 first
  where it is per channel. p is ``f(f(A * f(X * W)) + b)`` or ``f(f(f(A * X) * W) + b)``, and the
  reference code divides by ``f(1 / f(1 / os))``: which, is in the rows of `onednn`.
* qnnpack: ``rne(f(f(acc + bi) * m)) + zo``; the bias is an int32, ``bi = rne(b * f(1 / f(xs *
  ws)))`` with xs in double, and ``m = f(f(ws * xs) * f(1 / os))``.

Where fbgemm's and qnnpack's products leave int32, the code is the lowest one, on either side.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fxqfix.engines._accumulate import EXACT, Accumulator
from fxqfix.engines._arithmetic import fma, to_codes
from fxqfix.engines._base import Call, Exact
from fxqfix.engines._layout import laid_out
from fxqfix.engines._lost import Lost
from fxqfix.engines.onednn import ROWS, Kernels

__all__ = ["Fbgemm", "Onednn", "Qnnpack", "Weighted"]

_INT32 = 2**31 - 1


class Weighted(Exact, ABC):
    """An op with a weight; subclasses requantize.

    Attributes:
        accumulate: Makes the exact sums.
        lost: What the sums lose to saturation, or None.
        without: An effect to leave out, by the name of its cause, to tell what it does; "".
        bias: The float bias, shaped to broadcast, or None.
    """

    bias: Tensor | None
    without = ""

    def __init__(
        self, call: Call, accumulate: Accumulator, dims: int, lost: Lost | None = None
    ) -> None:
        super().__init__()
        if call.weight is None:
            raise call.refuse("its weight can't be read")
        self.accumulate, self.lost, self.dims = accumulate, lost, dims
        self.key, self.relu, self.grid = call.key, call.relu, call.grid
        self.point = int(call.grid.zero_points[0])
        self.per_channel = call.weight.qparams.axis is not None
        shape = [-1] + [1] * dims
        scale = torch.tensor(call.weight.qparams.scales, dtype=torch.float64)
        scale = scale.reshape(shape) if self.per_channel else scale
        bias = call.weight.bias
        self.register_buffer("bias", None if bias is None else bias.detach().reshape(shape))
        self.prepare(_double(call.source.scales[0]), scale, _double(call.grid.scales[0]))
        if accumulate.bound + self.largest_bias() > _INT32:
            raise call.refuse("its sums may overflow int32, where the kernel wraps around")

    @abstractmethod
    def prepare(self, xs: Tensor, ws: Tensor, os: Tensor) -> None:
        """Compute what the requantization needs, of scales in float64."""

    def reach(self, steps: Tensor, multiplier: Tensor) -> float:
        """Upper bound of what is rounded, from biases in steps of the accumulator; inf for NaN."""
        sums = 3 * self.accumulate.bound + float(steps.abs().max()) if steps.numel() else 0.0
        found = sums * float(multiplier.max()) if multiplier.numel() else 0.0
        return found if found < math.inf else math.inf

    def largest_bias(self) -> int:
        """The largest integer that is added to the sums before they become floats."""
        return 0

    def has(self, effect: str) -> bool:
        """Whether the kernel has an effect, by the name of its cause, that `without` leaves out."""
        return effect == "int16-saturation" and self.lost is not None

    @abstractmethod
    def scaled(self, sums: Tensor, *others: Tensor) -> Tensor:
        """What is rounded, in steps of the output, of exact sums, which it uses up."""

    @abstractmethod
    def requantize(self, sums: Tensor, *others: Tensor) -> Tensor:
        """Whole numbers, not clamped yet, of exact sums in float32 or float64, which it uses up."""

    def sums(self, codes: Tensor) -> Tensor:
        """Sums as the kernel has them before pairs saturate."""
        found: Tensor = self.accumulate(codes)
        return found

    def forward(self, codes: Tensor, *others: Tensor) -> Tensor:
        """Codes in, codes out."""
        sums = self.sums(codes)
        lost = self.lost if self.without != "int16-saturation" else None
        if lost is not None and lost.may_lose(codes):
            # In float32 only where sums, and what they lose of raw codes, stay exact.
            sums = sums.double() if 3 * self.accumulate.bound >= EXACT else sums
            sums = sums.sub_(lost(codes).to(sums.dtype))
        found = to_codes(self.requantize(sums, *others), self.grid, relu=self.relu)
        return laid_out(found, self.dims)


class Fbgemm(Weighted):
    """``rne(f(v * m)) + zo``; see the module's docstring."""

    multiplier: Tensor
    added: Tensor | None

    def prepare(self, xs: Tensor, ws: Tensor, os: Tensor) -> None:
        """Multiplier, and the bias in units of the accumulator."""
        step = xs.float() * ws.float()
        self.register_buffer("multiplier", step / os.float())
        added = None
        if self.bias is not None:
            added = self.bias / step if self.per_channel else 1.0 / step
        self.register_buffer("added", added)
        steps = torch.zeros(1) if self.bias is None else self.bias / step
        self.largest = self.reach(steps, self.multiplier)

    def scaled(self, sums: Tensor, *others: Tensor) -> Tensor:
        """One rounding per step, as in fbgemm's output processing."""
        v = sums.float()
        if self.added is not None and self.bias is not None:
            v = v.add_(self.added) if self.per_channel else fma(self.bias, self.added, v)
        return v.mul_(self.multiplier)

    def requantize(self, sums: Tensor, *others: Tensor) -> Tensor:
        """Rounded, then the zero point."""
        return _shifted(_whole(self.scaled(sums), self.largest), self.point)


class Onednn(Weighted):
    """``rne(f(f(p * O) + zo))``; see the module's docstring."""

    factor: Tensor
    scale: Tensor
    both: Tensor
    output_scale: Tensor
    inverse: Tensor

    def __init__(
        self, call: Call, accumulate: Accumulator, dims: int, lost: Lost | None = None
    ) -> None:
        super().__init__(call, accumulate, dims, lost)
        self.kernels = Kernels(call)
        self.row = ROWS[0]

    def forward(self, codes: Tensor, *others: Tensor) -> Tensor:
        """Codes in, codes out; which kernel runs depends on the size."""
        self.row = self.kernels.row(codes)
        return super().forward(codes, *others)

    def sums(self, codes: Tensor) -> Tensor:
        """Of tiles with their own rounding."""
        if self.row.tiles and self.accumulate.rounds_in_tiles:
            return self.accumulate.in_tiles(codes)
        return super().sums(codes)

    def prepare(self, xs: Tensor, ws: Tensor, os: Tensor) -> None:
        """The scales as ideep hands them on, each inverted there and back."""
        factor, scale = 1.0 / (1.0 / xs).float(), ws.float()
        if self.key.startswith("linear"):
            scale = 1.0 / (1.0 / (scale if self.per_channel else ws)).float()
        self.register_buffer("factor", factor)
        self.register_buffer("scale", scale)
        self.register_buffer("both", factor * scale)
        self.register_buffer("output_scale", 1.0 / (1.0 / os).float())
        self.register_buffer("inverse", 1.0 / self.output_scale)

    def scaled(self, sums: Tensor, *others: Tensor) -> Tensor:
        """Float values first, as oneDNN's post-ops compute them."""
        p = sums.float()
        if self.row.scales == "joined":
            p.mul_(self.both)
        else:
            p.mul_(self.factor).mul_(self.scale)
        if self.bias is not None:
            p.add_(self.bias)
        p = self.post(p, *others)
        if self.row.scales == "reference":
            p.div_(self.output_scale)
        else:
            p.mul_(self.inverse)
        return p

    def requantize(self, sums: Tensor, *others: Tensor) -> Tensor:
        """The zero point is added before the rounding."""
        return _shifted(self.scaled(sums, *others), self.point).round_()

    def post(self, p: Tensor, *others: Tensor) -> Tensor:
        """What is fused behind; a relu is the clamp of the codes to the zero point and above."""
        return p


class Qnnpack(Weighted):
    """``rne(f(f(acc + bi) * m)) + zo``; see the module's docstring."""

    multiplier: Tensor
    steps: Tensor | None

    def prepare(self, xs: Tensor, ws: Tensor, os: Tensor) -> None:
        """Multiplier, and the bias in steps of the accumulator, not rounded yet."""
        step = ws.float() * xs.float()
        self.register_buffer("multiplier", step * (1.0 / os.float()))
        inverse = 1.0 / (ws.float().double() * xs).float()
        self.register_buffer("steps", None if self.bias is None else self.bias * inverse)
        self.largest = self.reach(
            torch.zeros(1) if self.steps is None else self.steps, self.multiplier
        )
        self.narrow = self.accumulate.bound + self.largest_bias() < EXACT  # fits float32

    @property
    def bias_error(self) -> Tensor:
        """How far rounding moves each bias, in codes of the output."""
        if self.steps is None:
            return torch.zeros_like(self.multiplier)
        return (self.steps - torch.round(self.steps)).abs() * self.multiplier

    def largest_bias(self) -> int:
        """That of the int32 bias."""
        if self.steps is None or not self.steps.numel():
            return 0
        largest = float(self.steps.abs().max())
        return int(largest) if largest <= _INT32 else _INT32 + 1  # also NaN

    def has(self, effect: str) -> bool:
        """The bias is rounded too."""
        return super().has(effect) or (effect == "bias-int32" and self.steps is not None)

    def scaled(self, sums: Tensor, *others: Tensor) -> Tensor:
        """The bias is added to the integers, before they become float32."""
        if self.steps is not None:
            exact = self.without == "bias-int32"
            sums = sums if self.narrow and not exact else sums.double()
            sums.add_(self.steps if exact else torch.round(self.steps))
        return sums.float().mul_(self.multiplier)

    def requantize(self, sums: Tensor, *others: Tensor) -> Tensor:
        """Rounded, then the zero point."""
        return _shifted(_whole(self.scaled(sums), self.largest), self.point)


def _whole(value: Tensor, largest: float) -> Tensor:
    """Rounded to int32 as x86 does it: what does not fit, on either side, is the lowest.

    Args:
        value: What to round.
        largest: Upper bound of it, in absolute value: most ops need not look.
    """
    if largest >= 2.0**30:
        value = torch.where(value < 2.0**31, value, -(2.0**31))
    return value.round_()


def _shifted(value: Tensor, point: int) -> Tensor:
    """With the zero point added, in place."""
    return value.add_(point) if point else value


def _double(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)

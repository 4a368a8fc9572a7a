"""Convolution and linear: exact integer sums, then each engine's own requantization."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxqfix.engines._accumulate import Accumulator
from fxqfix.engines._arithmetic import fma, to_codes
from fxqfix.engines._base import Call, kernel

__all__ = ["Weighted"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Weighted(nn.Module):
    """An op with a weight; subclasses requantize.

    Attributes:
        accumulate: Makes the exact sums.
        sources: Scale of the input, per-channel scales of the weight, scale of the output; float32.
        bias: The float bias, shaped to broadcast, or None.
    """

    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, call: Call, accumulate: nn.Module, dims: int) -> None:
        super().__init__()
        if call.weight is None:
            raise call.refuse("its weight can't be read")
        self.accumulate, self.relu, self.grid = accumulate, call.relu, call.grid
        self.per_channel = call.weight.qparams.axis is not None
        self.input_scale, self.output_scale = call.source.scales[0], call.grid.scales[0]
        self.key = call.key
        shape = [-1] + [1] * dims
        scale = torch.tensor(call.weight.qparams.scales, dtype=torch.float32)
        self.register_buffer("weight_scale", scale.reshape(shape) if self.per_channel else scale)
        bias = call.weight.bias
        self.register_buffer("bias", None if bias is None else bias.detach().reshape(shape))
        self.prepare(_f(self.input_scale), self.weight_scale, _f(self.output_scale))

    def prepare(self, xs: Tensor, ws: Tensor, os: Tensor) -> None:
        """Compute what the requantization needs, in float32 as the kernel does."""
        raise NotImplementedError

    def requantize(self, sums: Tensor) -> Tensor:
        """Whole numbers, not yet clamped, of exact sums in float32 or float64."""
        raise NotImplementedError

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        found = to_codes(self.requantize(self.accumulate(codes)), self.grid, relu=self.relu)
        layout = _CHANNELS_LAST.get(found.dim())
        return found if layout is None else found.contiguous(memory_format=layout)


class Fbgemm(Weighted):
    """``rne(f(v * m)) + zo`` with ``m = f(f(xs * ws) / os)``, all in float32.

    v is the sum; with a bias ``f(A + f(b / f(xs * ws)))`` per channel, and
    ``fma(b, f(1 / f(xs * ws)), A)`` per tensor.
    """

    multiplier: Tensor
    added: Tensor | None

    def prepare(self, xs: Tensor, ws: Tensor, os: Tensor) -> None:
        """Multiplier, and the bias in units of the accumulator."""
        step = xs * ws
        self.register_buffer("multiplier", step / os)
        added = None
        if self.bias is not None:
            added = self.bias / step if self.per_channel else 1.0 / step
        self.register_buffer("added", added)

    def requantize(self, sums: Tensor) -> Tensor:
        """One rounding per step, as in fbgemm's output processing."""
        v = sums.float()
        if self.added is not None and self.bias is not None:
            v = v + self.added if self.per_channel else fma(self.bias, self.added, v)
        return (v * self.multiplier).round_().add_(int(self.grid.zero_points[0]))


class Onednn(Weighted):
    """``rne(f(f(p * O) + zo))`` with ``p = f(f(f(A * X) * W) + b)``, relu on p."""

    factor: Tensor
    scale: Tensor
    inverse: Tensor

    def prepare(self, xs: Tensor, ws: Tensor, os: Tensor) -> None:
        """The scales as ideep hands them on, each inverted there and back."""
        self.register_buffer("factor", 1.0 / (1.0 / xs))
        self.register_buffer("scale", 1.0 / (1.0 / ws) if self.key.startswith("linear") else ws)
        self.register_buffer("inverse", 1.0 / os)

    def requantize(self, sums: Tensor) -> Tensor:
        """Float values first, as oneDNN's post-ops compute them."""
        p = (sums.float() * self.factor) * self.scale
        if self.bias is not None:
            p = p + self.bias
        if self.relu:
            p = p.clamp_(min=0)
        return (p * self.inverse).add_(int(self.grid.zero_points[0])).round_()


class Qnnpack(Weighted):
    """``rne(f(f(acc + bi) * m)) + zo``; the bias is an int32, ``bi = rne(b * f(1 / f(xs * ws)))``.

    ``m = f(f(ws * xs) * f(1 / os))``.
    """

    multiplier: Tensor
    bias_int32: Tensor | None

    def prepare(self, xs: Tensor, ws: Tensor, os: Tensor) -> None:
        """Multiplier and integer bias."""
        step = ws * xs
        self.register_buffer("multiplier", step * (1.0 / os))
        bias = None if self.bias is None else torch.round(self.bias * (1.0 / step)).double()
        self.register_buffer("bias_int32", bias)

    def requantize(self, sums: Tensor) -> Tensor:
        """The bias is added to the integers, before they become float32."""
        if self.bias_int32 is not None:
            sums = sums.double() + self.bias_int32
        return (sums.float() * self.multiplier).round_().add_(int(self.grid.zero_points[0]))


_ENGINE: dict[str, type[Weighted]] = {"fbgemm": Fbgemm, "onednn": Onednn, "qnnpack": Qnnpack}


def _f(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def integer_weight(call: Call) -> Tensor:
    """The weight's codes with their zero points taken off, int32."""
    if call.weight is None:
        raise call.refuse("its weight can't be read")
    codes, qparams = call.weight.codes.to(torch.int32), call.weight.qparams
    if any(float(z) % 1 for z in qparams.zero_points):
        raise call.refuse("zero points of its weight are not whole")
    points = torch.tensor(qparams.zero_points, dtype=torch.int32)
    if qparams.axis is None:
        return codes - points
    shape = [1] * codes.dim()
    shape[qparams.axis] = -1
    return codes - points.reshape(shape)


def _options(call: Call, dims: int) -> dict[str, Any]:
    """Groups, and stride, padding, dilation of the last `dims` axes: a packed conv1d has two."""
    found: dict[str, Any] = {"groups": call.option("groups", 1)}
    for name in ("stride", "padding", "dilation"):
        value = call.option(name)
        found[name] = list(value)[-dims:] if isinstance(value, list | tuple) else value
    return found


@kernel("linear", engines=("fbgemm", "onednn", "qnnpack"))
def _linear(call: Call) -> nn.Module:
    weight = integer_weight(call)
    accumulate = Accumulator(F.linear, weight, call.source, input_axis=-1)
    return _ENGINE[call.engine](call, accumulate, 0)


@kernel("conv1d", "conv2d", "conv3d", engines=("fbgemm", "onednn", "qnnpack"))
def _conv(call: Call) -> nn.Module:
    dims = int(call.key[-2])
    weight, options = integer_weight(call), _options(call, dims)
    if call.option("padding_mode", "zeros") != "zeros":
        raise call.refuse(f"padding mode {call.option('padding_mode')!r}")
    function = functools.partial(_CONV[dims], **options)
    split = 1 if options["groups"] == 1 else None
    accumulate = Accumulator(function, weight, call.source, channels=split)
    return _ENGINE[call.engine](call, accumulate, dims)

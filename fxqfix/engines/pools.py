"""Pools. ``S = sum (q - zp)``, ``SQ = sum q``, n the divisor, ``m = f(1/n)``, ``i2 = f(1/m)``.

A maximum of codes is exact anywhere. Averages: channels-last images are summed in vectors of
channels, which round in another way than the channels that are left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxqfix.engines._arithmetic import real, single, to_codes
from fxqfix.engines._base import Call, Exact, kernel
from fxqfix.engines._layout import laid_out, passes_for_last, stored, suggested_format
from fxqfix.qparams import QParams, quantize_native, round_native

__all__ = [
    "AVERAGE",
    "AveragePool2d",
    "MaxPool",
    "QnnAveragePool2d",
    "as_qnnpack",
    "divisors_of",
    "lanes_of",
    "mixed",
    "options_of",
    "qnnpack_multiplier",
    "sums_of",
]

_SHARED = ("fbgemm", "onednn")
_ALL = (*_SHARED, "qnnpack")
_AVERAGES: dict[int, Callable[..., Any]] = {3: F.avg_pool2d, 4: F.avg_pool2d, 5: F.avg_pool3d}
_MAX: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class MaxPool(Exact):
    """The largest code of each window."""

    def __init__(self, dims: int, options: dict[str, Any], qnnpack: bool) -> None:
        super().__init__()
        self.dims, self.options, self.qnnpack = dims, options, qnnpack

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        found: Tensor = _MAX[self.dims](codes.float(), **self.options)
        found = found.to(torch.int32).to(codes.dtype)  # two casts that are vectorized on the CPU
        return as_qnnpack(found, codes) if self.qnnpack else found


def as_qnnpack(found: Tensor, codes: Tensor) -> Tensor:
    """In qnnpack's layout: channels-last, then as the input lies."""
    if found.dim() != 4:
        return found.contiguous()
    return laid_out(found, 2).contiguous(memory_format=suggested_format(codes))


def options_of(call: Call, *names: str) -> dict[str, Any]:
    """The options of a pool that are given."""
    found = {name: call.option(name) for name in names}
    return {name: value for name, value in found.items() if value is not None and value != []}


@kernel("max_pool1d", "max_pool2d", "max_pool3d", engines=_ALL)
def _max_pool(call: Call) -> nn.Module:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    qnnpack = call.engine == "qnnpack" and not call.option("ceil_mode")
    return MaxPool(call.spec.dims, options_of(call, *names), qnnpack)


def lanes_of(call: Call) -> int:
    """How many floats a register holds; scalar code has none."""
    return {"avx512": 16, "avx2": 8, "default": 1 << 62}[call.isa.aten]


def mixed(body: Tensor, tail: Tensor, lanes: int) -> Tensor:
    """Channels in whole vectors from `body`, the rest from `tail`."""
    channels = body.shape[1]
    channel = torch.arange(channels, device=body.device).reshape(-1, *(1 for _ in body.shape[2:]))
    return torch.where(channel < channels // lanes * lanes, body, tail)


class AveragePool2d(Exact):
    """avg_pool2d of the shared kernels: contiguous ``rne(f(f(S * m) + zp))``.

    Channels-last ``rne(f(S * m)) + zp`` in whole vectors, ``rne(f(f(S * i2) + zp))`` behind them.
    """

    def __init__(self, call: Call, options: dict[str, Any], lanes: int) -> None:
        super().__init__()
        self.source, self.options, self.lanes = call.source, options, lanes
        self.point_first = call.point_first

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        point = int(self.source.zero_points[0])
        centered = (codes.int() - point).double()
        sums = sums_of(centered, self.options).float()
        m = 1.0 / divisors_of(centered, self.options).float()
        if not passes_for_last(codes):
            return laid_out(to_codes(torch.round(sums * m + point), self.source), 0)
        tail = round_native(sums * (1.0 / (1.0 / m)), point, self.point_first)
        found = mixed(torch.round(sums * m) + point, tail, self.lanes)
        return stored(to_codes(found, self.source), codes)


def _windows(options: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v for k, v in options.items() if k in ("kernel_size", "stride", "padding", "ceil_mode")
    }


def sums_of(x: Tensor, options: dict[str, Any]) -> Tensor:
    """Exact sums over each window."""
    found: Tensor = _AVERAGES[x.dim()](x, **_windows(options), divisor_override=1)
    return found


def divisors_of(x: Tensor, options: dict[str, Any]) -> Tensor:
    """What each window's sum is divided by."""
    override = options.get("divisor_override")
    ones = torch.ones_like(x[:, :1] if x.dim() > 3 else x[:1])
    if override:
        constant: Tensor = torch.full_like(sums_of(ones, options), float(override))
        return constant
    if not options.get("count_include_pad", True):
        return sums_of(ones, options)
    # These pools count padding, but not what ceil_mode lets hang over it.
    mean = _AVERAGES[x.dim()](ones, **_windows(options), count_include_pad=True)
    counts: Tensor = torch.round(sums_of(ones, options) / mean)
    return counts


AVERAGE = (
    "kernel_size",
    "stride",
    "padding",
    "ceil_mode",
    "count_include_pad",
    "divisor_override",
)


@kernel("avg_pool2d", engines=_SHARED)
def _avg_pool(call: Call) -> nn.Module:
    return AveragePool2d(call, options_of(call, *AVERAGE), lanes_of(call))


class QnnAveragePool2d(Exact):
    """qnnpack's: ``rne(f(S * f(s / f(s * n)))) + zp``."""

    def __init__(self, source: QParams, options: dict[str, Any]) -> None:
        super().__init__()
        self.source, self.options = source, options

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        point = int(self.source.zero_points[0])
        sums = sums_of((codes.int() - point).double(), self.options).float()
        size = self.options["kernel_size"]
        count = size * size if isinstance(size, int) else size[0] * size[-1]
        found = torch.round(sums * qnnpack_multiplier(self.source, count)) + point
        return as_qnnpack(to_codes(found, self.source), codes)


def qnnpack_multiplier(source: QParams, count: int) -> float:
    """What qnnpack's averages of `count` codes are scaled by."""
    scale = single(source.scales[0])
    return single(scale / single(scale * count))


@kernel("avg_pool2d", engines=("qnnpack",))
def _qnn_avg_pool(call: Call) -> nn.Module:
    if call.option("divisor_override"):
        raise call.refuse("its kernel ignores divisor_override")
    if call.option("ceil_mode"):
        raise call.refuse("its kernel goes wrong where ceil_mode lets windows hang over the edge")
    return QnnAveragePool2d(call.source, options_of(call, *AVERAGE))


class Mean(Exact):
    """A mean of codes.

    Over the last axes of contiguous codes ``rne(SQ / n)``; else dequantized, averaged and
    quantized. qnnpack, over the image: ``rne(f(S * f(s / f(s * n)))) + zp``.
    """

    def __init__(self, call: Call, dims: list[int]) -> None:
        super().__init__()
        self.source, self.dims, self.point_first = call.source, dims, call.point_first
        self.keepdim = bool(call.option("keepdim", False))
        self.qnnpack = call.engine == "qnnpack"

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        dims = [d % codes.dim() for d in self.dims]
        image = codes.dim() == 4 and sorted(dims) == [2, 3]
        count = codes.shape[-1] * codes.shape[-2] if image else 0
        if image and self.qnnpack:
            point = int(self.source.zero_points[0])
            sums = (codes.int() - point).sum((2, 3), keepdim=self.keepdim).float()
            found = torch.round(sums * qnnpack_multiplier(self.source, count)) + point
            return to_codes(found, self.source)
        inner = sorted(dims) == list(range(codes.dim() - len(dims), codes.dim()))
        if inner and codes.is_contiguous():
            count = math.prod(codes.shape[d] for d in dims)
            sums = codes.long().sum(dims, keepdim=self.keepdim).float()
            return to_codes(torch.round(sums / count), self.source)
        mean = real(codes, self.source).mean(dims, keepdim=self.keepdim)
        return quantize_native(mean, self.source, self.point_first).to(self.source.storage)


@kernel("mean", engines=_ALL)
def _mean(call: Call) -> nn.Module:
    dims = call.option("dim")
    if dims is None:
        raise call.refuse("a mean over everything")
    listed = [dims] if isinstance(dims, int) else list(dims)
    return Mean(call, listed)

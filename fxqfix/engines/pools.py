"""Pools. ``S = sum (q - zp)``, ``SQ = sum q``, n the divisor, ``m = f(1/n)``, ``i2 = f(1/m)``.

A maximum of codes is exact anywhere. Averages: channels-last images are summed in vectors of
channels, which round in another way than the channels that are left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxqfix.engines._arithmetic import fma, real, single, to_codes
from fxqfix.engines._base import Call, kernel
from fxqfix.engines._layout import laid_out
from fxqfix.qparams import QParams, quantize_native

__all__ = ["MaxPool"]

_SHARED = ("fbgemm", "onednn")
_ALL = (*_SHARED, "qnnpack")
_MAX: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class MaxPool(nn.Module):
    """The largest code of each window."""

    def __init__(self, dims: int, options: dict[str, Any], qnnpack: bool) -> None:
        super().__init__()
        self.dims, self.options, self.qnnpack = dims, options, qnnpack

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        found: Tensor = _MAX[self.dims](codes.float(), **self.options)
        found = found.to(codes.dtype)
        return _as(found, codes) if self.qnnpack else found


def _as(found: Tensor, codes: Tensor) -> Tensor:
    """In qnnpack's layout: channels-last where the input may be taken for it."""
    if found.dim() == 4 and codes.is_contiguous(memory_format=torch.channels_last):
        return laid_out(found, 2)
    return found.contiguous()


def _options(call: Call, *names: str) -> dict[str, Any]:
    found = {name: call.option(name) for name in names}
    return {name: value for name, value in found.items() if value is not None and value != []}


@kernel("max_pool1d", "max_pool2d", "max_pool3d", engines=_ALL)
def _max_pool(call: Call) -> nn.Module:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    qnnpack = call.engine == "qnnpack" and not call.option("ceil_mode")
    return MaxPool(int(call.key[-2]), _options(call, *names), qnnpack)


def _last(codes: Tensor) -> bool:
    return not codes.is_contiguous() and codes.is_contiguous(memory_format=torch.channels_last)


def _mixed(body: Tensor, tail: Tensor, lanes: int) -> Tensor:
    """Channels in whole vectors from `body`, the rest from `tail`."""
    channels = body.shape[1]
    channel = torch.arange(channels, device=body.device).reshape(-1, 1, 1)
    return torch.where(channel < channels // lanes * lanes, body, tail)


class AveragePool2d(nn.Module):
    """avg_pool2d of the shared kernels: contiguous ``rne(f(f(S * m) + zp))``.

    Channels-last ``rne(f(S * m)) + zp`` in whole vectors, ``rne(f(f(S * i2) + zp))`` behind them.
    """

    def __init__(self, source: QParams, options: dict[str, Any], lanes: int) -> None:
        super().__init__()
        self.source, self.options, self.lanes = source, options, lanes

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        point = int(self.source.zero_points[0])
        centered = (codes.int() - point).double()
        sums = _sums(centered, self.options).float()
        m = 1.0 / _divisors(centered, self.options).float()
        if not _last(codes):
            return to_codes(torch.round(sums * m + point), self.source).contiguous()
        tail = torch.round(sums * (1.0 / (1.0 / m)) + point)
        found = _mixed(torch.round(sums * m) + point, tail, self.lanes)
        return laid_out(to_codes(found, self.source), 2)


def _windows(options: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v for k, v in options.items() if k in ("kernel_size", "stride", "padding", "ceil_mode")
    }


def _sums(x: Tensor, options: dict[str, Any]) -> Tensor:
    """Exact sums over each window."""
    return F.avg_pool2d(x, **_windows(options), divisor_override=1)


def _divisors(x: Tensor, options: dict[str, Any]) -> Tensor:
    """What each window's sum is divided by."""
    override = options.get("divisor_override")
    ones = torch.ones_like(x[..., :1, :, :])
    if override:
        constant: Tensor = torch.full_like(_sums(ones, options), float(override))
        return constant
    if not options.get("count_include_pad", True):
        return _sums(ones, options)
    # avg_pool2d counts padding, but not what ceil_mode lets hang over it.
    mean = F.avg_pool2d(ones, **_windows(options), count_include_pad=True)
    counts: Tensor = torch.round(_sums(ones, options) / mean)
    return counts


_AVERAGE = (
    "kernel_size",
    "stride",
    "padding",
    "ceil_mode",
    "count_include_pad",
    "divisor_override",
)


@kernel("avg_pool2d", engines=_SHARED)
def _avg_pool(call: Call) -> nn.Module:
    lanes = 16 if call.isa == "vnni" else 8  # floats in a register
    return AveragePool2d(call.source, _options(call, *_AVERAGE), lanes)


class QnnAveragePool2d(nn.Module):
    """qnnpack's: ``rne(f(S * f(s / f(s * n)))) + zp``."""

    def __init__(self, source: QParams, options: dict[str, Any]) -> None:
        super().__init__()
        self.source, self.options = source, options

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        point = int(self.source.zero_points[0])
        sums = _sums((codes.int() - point).double(), self.options).float()
        size = self.options["kernel_size"]
        count = size * size if isinstance(size, int) else size[0] * size[-1]
        found = torch.round(sums * _qnn_multiplier(self.source, count)) + point
        return _as(to_codes(found, self.source), codes)


def _qnn_multiplier(source: QParams, count: int) -> float:
    scale = single(source.scales[0])
    return single(scale / single(scale * count))


@kernel("avg_pool2d", engines=("qnnpack",))
def _qnn_avg_pool(call: Call) -> nn.Module:
    if call.option("divisor_override"):
        raise call.refuse("its kernel ignores divisor_override")
    if call.option("ceil_mode"):
        raise call.refuse("its kernel goes wrong where ceil_mode lets windows hang over the edge")
    return QnnAveragePool2d(call.source, _options(call, *_AVERAGE))


class AdaptiveAveragePool2d(nn.Module):
    """adaptive_avg_pool2d of the shared kernels: contiguous ``rne(f(SQ * f(1/n)))``.

    Channels-last ``rne(fma(S, i2, zp))`` in vectors of 8 channels, else ``rne(f(f(S * i2) + zp))``.
    """

    def __init__(self, source: QParams, size: Any, qnnpack: bool) -> None:
        super().__init__()
        self.source, self.size, self.qnnpack = source, size, qnnpack

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        point = int(self.source.zero_points[0])
        height, width = codes.shape[-2:]
        target = self.size if isinstance(self.size, list | tuple) else (self.size, self.size)
        rows = _counts(height, target[0] or height, codes).reshape(-1, 1)
        counts = rows * _counts(width, target[1] or width, codes)
        sums = torch.round(F.adaptive_avg_pool2d(codes.double(), tuple(target)) * counts)
        if self.qnnpack and height % len(counts) == 0 and width % counts.shape[1] == 0:
            scaled = (sums - point * counts).float() * _qnn_multiplier(
                self.source, int(counts[0, 0])
            )
            return laid_out(to_codes(torch.round(scaled) + point, self.source), 2)
        m = 1.0 / counts.float()
        if not _last(codes):
            return to_codes(torch.round(sums.float() * m), self.source).contiguous()
        centered, inverse = (sums - point * counts).float(), 1.0 / (1.0 / m)
        zero = torch.tensor(float(point), device=codes.device)
        body = torch.round(fma(centered, inverse, zero))
        found = _mixed(body, torch.round(centered * inverse + point), 8)
        return laid_out(to_codes(found, self.source), 2)


def _counts(size: int, target: int, like: Tensor) -> Tensor:
    """Elements in each of `target` adaptive windows over `size`."""
    index = torch.arange(target, device=like.device)
    return (-(-(index + 1) * size // target) - index * size // target).double()


@kernel("adaptive_avg_pool2d", engines=_ALL)
def _adaptive(call: Call) -> nn.Module:
    qnnpack = call.engine == "qnnpack"
    return AdaptiveAveragePool2d(call.source, call.option("output_size"), qnnpack)


class Mean(nn.Module):
    """A mean of codes.

    Over the last two axes of a contiguous image ``rne(SQ / n)``; else dequantized, averaged and
    quantized. qnnpack, over the image: ``rne(f(S * f(s / f(s * n)))) + zp``.
    """

    def __init__(self, source: QParams, dims: list[int], keepdim: bool, qnnpack: bool) -> None:
        super().__init__()
        self.source, self.dims, self.keepdim, self.qnnpack = source, dims, keepdim, qnnpack

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        dims = [d % codes.dim() for d in self.dims]
        image = codes.dim() == 4 and sorted(dims) == [2, 3]
        count = codes.shape[-1] * codes.shape[-2] if image else 0
        if image and self.qnnpack:
            point = int(self.source.zero_points[0])
            sums = (codes.int() - point).sum((2, 3), keepdim=self.keepdim).float()
            found = torch.round(sums * _qnn_multiplier(self.source, count)) + point
            return to_codes(found, self.source)
        if image and codes.is_contiguous():
            sums = codes.long().sum((2, 3), keepdim=self.keepdim).float()
            return to_codes(torch.round(sums / count), self.source)
        mean = real(codes, self.source).mean(dims, keepdim=self.keepdim)
        return quantize_native(mean, self.source).to(self.source.storage)


@kernel("mean", engines=_ALL)
def _mean(call: Call) -> nn.Module:
    dims = call.option("dim")
    if dims is None:
        raise call.refuse("a mean over everything")
    listed = [dims] if isinstance(dims, int) else list(dims)
    qnnpack = call.engine == "qnnpack"
    return Mean(call.source, listed, bool(call.option("keepdim", False)), qnnpack)

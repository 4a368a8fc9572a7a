"""Averages over one and three dimensions, by the formulas of `pools`.

One dimension is an image of height 1. avg_pool3d always works channels-last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxqfix.engines import pools
from fxqfix.engines._arithmetic import to_codes
from fxqfix.engines._base import Call, Exact, kernel
from fxqfix.engines._layout import stored
from fxqfix.engines.adaptive_pools import AdaptiveAveragePool
from fxqfix.qparams import round_native

__all__ = ["AveragePool3d", "Line"]

_SHARED = ("fbgemm", "onednn")
_ALL = (*_SHARED, "qnnpack")


class Line(Exact):
    """A pool of images, of lines."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        found: Tensor = self.inner(codes.unsqueeze(-2))
        return found.squeeze(-2)


def _pair(option: Any, first: int) -> list[int]:
    """An option of one dimension, of two."""
    return [first, int(option[0] if isinstance(option, list | tuple) else option)]


@kernel("avg_pool1d", engines=_ALL)
def _avg_pool1d(call: Call) -> nn.Module:
    kernel_size = call.option("kernel_size")
    stride = call.option("stride")
    options: dict[str, Any] = {
        "kernel_size": _pair(kernel_size, 1),
        "stride": _pair(kernel_size if stride in (None, [], ()) else stride, 1),
        "padding": _pair(call.option("padding", 0), 0),
        "ceil_mode": bool(call.option("ceil_mode", False)),
        "count_include_pad": bool(call.option("count_include_pad", True)),
    }
    if call.engine != "qnnpack":
        return Line(pools.AveragePool2d(call, options, pools.lanes_of(call)))
    if options["ceil_mode"]:
        raise call.refuse("its kernel goes wrong where ceil_mode lets windows hang over the edge")
    if options["padding"][1] and not options["count_include_pad"]:
        raise call.refuse("its kernel counts padding whatever it is told")
    return Line(pools.QnnAveragePool2d(call.source, options))


@kernel("adaptive_avg_pool1d", engines=_ALL)
def _adaptive1d(call: Call) -> nn.Module:
    size = _pair(call.option("output_size"), 1)
    return Line(AdaptiveAveragePool(call, size, 2))


class AveragePool3d(Exact):
    """``rne(f(S * m)) + zp`` in whole vectors of channels, ``rne(f(f(S * i2) + zp))`` behind."""

    def __init__(self, call: Call, options: dict[str, Any], lanes: int) -> None:
        super().__init__()
        self.source, self.options, self.lanes = call.source, options, lanes
        self.point_first = call.point_first

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        point = int(self.source.zero_points[0])
        centered = (codes.int() - point).double()
        sums = pools.sums_of(centered, self.options).float()
        m = 1.0 / pools.divisors_of(centered, self.options).float()
        tail = round_native(sums * (1.0 / (1.0 / m)), point, self.point_first)
        found = pools.mixed(torch.round(sums * m) + point, tail, self.lanes)
        last = codes.contiguous(memory_format=torch.channels_last_3d)
        return stored(to_codes(found, self.source), last)


@kernel("avg_pool3d", engines=_ALL)
def _avg_pool3d(call: Call) -> nn.Module:
    return AveragePool3d(call, pools.options_of(call, *pools.AVERAGE), pools.lanes_of(call))

"""Adaptive averages. ``S = sum (q - zp)``, ``SQ = sum q`` of a window of n = d * h * w codes.

* contiguous: ``rne(f(SQ * f(f(f(1/d) / h) / w)))``
* channels-last, with ``i2 = f(1/f(1/f(1/n)))``: ``rne(fma(S, i2, zp))`` in vectors of 8 channels,
  else ``rne(f(f(S * i2) + zp))``
* qnnpack, images whose windows are all of one size: ``rne(f(S * f(s / f(s * n)))) + zp``
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxqfix.engines._arithmetic import fma, to_codes
from fxqfix.engines._base import Call, Exact, kernel
from fxqfix.engines._layout import laid_out, passes_for_last, stored
from fxqfix.engines.pools import as_qnnpack, mixed, qnnpack_multiplier
from fxqfix.qparams import round_native

__all__ = ["AdaptiveAveragePool"]

_ALL = ("fbgemm", "onednn", "qnnpack")
_POOLS: dict[int, Callable[..., Any]] = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


class AdaptiveAveragePool(Exact):
    """Means over windows that share an image among a number of outputs."""

    def __init__(self, call: Call, size: Any, dims: int) -> None:
        super().__init__()
        self.source, self.point_first = call.source, call.point_first
        self.vectors = call.point_first and not call.scalar
        self.qnnpack = call.engine == "qnnpack" and dims == 2
        self.size = list(size) if isinstance(size, list | tuple) else [size] * dims

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        point, dims = int(self.source.zero_points[0]), len(self.size)
        sizes = codes.shape[-dims:]
        target = [t or n for t, n in zip(self.size, sizes, strict=True)]
        axes = [_counts(n, t) for n, t in zip(sizes, target, strict=True)]
        axes = [a.reshape(-1, *(1 for _ in axes[i + 1 :])) for i, a in enumerate(axes)]
        counts = torch.ones_like(axes[0])
        for axis in axes:
            counts = counts * axis
        counts = counts.to(codes.device)
        sums = torch.round(_POOLS[dims](codes.double(), target) * counts)
        centered = (sums - point * counts).float()
        even = all(n % t == 0 for n, t in zip(sizes, target, strict=True))
        if self.qnnpack and even and target != list(sizes):
            count = math.prod(n // t for n, t in zip(sizes, target, strict=True))
            scaled = centered * qnnpack_multiplier(self.source, count)
            return as_qnnpack(to_codes(torch.round(scaled) + point, self.source), codes)
        if not passes_for_last(codes):
            return laid_out(
                to_codes(torch.round(sums.float() * _inverse(axes).to(codes.device)), self.source),
                0,
            )
        inverse = 1.0 / (1.0 / (1.0 / counts.float()))
        zero = torch.tensor(float(point), device=codes.device)
        body = torch.round(fma(centered, inverse, zero))
        tail = round_native(centered * inverse, point, self.point_first)
        found = mixed(body if self.vectors else tail, tail, 8)
        return stored(to_codes(found, self.source), codes)


def _counts(size: int, target: int) -> Tensor:
    """Elements in each of `target` adaptive windows over `size`, on the CPU."""
    index = torch.arange(target, device="cpu")
    return (-(-(index + 1) * size // target) - index * size // target).double()


def _inverse(axes: list[Tensor]) -> Tensor:
    """1 / n, divided axis by axis."""
    found = torch.ones_like(axes[0], dtype=torch.float32)
    for axis in axes:
        found = found / axis.float()
    return found


@kernel("adaptive_avg_pool2d", "adaptive_avg_pool3d", engines=_ALL)
def _adaptive(call: Call) -> nn.Module:
    return AdaptiveAveragePool(call, call.option("output_size"), call.spec.dims)

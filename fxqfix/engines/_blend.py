"""Where bilinear interpolation finds its four codes, and how the kernels weight them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxqfix.engines._arithmetic import fma, single

__all__ = ["line", "weighted"]


def line(size: int, target: int, align: bool, scale: float | None, fused: bool) -> Any:
    """Where each of `target` places lies among `size`: index, next index, their weights."""
    index = torch.arange(target, dtype=torch.float32, device="cpu")
    if align:
        source = index * (single((size - 1) / (target - 1)) if target > 1 else 0.0)
    else:
        step = single(1.0 / scale) if scale else single(size / target)
        half = index + 0.5
        source = fma(half, step, -0.5) if fused else half * step - 0.5
        source = source.clamp(min=0)
    low = source.long()
    weight = source - low
    return low, low + (low < size - 1), 1 - weight, weight


def weighted(x: Tensor, lines: Any, fused: int | None) -> Tensor:
    """The weighted sum; `fused` says which product of each sum is not rounded."""
    (top, bottom, *heights), (left, right, *widths) = lines
    rows = [
        _sum(widths, (row[..., left], row[..., right]), fused)
        for row in (x[:, :, top], x[:, :, bottom])
    ]
    return _sum([h.unsqueeze(-1) for h in heights], rows, fused)


def _sum(weights: Any, values: Any, fused: int | None) -> Tensor:
    products = [w * v for w, v in zip(weights, values, strict=True)]
    if fused is None:
        total: Tensor = products[0] + products[1]
        return total
    return fma(weights[fused], values[fused], products[1 - fused])

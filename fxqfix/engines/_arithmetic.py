"""Roundings that all kernels are made of. ``f`` rounds to float32, ``rne`` half to even.

Codes travel as integer tensors of the storage dtype (uint8 for quint8), in the memory format that
the kernels give their outputs: some kernels round channels-last tensors in another way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxqfix.qparams import QParams, fused_sum

__all__ = ["fma", "real", "single", "to_codes"]


def single(value: float) -> float:
    """``f``: a Python double, rounded to float32."""
    return float(torch.tensor(value, dtype=torch.float32, device="cpu"))


def fma(a: Tensor | float, b: Tensor | float, c: Tensor | float) -> Tensor:
    """A * b + c of float32 values with one rounding; one of them at least is a tensor."""
    like = next(v for v in (a, b, c) if isinstance(v, Tensor))
    floats = [v if isinstance(v, Tensor) else single(v) for v in (a, b, c)]
    wide = [torch.as_tensor(v, dtype=torch.float64, device=like.device) for v in floats]
    product = wide[0] * wide[1]
    return fused_sum(product + torch.zeros_like(wide[2]), wide[2] + torch.zeros_like(product))


def real(codes: Tensor, qparams: QParams) -> Tensor:
    """Per-tensor dequantize: ``f(f(s) * (q - zp))``."""
    point = int(qparams.zero_points[0])
    return (codes.to(torch.int32) - point).to(torch.float32) * single(qparams.scales[0])


def to_codes(rounded: Tensor, qparams: QParams, *, relu: bool = False) -> Tensor:
    """Clamp whole numbers to the container (with a relu, from the zero point up) and store.

    Floats are used up.
    """
    low, high = qparams.container
    if relu:
        low = max(low, int(qparams.zero_points[0]))
    held = (rounded.clamp_ if rounded.is_floating_point() else rounded.clamp)(low, high)
    if held.is_floating_point() and held.device.type == "cpu":
        held = held.to(torch.int32)  # a cast from floats to 8 bits runs element by element there
    return held.to(qparams.storage)

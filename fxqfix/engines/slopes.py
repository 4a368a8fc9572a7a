"""prelu and gelu: the same kernels on every engine.

* prelu: ``rne(f(f(p * one + n * w) * f(f(s * sw) * f(1 / s')))) + z'`` with the integers
  ``p = max(q - z, 0)``, ``n = min(q - z, 0)``, ``w`` the slope's code less its zero point and
  ``one`` that of 1
* gelu: body and tail, see `_lookup`; the tail computes in double; the scale of the result is that
  of the input in float32
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fxqfix.engines._arithmetic import fma, real, single, to_codes
from fxqfix.engines._base import Call, Exact, kernel
from fxqfix.engines._layout import suggested
from fxqfix.engines._lookup import Lookup, Rounding, codes_of, fused

__all__ = ["PReLU"]

_ALL = ("fbgemm", "onednn", "qnnpack")


class PReLU(Exact):
    """Negative values multiplied by slopes, one or one for each channel."""

    slopes: Tensor

    def __init__(self, call: Call, weight: Tensor) -> None:
        super().__init__()
        self.grid, self.point = call.grid, int(call.source.zero_points[0])
        scale, point = single(weight.q_scale()), weight.q_zero_point()
        low, high = call.source.container
        one = int(torch.round(torch.tensor(single(1.0 / scale)) + point).clamp(low, high))
        self.one = one - point
        self.register_buffer("slopes", weight.int_repr().int() - point)
        product = single(single(call.source.scales[0]) * scale)
        self.multiplier = single(product * single(1.0 / single(call.grid.scales[0])))

    def forward(self, codes: Tensor, *_: Tensor) -> Tensor:
        """Codes in (and the slopes, where they are a constant of the graph), codes out."""
        slopes = self.slopes
        if codes.dim() != slopes.dim():
            slopes = slopes.reshape([-1 if d == 1 else 1 for d in range(codes.dim())])
        x = codes.int() - self.point
        total = x.clamp(min=0) * self.one + x.clamp(max=0) * slopes
        found = torch.round(total.float() * self.multiplier) + int(self.grid.zero_points[0])
        return suggested(to_codes(found, self.grid), codes)


@kernel("prelu", engines=_ALL)
def _prelu(call: Call) -> nn.Module:
    weight: Any = call.option("weight")
    if not isinstance(weight, Tensor) or not weight.is_quantized:
        raise call.refuse("its slopes are not a constant")
    return PReLU(call, weight)


@kernel("gelu", engines=_ALL)
def _gelu(call: Call) -> nn.Module:
    codes, rounding = codes_of(call)[0], Rounding(call, call.source)
    curves = (_body_tanh, _tail_tanh) if call.option("approximate") == "tanh" else (_body, _tail)
    read = real if call.scalar else fused
    body = rounding.body(curves[0](read(codes, call.source)))
    tail = rounding.tail(curves[1](real(codes, call.source).double()).float())
    return Lookup(call, body, tail)


def _body(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x * single(math.sqrt(0.5))))


def _tail(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))


def _body_tanh(x: Tensor) -> Tensor:
    inner = fma(torch.full_like(x, single(0.044715)), x * x * x, x)
    return 0.5 * x * (1 + torch.tanh(single(math.sqrt(2 / math.pi)) * inner))


def _tail_tanh(x: Tensor) -> Tensor:
    cube = (x.float() * x.float() * x.float()).double()
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * cube)))

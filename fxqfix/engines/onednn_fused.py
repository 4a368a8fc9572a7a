"""What only onednn fuses: convolution with an addition, linear with leaky relu or tanh.

All work on p, the float value before the output scale (see `_requantize`), measured: the addition
is ``fma(q2 - z2, S, p)`` with ``S = f(1 / f(1 / f(s2)))``, then the relu; leaky relu
``f(p * slope)`` where p is negative.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxqfix.engines._accumulate import Accumulator
from fxqfix.engines._arithmetic import fma, single
from fxqfix.engines._base import Call, kernel
from fxqfix.engines._lost import Lost
from fxqfix.engines._requantize import Onednn
from fxqfix.engines.weighted import build_conv, build_linear

__all__: list[str] = []

_ONLY = ("onednn",)


class _Add(Onednn):
    """A convolution that adds its second input before the relu."""

    def __init__(
        self, call: Call, accumulate: Accumulator, dims: int, lost: Lost | None = None
    ) -> None:
        super().__init__(call, accumulate, dims, lost)
        other = call.qparams[1]
        if other is None:
            raise call.refuse("what it adds is not quantized")
        self.other_scale = single(1.0 / single(1.0 / single(other.scales[0])))
        self.other_point = int(other.zero_points[0])

    def post(self, p: Tensor, *others: Tensor) -> Tensor:
        """Sum, then relu."""
        steps = (others[0].to(torch.int32) - self.other_point).float()
        scale, reference = self.other_scale, self.row.scales == "reference"
        fused = p + steps * scale if reference else fma(steps, scale, p)
        return super().post(fused)


class _Leaky(Onednn):
    """Linear with a leaky relu."""

    def __init__(
        self, call: Call, accumulate: Accumulator, dims: int, lost: Lost | None = None
    ) -> None:
        super().__init__(call, accumulate, dims, lost)
        self.slope = single(float(call.option("negative_slope", 0.01)))

    def post(self, p: Tensor, *others: Tensor) -> Tensor:
        """The slope, on negative values."""
        return torch.where(p > 0, p, p * self.slope)


class _Tanh(Onednn):
    """Linear with tanh."""

    def post(self, p: Tensor, *others: Tensor) -> Tensor:
        """Tanh by oneDNN's own polynomial, from which torch's differs in the last bits."""
        found: Tensor = p.cpu().to_mkldnn().tanh().to_dense()
        return found.to(p.device)


@kernel("conv2d_add", engines=_ONLY)
def _conv_add(call: Call) -> nn.Module:
    return build_conv(call, _Add)


@kernel("linear_leaky_relu", engines=_ONLY)
def _linear_leaky_relu(call: Call) -> nn.Module:
    return build_linear(call, _Leaky)


@kernel("linear_tanh", engines=_ONLY, native=True)
def _linear_tanh(call: Call) -> nn.Module:
    return build_linear(call, _Tanh)

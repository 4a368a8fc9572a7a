"""Exact integer accumulation in float tensors, as narrow as a bound allows.

A convolution of integer-valued float32 tensors is exact, in any order of summation, while
``max |q - zp| * sum |w|`` stays below 2^24. Where it does not, the input channels are split until
each part does, and the parts are added in float64; a single channel that is still too large runs
in float64 as a whole, where the limit is 2^53.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fxqfix.qparams import QParams

__all__ = ["Accumulator", "largest_sum"]

_EXACT = 2**24

Function = Callable[[Tensor, Tensor], Tensor]


def largest_sum(weight: Tensor, source: QParams, axis: int = 0) -> int:
    """Upper bound of any accumulator: ``max |q - zp| * max over outputs of sum |w|``.

    Args:
        weight: Integer weights, zero points taken off, with the outputs on `axis`.
        source: The grid of the activations; all codes of its container count.
        axis: The axis of the outputs.
    """
    low, high = source.container
    point = int(source.zero_points[0])
    reach = max(high - point, point - low)
    sums = weight.abs().long().movedim(axis, 0).flatten(1).sum(1)
    return reach * int(sums.max()) if sums.numel() else 0


class Accumulator(nn.Module):
    """``sum (q - zx) * (w - zw)`` as a float tensor that holds it exactly.

    Args:
        function: (x, w) -> sums, linear in both, e.g. a convolution without bias.
        weight: Integer weights, zero points taken off.
        source: The grid of the activations.
        axis: The axis of the outputs in `weight`.
        channels: The axis of the input channels in `weight` along which sums may be split; None
            where they may not (groups).
        input_axis: The axis of the channels in the activations.
    """

    weight: Tensor

    def __init__(
        self,
        function: Function,
        weight: Tensor,
        source: QParams,
        *,
        axis: int = 0,
        channels: int | None = 1,
        input_axis: int = 1,
    ) -> None:
        super().__init__()
        self.function, self.point = function, int(source.zero_points[0])
        self.channels, self.input_axis = channels, input_axis
        self.bound = largest_sum(weight, source, axis)
        self.sizes = self._split(weight, source, axis)
        wide = not self.sizes
        self.register_buffer("weight", weight.to(torch.float64 if wide else torch.float32))

    def _split(self, weight: Tensor, source: QParams, axis: int) -> list[int]:
        """Sizes of the parts; [] where float64 is needed."""
        if self.bound < _EXACT:
            return [0]  # all in one
        if self.channels is None:
            return []
        count = weight.shape[self.channels]
        for parts in range(2, count + 1):
            chunks = weight.tensor_split(parts, dim=self.channels)
            if all(largest_sum(c, source, axis) < _EXACT for c in chunks):
                return [c.shape[self.channels] for c in chunks]
        return []

    def forward(self, codes: Tensor) -> Tensor:
        """Exact sums, in float32 if they fit, else in float64."""
        x = codes.to(self.weight.dtype).sub_(self.point)
        with torch.backends.cudnn.flags(enabled=False):  # Winograd and FFT are not exact
            if len(self.sizes) < 2:
                return self.function(x, self.weight)
            assert self.channels is not None  # only then there are several parts
            parts = zip(
                torch.split(x, self.sizes, self.input_axis),
                torch.split(self.weight, self.sizes, self.channels),
                strict=True,
            )
            return torch.stack([self.function(a, w).double() for a, w in parts]).sum(0)

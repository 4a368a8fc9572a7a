"""Exact integer accumulation in float tensors, as narrow as a bound allows.

A convolution of integer-valued float32 tensors is exact, in any order of summation, while
``max |q - zp| * sum |w|`` stays below 2^24. Where it does not, the input channels are split until
each part does, and the parts are added in float64; where that is not enough, it runs in float64 as
a whole, where the limit is 2^53.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fxqfix.engines._base import Exact
from fxqfix.engines._layout import channels_last
from fxqfix.engines._paths import sums_of
from fxqfix.qparams import QParams

__all__ = ["EXACT", "Accumulator", "by_output", "largest_sum"]

EXACT = 2**24

Function = Callable[[Tensor, Tensor], Tensor]


def by_output(weight: Tensor, groups: int) -> Tensor:
    """The weight of a transposed convolution, (inputs, outputs / groups, ...), outputs first."""
    inputs, outputs = weight.shape[0] // groups, weight.shape[1]
    parts = weight.reshape(groups, inputs, outputs, *weight.shape[2:])
    return parts.transpose(1, 2).reshape(groups * outputs, inputs, *weight.shape[2:])


def largest_sum(weight: Tensor, source: QParams) -> int:
    """Upper bound of any accumulator: ``max |q - zp| * max over outputs of sum |w|``.

    Args:
        weight: Integer weights, zero points taken off, with the outputs on axis 0.
        source: The grid of the activations; all codes of its container count.
    """
    low, high = source.container
    point = int(source.zero_points[0])
    reach = max(high - point, point - low)
    sums = weight.abs().long().flatten(1).sum(1)
    return reach * int(sums.max()) if sums.numel() else 0


class Accumulator(Exact):
    """``sum (q - zx) * (w - zw)`` as a float tensor that holds it exactly.

    Args:
        function: (x, w) -> sums, linear in both, e.g. a convolution without bias.
        weight: Integer weights, zero points taken off.
        source: The grid of the activations.
        transposed: Whether `weight` has the inputs on axis 0, as transposed convolutions do.
        groups: Number of groups; sums of one group only can be split.
        input_axis: The axis of the channels in the activations.
    """

    weight: Tensor

    def __init__(
        self,
        function: Function,
        weight: Tensor,
        source: QParams,
        *,
        transposed: bool = False,
        groups: int = 1,
        input_axis: int = 1,
    ) -> None:
        super().__init__()
        self.function, self.point = function, int(source.zero_points[0])
        low, high = source.container
        self.reach = low - self.point, high - self.point
        self.channels, self.input_axis = (0 if transposed else 1), input_axis
        rows = by_output(weight, groups) if transposed else weight
        self.bound = largest_sum(rows, source)
        raw = largest_sum(rows, replace(source, zero_point=0))
        self.rounds_in_tiles = bool(self.point) and raw >= EXACT
        self.sizes = _split(rows, source, self.bound, groups)
        wide = not self.sizes
        self.register_buffer("weight", weight.to(torch.float64 if wide else torch.float32))

    def forward(self, codes: Tensor) -> Tensor:
        """Exact sums, in float32 if they fit, else in float64."""
        # Channels-last, as the kernels' own results lie: another layout costs a copy of each.
        layout = channels_last(codes) if self.input_axis == 1 else torch.preserve_format
        x = codes.to(self.weight.dtype, memory_format=layout)
        x = x.sub_(self.point) if self.point else x
        if len(self.sizes) < 2:
            return sums_of(self.function, x, self.weight, self.reach)
        parts = zip(
            torch.split(x, self.sizes, self.input_axis),
            torch.split(self.weight, self.sizes, self.channels),
            strict=True,
        )
        sums = [sums_of(self.function, a, w, self.reach).double() for a, w in parts]
        return torch.stack(sums).sum(0)

    def in_tiles(self, codes: Tensor) -> Tensor:
        """``f(f(sum q * w) - f(f(sum w) * zx))``, both sums over the taps inside the image."""
        weight = self.weight.double()
        raw = sums_of(self.function, codes.double(), weight, self.reach)
        ones = torch.ones_like(codes, dtype=torch.float64)
        inside = sums_of(self.function, ones, weight, self.reach)
        return raw.float() - inside.float() * float(self.point)


def _split(rows: Tensor, source: QParams, bound: int, groups: int) -> list[int]:
    """Sizes of the parts, along the input channels; [] where float64 is needed."""
    if bound < EXACT:
        return [0]  # all in one
    for parts in range(2, rows.shape[1] + 1) if groups == 1 else ():
        chunks = rows.tensor_split(parts, dim=1)
        if all(largest_sum(c, source) < EXACT for c in chunks):
            return [c.shape[1] for c in chunks]
    return []

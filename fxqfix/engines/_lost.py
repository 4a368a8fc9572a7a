"""What exact sums lose where pairs of products saturate at 16 bits, for whole layers.

Only pairs of weights that can saturate at all are looked at; where there is none, nothing is built.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxqfix.engines.saturation import pairs_of_weights, saturating

__all__ = ["Lost", "Walk"]

_LOW, _HIGH = -(2**15), 2**15 - 1
_CHUNK = 2**22  # sums held at once


@dataclass(frozen=True)
class Walk:
    """How a kernel walks its input, in any number of dimensions; () for linear.

    Attributes:
        stride: Step per axis.
        padding: Added on each side, per axis; it holds the zero point's code.
        dilation: Distance of kernel positions per axis.
        groups: Number of groups.
        transposed: Whether this is a transposed convolution.
        output_padding: Added at the end of a transposed one's output, per axis.
        mode: padding_mode.
    """

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    mode: str = "zeros"


class Lost(nn.Module):
    """``sum (pair - clamp16(pair))`` over the pairs of raw products of each output, int32.

    Args:
        weight: Raw weight codes, (outputs, inputs / groups, *kernel).
        zero_point: The activations' zero point.
        lift: What is added to the activations' codes to make them unsigned.
        walk: Strides and the like.
        by_channel: Which neighbours make a pair; see `pairs_of_weights`.
    """

    outputs: Tensor
    first: Tensor
    second: Tensor

    def __init__(
        self, weight: Tensor, zero_point: int, lift: int, walk: Walk, *, by_channel: bool
    ) -> None:
        super().__init__()
        self.walk, self.lift = walk, lift
        # oneDNN leaves padding out and corrects for it afterwards, exactly.
        self.point = 0 if by_channel else zero_point
        self.kernel, self.channels = tuple(weight.shape[2:]), weight.shape[1]
        self.per_group = weight.shape[0] // walk.groups
        self.count = weight.shape[0]
        values, places = pairs_of_weights(weight, by_channel=by_channel)
        hot = saturating(values).reshape(walk.groups, self.per_group, -1)
        groups, columns = hot.any(1).nonzero().unbind(1)
        self.pairs: list[tuple[int, int, int]] = []  # (group, place, place)
        self.sizes: list[int] = []
        outputs = []
        for group, column in zip(groups.tolist(), columns.tolist(), strict=True):
            found = hot[group, :, column].nonzero().flatten() + group * self.per_group
            outputs.append(torch.stack([found, torch.full_like(found, column)]))
            self.pairs.append((group, *places[column]))
            self.sizes.append(len(found))
        chosen = torch.cat(outputs, 1) if outputs else torch.zeros(2, 0, dtype=torch.int64)
        self.register_buffer("outputs", chosen[0])
        self.register_buffer("first", values[chosen[0], chosen[1], 0].unsqueeze(1))
        self.register_buffer("second", values[chosen[0], chosen[1], 1].unsqueeze(1))

    def forward(self, codes: Tensor) -> Tensor:
        """What each output's sum loses, (N, outputs, ...)."""
        x = codes.to(torch.int32) + self.lift
        if not self.kernel:
            flat = x.reshape(-1, x.shape[-1], 1)
            return self._lost(flat).reshape(*x.shape[:-1], self.count)
        x = self._padded(x)
        size = [
            (n - d * (k - 1) - 1) // s + 1
            for n, d, k, s in zip(
                x.shape[2:], self.walk.dilation, self.kernel, self._stride, strict=True
            )
        ]
        step = max(1, _CHUNK // max(1, self.count * math.prod(size)))
        return torch.cat([self._lost(part, size) for part in torch.split(x, step)])

    @property
    def _stride(self) -> tuple[int, ...]:
        return (1,) * len(self.kernel) if self.walk.transposed else self.walk.stride

    def _lost(self, x: Tensor, size: list[int] | None = None) -> Tensor:
        """Of padded images; (N, C, 1) for linear."""
        taps = [self._window(x, at, size) for at in self._positions()] if size else [x]
        shape = taps[0].shape
        lost = torch.zeros(self.count, taps[0][:, 0].numel(), dtype=torch.int32, device=x.device)
        split = [torch.split(t, self.sizes) for t in (self.outputs, self.first, self.second)]
        for (group, a, b), outputs, first, second in zip(self.pairs, *split, strict=True):
            start = group * self.channels
            left, right = (
                taps[i // self.channels][:, start + i % self.channels].reshape(1, -1)
                for i in (a, b)
            )
            pair = first * left + second * right
            lost.index_add_(0, outputs, pair.sub_(pair.clamp(_LOW, _HIGH)))
        return lost.reshape(self.count, shape[0], *shape[2:]).transpose(0, 1)

    def _positions(self) -> Iterator[tuple[int, ...]]:
        """Offset of each kernel position in the padded image; a transposed kernel is mirrored."""
        for at in itertools.product(*(range(k) for k in self.kernel)):
            if self.walk.transposed:
                at = tuple(k - 1 - i for i, k in zip(at, self.kernel, strict=True))
            yield tuple(i * d for i, d in zip(at, self.walk.dilation, strict=True))

    def _window(self, x: Tensor, at: tuple[int, ...], size: list[int]) -> Tensor:
        for axis, (start, n, s) in enumerate(zip(at, size, self._stride, strict=True), 2):
            x = x.narrow(axis, start, (n - 1) * s + 1)[(slice(None),) * axis + (slice(0, None, s),)]
        return x

    def _padded(self, x: Tensor) -> Tensor:
        walk = self.walk
        sides = [(p, p) for p in walk.padding]
        if walk.transposed:
            wide = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], walk.stride, strict=True)]
            spread = x.new_full((*x.shape[:2], *wide), self.point)
            at: Any = (..., *(slice(0, None, s) for s in walk.stride))
            spread[at] = x
            x = spread
            reach = [d * (k - 1) for d, k in zip(walk.dilation, self.kernel, strict=True)]
            sides = [
                (r - p, r - p + more)
                for r, p, more in zip(reach, walk.padding, walk.output_padding, strict=True)
            ]
        flat = [n for pair in reversed(sides) for n in pair]
        if walk.mode == "zeros":
            return F.pad(x, flat, value=self.point)
        return F.pad(x.double(), flat, mode=walk.mode).to(torch.int32)

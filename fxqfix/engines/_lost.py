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
from torch import Tensor

from fxqfix.engines._base import Exact
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


def _bounds(pairs: Tensor) -> Tensor:
    """The activation codes up to which no product of these pairs, (..., 2), leaves 16 bits."""
    most = pairs.clamp(min=0).sum(-1).clamp(min=1)
    least = pairs.clamp(max=0).sum(-1).clamp(max=-1)
    return torch.minimum(_HIGH / most, _LOW / least)


class Lost(Exact):
    """``sum (pair - clamp16(pair))`` over the pairs of raw products of each output, int32.

    Args:
        weight: Raw weight codes, (outputs, inputs / groups, *kernel).
        zero_point: The activations' zero point.
        lift: What is added to the activations' codes to make them unsigned.
        walk: Strides and the like.
        order: Which neighbours make a pair; see `pairs_of_weights`.
    """

    outputs: Tensor
    weights: Tensor
    inputs: Tensor
    bounds: Tensor

    def __init__(self, weight: Tensor, zero_point: int, lift: int, walk: Walk, order: str) -> None:
        super().__init__()
        self.walk, self.lift = walk, lift
        # oneDNN leaves padding out and corrects for it afterwards, exactly.
        self.point = zero_point if order == "flat" else 0
        self.kernel, self.channels = tuple(weight.shape[2:]), weight.shape[1]
        self.count = weight.shape[0]
        values, places = pairs_of_weights(weight, order)
        hot = saturating(values)
        groups = torch.arange(len(weight)) // (len(weight) // walk.groups)
        self.limits: list[float] = []  # activation codes up to which none of them saturates
        # A plain depthwise layer: all channels at once, each reads its own.
        self.depthwise = weight.shape[1] == 1 and walk.groups == len(weight)
        columns = hot.any(0).nonzero().flatten()
        where = torch.tensor(places, dtype=torch.int64).reshape(-1, 2)[columns]
        first, second = (where // self.channels).T.tolist()
        self.pairs: list[tuple[int, int]] = list(zip(first, second, strict=True))  # positions
        found = hot[:, columns] | self.depthwise
        self.sizes: list[int] = found.sum(0).tolist()
        self.limits += _bounds(values[:, columns]).amin(0).tolist() if len(columns) else []
        column, outputs = found.T.nonzero().T
        self.register_buffer("outputs", outputs)
        entries = values[outputs, columns[column]]
        self.register_buffer("weights", entries.T.contiguous())
        self.register_buffer("bounds", _bounds(entries))
        channels = (where % self.channels).T[:, column]
        self.register_buffer("inputs", groups[outputs] * self.channels + channels)

    def may_lose(self, codes: Tensor) -> bool:
        """Whether any of these codes is beyond what no pair of products leaves 16 bits with.

        Only where a look at the codes costs nothing: on a GPU it would wait for all that runs
        there, and a compiled graph can't branch on data.
        """
        looks = codes.device.type == "cpu" and not torch.compiler.is_compiling()
        if not looks or not codes.numel():
            return True
        return int(codes.amax()) + self.lift > min(self.limits, default=math.inf)

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
        lost = torch.zeros(shape[0], self.count, *shape[2:], dtype=torch.int32, device=x.device)
        tail = [1] * (x.dim() - 2)
        kept = self.outputs, self.weights, self.inputs, self.bounds
        split = (torch.split(t, self.sizes, -1) for t in kept)
        looks = x.device.type == "cpu" and not torch.compiler.is_compiling() and x.numel()
        highest = int(x.amax()) if looks else math.inf
        for (a, b), limit, outputs, weights, inputs, bounds in zip(
            self.pairs, self.limits, *split, strict=True
        ):
            if highest <= limit:  # as with reduce_range, where nothing leaves [0, 127]
                continue
            whole = self.depthwise
            if looks and bool((cold := bounds >= highest).any()):  # of some outputs only
                hot, whole = (~cold).nonzero().flatten(), False
                outputs, weights, inputs = outputs[hot], weights[:, hot], inputs[:, hot]
            first, second = weights.reshape(2, -1, *tail)
            pair = first * self._picked(taps[a], inputs[0], whole)
            pair += second * self._picked(taps[b], inputs[1], whole)
            pair -= pair.clamp(_LOW, _HIGH)
            lost = lost.add_(pair) if whole else lost.index_add_(1, outputs, pair)
        return lost

    def _picked(self, x: Tensor, channels: Tensor, whole: bool) -> Tensor:
        """The channels that the outputs read; without groups it is the same one for all."""
        if whole:
            return x
        return x.index_select(1, channels if self.walk.groups > 1 else channels[:1])

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

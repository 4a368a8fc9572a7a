"""What kernels with a weight are chosen by: channels, kernel and steps, and the input's size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxqfix.engines._base import Call

__all__ = ["Geometry", "Job", "geometry"]


@dataclass(frozen=True)
class Geometry:
    """The shape of a layer, whatever its input's size.

    Attributes:
        kind: "linear", "conv" or "transposed".
        inputs: Input channels of one group.
        outputs: Output channels of one group.
        groups: Number of groups.
        kernel: Its size per axis; () for linear.
        stride: Step per axis.
        padding: Added on each side, per axis.
        dilation: Distance of kernel positions, per axis.
        border: What a padding mode other than zeros adds before the kernel runs, per axis.
    """

    kind: str
    inputs: int
    outputs: int
    groups: int = 1
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    border: tuple[int, ...] = ()

    @property
    def depthwise(self) -> bool:
        """A filter for each channel, and several channels."""
        return self.groups > 1 and self.inputs == self.outputs == 1

    @property
    def pointwise(self) -> bool:
        """A kernel of one position that no padding surrounds."""
        return set(self.kernel) == {1} and not any(self.padding)

    @property
    def in_fours(self) -> bool:
        """Several groups, each of a multiple of 4 channels."""
        return self.groups > 1 and not (self.inputs % 4 or self.outputs % 4)

    @property
    def extent(self) -> tuple[int, ...]:
        """What the kernel spans, per axis."""
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True))

    @property
    def outside(self) -> bool:
        """Whether a window can lie in the padding wholly."""
        return any(e <= p for e, p in zip(self.extent, self.padding, strict=True))

    def size_of(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """The output's size, of the input's."""
        axes = zip(size, self.extent, self.stride, self.padding, strict=True)
        if self.kind == "transposed":  # without output padding
            return tuple((n - 1) * s + e - 2 * p for n, e, s, p in axes)
        return tuple((n + 2 * p - e) // s + 1 for n, e, s, p in axes)


def geometry(call: Call) -> Geometry:
    """The shape of a call with a weight.

    Raises:
        UnsupportedError: Its weight can't be read.
    """
    if call.weight is None:
        raise call.refuse("its weight can't be read")
    shape, groups = tuple(call.weight.codes.shape), call.option("groups", 1)
    if len(shape) == 2:
        return Geometry("linear", shape[1], shape[0])
    dims, kernel = len(shape) - 2, shape[2:]
    stride, dilation = (_per_axis(call.option(name), dims) for name in ("stride", "dilation"))
    padding = _padding(call.option("padding"), kernel, dilation)
    if call.spec.transposed:
        kind, inputs, outputs = "transposed", shape[0] // groups, shape[1]
    else:
        kind, inputs, outputs = "conv", shape[1], shape[0] // groups
    border = (0,) * dims
    if call.module is not None and call.option("padding_mode", "zeros") != "zeros":
        padding, border = border, padding
    return Geometry(kind, inputs, outputs, groups, kernel, stride, padding, dilation, border)


def _per_axis(option: Any, dims: int) -> tuple[int, ...]:
    """Of the last axes: a packed conv1d has two."""
    return (option,) * dims if isinstance(option, int) else tuple(option)[-dims:]


def _padding(option: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    """In numbers, where a float layer says "same" or "valid"."""
    if isinstance(option, str):
        same = option == "same"
        return tuple(same * (d * (k - 1) // 2) for k, d in zip(kernel, dilation, strict=True))
    return _per_axis(option, len(kernel))


@dataclass(frozen=True)
class Job:
    """A layer on an input: all that a kernel is chosen by.

    Attributes:
        shape: The layer's.
        signed: Whether the input's codes are signed.
        threads: Number of threads that the kernel runs on.
        batch: How many images; of linear how many rows.
        size: The input's size per axis; () for linear.
    """

    shape: Geometry
    signed: bool
    threads: int
    batch: int
    size: tuple[int, ...] = ()

    @classmethod
    def of(cls, call: Call, shape: Geometry, codes: Tensor) -> Job:
        """The job of an input."""
        signed = call.source.container[0] < 0
        if shape.kind == "linear":
            return cls(shape, signed, call.threads, math.prod(codes.shape[:-1]))
        size = (n + 2 * b for n, b in zip(codes.shape[2:], shape.border, strict=True))
        return cls(shape, signed, call.threads, codes.shape[0], tuple(size))

    @property
    def out(self) -> tuple[int, ...]:
        """The output's size per axis."""
        return self.shape.size_of(self.size)

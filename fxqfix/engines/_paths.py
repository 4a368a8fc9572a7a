"""Exact sums of integers from torch's products of floats: which way, by device, proved there.

On the CPU sums are taken in order (`direct_sums`). A GPU has faster ways, of which only some are
exact: cuDNN's TF32 convolutions of channels-last images are, as codes and weights fit their 11 bits
and sums are float32, but nothing promises it. So each is proved where it runs: once for a layer's
shape, its input's, the device and the switches that pick an algorithm, on extreme codes, a sample
of the outputs is held against sums in int64. Where one differs, sums are taken as before.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxqfix._settings import direct_sums, tensor_float32

__all__ = ["SAMPLED", "sums_of"]

SAMPLED = 4096  # outputs that a proof compares, or all where there are fewer
_FAST = {"cuda"}  # devices that have a fast way
_FITS = 2**11  # whole numbers that TF32 holds
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

Function = Callable[[Tensor, Tensor], Tensor]

_PROVEN: dict[tuple[Any, ...], bool] = {}


def sums_of(function: Function, x: Tensor, weight: Tensor, reach: tuple[int, int]) -> Tensor:
    """``function(x, weight)`` of whole numbers, exact.

    Args:
        function: A product of both: F.linear, or a convolution with its options.
        x: Whole numbers; float32 only where no sum reaches 2^24.
        weight: Whole numbers of the same dtype.
        reach: The least and the largest value of `x` that there can be.
    """
    compiling = torch.compiler.is_compiling()
    if x.device.type == "cpu" and compiling:
        return function(x, weight)
    geometry = _geometry(function, weight) if x.device.type in _FAST else None
    narrow = x.dtype == torch.float32 and max(map(abs, reach)) <= _FITS
    if geometry is not None and narrow and x.numel():
        key = (
            geometry,
            tuple(weight.shape),
            tuple(x.shape),
            x.stride(),
            str(x.device),
            _switches(),
        )
        if key not in _PROVEN and not compiling and not _capturing(x):
            _PROVEN[key] = _proved(geometry, function, x, weight, reach)
        if _PROVEN.get(key, False):
            return _fast(function, x, weight)
    if compiling:  # no switch can be set in a compiled graph; float64 is exact behind a rounding
        return torch.round(function(x.double(), weight.double()))
    with direct_sums():
        return function(x, weight)


@dataclass(frozen=True)
class _Geometry:
    """How a convolution walks; all () for linear."""

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1


def _geometry(function: Function, weight: Tensor) -> _Geometry | None:
    """None where no sample can be recomputed: transposed, or padded by another mode."""
    if function is F.linear:
        return _Geometry()
    if not isinstance(function, functools.partial) or function.func not in _CONVOLUTIONS:
        return None
    dims, options = weight.dim() - 2, function.keywords
    steps = [options.get(name, 1) for name in ("stride", "padding", "dilation")]
    if any(isinstance(step, str) for step in steps):
        return None
    walk = [tuple(s) if isinstance(s, list | tuple) else (s,) * dims for s in steps]
    return _Geometry(walk[0], walk[1], walk[2], options.get("groups", 1))


def _fast(function: Function, x: Tensor, weight: Tensor) -> Tensor:
    layout = _LAST.get(x.dim(), torch.contiguous_format)
    if torch.compiler.is_compiling():  # by the switches of the moment, which the proof has seen
        return function(x.contiguous(memory_format=layout), weight)
    with tensor_float32():
        return function(x.contiguous(memory_format=layout), weight)


def _switches() -> tuple[Any, ...]:
    """What picks an algorithm."""
    cudnn = torch.backends.cudnn
    return (
        bool(cudnn.enabled),
        bool(cudnn.benchmark),
        bool(cudnn.deterministic),
        torch.are_deterministic_algorithms_enabled(),
    )


def _capturing(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _proved(
    geometry: _Geometry, function: Function, x: Tensor, weight: Tensor, reach: tuple[int, int]
) -> bool:
    """Whether a sample of the fast way's outputs on extreme values are the sums in int64."""
    noise = torch.arange(x.numel(), device="cpu") * 2654435761 % 4294967291
    extreme = torch.where(noise.reshape(x.shape) % 2 == 0, reach[0], reach[1])
    given = torch.empty_like(x).copy_(extreme.to(x.dtype))
    found = _fast(function, given, weight)
    outputs = weight.shape[0]
    rows = found.reshape(-1, outputs) if not geometry.stride else found.movedim(1, -1)
    places = rows.shape[:-1]
    count = min(math.prod(places), -(-SAMPLED // outputs))
    chosen = torch.linspace(0, math.prod(places) - 1, count, device="cpu").round().long()
    at = torch.unravel_index(chosen, places)
    there = tuple(a.to(x.device) for a in at)
    wanted = _wanted(geometry, extreme, weight.cpu().long(), at)
    return torch.equal(rows[there].cpu().double(), wanted.double())


def _wanted(geometry: _Geometry, x: Tensor, weight: Tensor, at: tuple[Tensor, ...]) -> Tensor:
    """The sums in int64 at some places, (places, outputs)."""
    if not geometry.stride:
        return x.reshape(-1, x.shape[-1])[at[0]].long() @ weight.T
    sides = [n for p in reversed(geometry.padding) for n in (p, p)]
    padded = F.pad(x.long(), sides)
    index: list[Any] = [at[0].reshape(-1, *(1 for _ in geometry.stride))]
    for axis, (start, step, apart) in enumerate(
        zip(at[1:], geometry.stride, geometry.dilation, strict=True)
    ):
        taps = start[:, None] * step + torch.arange(weight.shape[2 + axis], device="cpu") * apart
        shape = [len(start)] + [1] * len(geometry.stride)
        shape[1 + axis] = -1
        index.append(taps.reshape(shape))
    patches = padded.movedim(1, -1)[tuple(index)].movedim(-1, 1)  # (places, channels, *kernel)
    parts = zip(
        patches.reshape(len(patches), geometry.groups, -1).unbind(1),
        weight.reshape(geometry.groups, -1, math.prod(weight.shape[1:])).unbind(0),
        strict=True,
    )
    return torch.cat([rows @ own.T for rows, own in parts], 1)

"""Convolution, transposed convolution and linear: exact integer sums, then requantization."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxqfix.engines._accumulate import Accumulator, by_output, largest_sum
from fxqfix.engines._base import Call, kernel
from fxqfix.engines._lost import Lost, Walk
from fxqfix.engines._requantize import Fbgemm, Onednn, Qnnpack, Weighted
from fxqfix.engines.saturation import pairing, raw_rows, saturation_possible

__all__ = ["accumulator_bound", "build_conv", "build_linear", "integer_weight"]

_ALL = ("fbgemm", "onednn", "qnnpack")
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_ENGINE: dict[str, type[Weighted]] = {"fbgemm": Fbgemm, "onednn": Onednn, "qnnpack": Qnnpack}


def integer_weight(call: Call) -> Tensor:
    """The weight's codes with their zero points taken off, int32."""
    if call.weight is None:
        raise call.refuse("its weight can't be read")
    weight = call.weight.checked(f"node {call.node!r}")
    codes, qparams = weight.codes.to(torch.int32), weight.qparams
    if any(float(z) % 1 for z in qparams.zero_points):
        raise call.refuse("zero points of its weight are not whole")
    points = torch.tensor(qparams.zero_points, dtype=torch.int32)
    if qparams.axis is None:
        return codes - points
    shape = [1] * codes.dim()
    shape[qparams.axis] = -1
    return codes - points.reshape(shape)


def accumulator_bound(call: Call) -> int | None:
    """Largest sum of products, in absolute value, that a call's integers allow; None without one.

    Source:
        ``max |q - zp| * max over outputs of sum |w|``, with every code of the container.

    Example:
        >>> accumulator_bound(Call("n", "qnnpack", "relu")) is None
        True
    """
    if call.weight is None or not call.qparams or call.qparams[0] is None:
        return None
    weight = integer_weight(call)
    rows = by_output(weight, call.option("groups", 1)) if call.spec.transposed else weight
    return largest_sum(rows, call.source)


def _options(call: Call, dims: int, *more: str) -> dict[str, Any]:
    """Groups, and stride, padding, dilation of the last `dims` axes: a packed conv1d has two."""
    found: dict[str, Any] = {"groups": call.option("groups", 1)}
    for name in ("stride", "padding", "dilation", *more):
        value = call.option(name)
        found[name] = list(value)[-dims:] if isinstance(value, list | tuple) else value
    return found


def _padded(
    function: Callable[..., Tensor], padding: list[int], mode: str, x: Tensor, weight: Tensor
) -> Tensor:
    return function(F.pad(x, padding, mode=mode), weight)


def _convolution(call: Call, dims: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The call's convolution of float tensors, without bias."""
    options = _options(call, dims)
    mode = call.option("padding_mode", "zeros")
    if mode == "zeros" or call.module is None:
        return functools.partial(_CONV[dims], **options)
    padding = [n for n in reversed(options["padding"]) for _ in range(2)]
    function = functools.partial(_CONV[dims], **{**options, "padding": 0})
    return functools.partial(_padded, function, padding, mode)


def _lost(call: Call, walk: Walk) -> Lost | None:
    """What saturation takes from the sums; None where it can't happen."""
    if not saturation_possible(call):
        return None
    if pairing(call) == "open":
        raise call.refuse(
            "pairs of products can leave 16 bits, and no row says which make a pair at level "
            f"{call.isa.onednn!r}"
        )
    point, lift = int(call.source.zero_points[0]), -call.source.container[0]
    return Lost(raw_rows(call), point, lift, walk, pairing(call))


def _check(call: Call) -> None:
    """Refuse what the kernel refuses."""
    signed = call.engine == "onednn" and call.key.startswith("linear")
    if call.source.dtype != torch.quint8 and not signed:
        raise call.refuse(f"its kernel takes no {call.source.dtype}")


def build_linear(call: Call, engine: Callable[..., nn.Module]) -> nn.Module:
    """The module of a linear op."""
    _check(call)
    accumulate = Accumulator(F.linear, integer_weight(call), call.source, input_axis=-1)
    return engine(call, accumulate, 0, _lost(call, Walk()))


def build_conv(call: Call, engine: type[Weighted]) -> nn.Module:
    """The module of a convolution."""
    _check(call)
    weight, groups = integer_weight(call), call.option("groups", 1)
    dims = weight.dim() - 2
    accumulate = Accumulator(_convolution(call, dims), weight, call.source, groups=groups)
    return engine(call, accumulate, dims, _lost(call, _walk(call, dims)))


@kernel("linear", engines=_ALL)
def _linear(call: Call) -> nn.Module:
    return build_linear(call, _ENGINE[call.engine])


@kernel("conv1d", "conv2d", "conv3d", engines=_ALL)
def _conv(call: Call) -> nn.Module:
    return build_conv(call, _ENGINE[call.engine])


@kernel("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", engines=_ALL)
def _conv_transpose(call: Call) -> nn.Module:
    _check(call)
    dims, groups = call.spec.dims, call.option("groups", 1)
    if groups > 1 and call.weight is not None and call.weight.qparams.axis is not None:
        raise call.refuse("per-channel weights in groups have a scale for each output of one group")
    function = functools.partial(_TRANSPOSED[dims], **_options(call, dims, "output_padding"))
    weight = integer_weight(call)
    accumulate = Accumulator(function, weight, call.source, transposed=True, groups=groups)
    return _ENGINE[call.engine](call, accumulate, dims, _lost(call, _walk(call, dims)))


def _walk(call: Call, dims: int) -> Walk:
    transposed = call.spec.transposed
    options = _options(call, dims, *(("output_padding",) if transposed else ()))
    mode = call.option("padding_mode", "zeros") if call.module is not None else "zeros"
    tuples = {k: tuple(v) for k, v in options.items() if k != "groups"}
    return Walk(**tuples, groups=options["groups"], transposed=transposed, mode=mode)

"""What an op is on real values, by its key and options alone: no model, no kernel.

The forms run in the dtype that they are given: float32 is what a decomposed graph computes, float64
what an engine's own roundings are held against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxqfix._settings import direct_sums

__all__ = ["FORMS", "MOVES", "convolution", "key_of", "pooled"]

Options = Mapping[str, Any]
Form = Callable[[Options, Sequence[Tensor]], Any]

_CONVS: dict[str, Callable[..., Tensor]] = {
    "conv1d": F.conv1d,
    "conv2d": F.conv2d,
    "conv3d": F.conv3d,
    "conv_transpose1d": F.conv_transpose1d,
    "conv_transpose2d": F.conv_transpose2d,
    "conv_transpose3d": F.conv_transpose3d,
}
_CONV_OPTIONS = ("stride", "padding", "dilation", "groups", "output_padding")


def key_of(op: str) -> tuple[str, bool]:
    """The key of an op's row, and whether a relu is fused behind it.

    Example:
        >>> key_of("conv2d_relu"), key_of("leaky_relu")
        (('conv2d', True), ('leaky_relu', False))
    """
    if op in ("relu", "leaky_relu", "linear_leaky_relu") or not op.endswith("_relu"):
        return op, False
    return op.removesuffix("_relu"), True


def convolution(
    key: str, options: Options, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """A linear op or a convolution of float tensors, summed directly.

    Args:
        key: The row's key.
        options: Stride, padding and the like, one number per axis.
        x: Input.
        weight: Weight in torch's layout.
        bias: Bias or None.
    """
    if key == "linear":
        return F.linear(x, weight, bias)
    taken = {name: options[name] for name in _CONV_OPTIONS if name in options}
    mode = options.get("padding_mode", "zeros")
    if mode != "zeros":
        margin = [n for n in reversed(taken["padding"]) for _ in range(2)]
        x, taken = F.pad(x, margin, mode=mode), {**taken, "padding": 0}
    with direct_sums():
        return _CONVS[key](x, weight, bias, **taken)


def pooled(options: Options) -> dict[str, Any]:
    """The options that pools take."""
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    more = ("count_include_pad", "divisor_override")
    return {n: options[n] for n in (*names, *more) if options.get(n) is not None}


def _scalar(o: Options) -> float:
    return float(o["b"] if "b" in o else o["other"])


def _two(function: Callable[[Any, Any], Tensor]) -> Form:
    return lambda o, xs: function(xs[0], xs[1] if len(xs) > 1 else _scalar(o))


def _one(function: Callable[[Tensor], Tensor]) -> Form:
    return lambda o, xs: function(xs[0])


def _pool(function: Callable[..., Tensor]) -> Form:
    return lambda o, xs: function(xs[0], **pooled(o))


def _adaptive(function: Callable[..., Tensor]) -> Form:
    return lambda o, xs: function(xs[0], o["output_size"])


def _dims(o: Options) -> Any:
    dim = o["dim"]
    return dim if isinstance(dim, int) else list(dim)


def _clamp(o: Options, xs: Sequence[Tensor]) -> Tensor:
    return xs[0].clamp(o.get("min"), o.get("max"))


FORMS: dict[str, Form] = {
    "add": _two(torch.add),
    "mul": _two(torch.mul),
    "sub": _two(torch.sub),
    "div": _two(torch.div),
    "add_scalar": _two(torch.add),
    "mul_scalar": _two(torch.mul),
    "matmul": lambda o, xs: xs[0] @ xs[1],
    "cat": lambda o, xs: torch.cat(list(xs), o.get("dim", 0)),
    "relu": _one(torch.relu),
    "relu6": _one(F.relu6),
    "hardtanh": lambda o, xs: F.hardtanh(xs[0], o.get("min_val", -1.0), o.get("max_val", 1.0)),
    "clamp": _clamp,
    "hardswish": _one(F.hardswish),
    "hardsigmoid": _one(F.hardsigmoid),
    "sigmoid": _one(torch.sigmoid),
    "tanh": _one(torch.tanh),
    "silu": _one(F.silu),
    "gelu": lambda o, xs: F.gelu(xs[0], approximate=o.get("approximate", "none")),
    "elu": lambda o, xs: F.elu(xs[0], o.get("alpha", 1.0)),
    "celu": lambda o, xs: F.celu(xs[0], o.get("alpha", 1.0)),
    "leaky_relu": lambda o, xs: F.leaky_relu(xs[0], o.get("negative_slope", 0.01)),
    "threshold": lambda o, xs: F.threshold(xs[0], o["threshold"], o["value"]),
    "softmax": lambda o, xs: torch.softmax(xs[0], o["dim"]),
    "max_pool1d": _pool(F.max_pool1d),
    "max_pool2d": _pool(F.max_pool2d),
    "max_pool3d": _pool(F.max_pool3d),
    "avg_pool1d": _pool(F.avg_pool1d),
    "avg_pool2d": _pool(F.avg_pool2d),
    "avg_pool3d": _pool(F.avg_pool3d),
    "adaptive_avg_pool1d": _adaptive(F.adaptive_avg_pool1d),
    "adaptive_avg_pool2d": _adaptive(F.adaptive_avg_pool2d),
    "adaptive_avg_pool3d": _adaptive(F.adaptive_avg_pool3d),
    "mean": lambda o, xs: xs[0].mean(_dims(o), keepdim=o.get("keepdim", False)),
}
"""Key of a row -> what it is on real values: (options, inputs) -> result."""


def _reshape(o: Options, x: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    given = o.get("shape", o.get("size"))
    target = given if given is not None else shape
    if target is None:
        raise KeyError("its sizes are computed by the model")
    if isinstance(target, int):
        target = (target,)
    return x.reshape(list(target))


def _squeeze(o: Options, x: Tensor) -> Tensor:
    return x.squeeze() if o.get("dim") is None else x.squeeze(o["dim"])


def _transpose(o: Options, x: Tensor) -> Tensor:
    pair = [o[n] for n in ("dim0", "dim1", "axis0", "axis1") if n in o]
    return x.transpose(*pair) if pair else x.t()


def _permute(o: Options, x: Tensor) -> Tensor:
    if "dims" in o:
        return x.permute(o["dims"])
    return x.movedim(o["source"], o["destination"])


def _unflatten(o: Options, x: Tensor) -> Tensor:
    sizes = o.get("unflattened_size", o.get("sizes"))
    if sizes is None:
        raise KeyError("its sizes are not among its options")
    found: Tensor = torch.unflatten(x, o["dim"], sizes)
    return found


def _pixel_shuffle(o: Options, x: Tensor) -> Tensor:
    if "downscale_factor" in o:
        return F.pixel_unshuffle(x, o["downscale_factor"])
    return F.pixel_shuffle(x, o["upscale_factor"])


def _chunk(o: Options, x: Tensor) -> tuple[Tensor, ...]:
    return x.chunk(o["chunks"], o.get("dim", 0))


def _split(o: Options, x: Tensor) -> tuple[Tensor, ...]:
    size = next(o[n] for n in ("split_size", "split_size_or_sections", "split_sizes") if n in o)
    sizes = size if isinstance(size, int) else list(size)
    return torch.ops.aten.split(x, sizes, o.get("dim", 0))  # type: ignore[no-any-return]  # torch's own op


def _flatten(o: Options, x: Tensor) -> Tensor:
    return x.flatten(o.get("start_dim", 0), o.get("end_dim", -1))


Move = Callable[[Options, Any, "tuple[int, ...] | None"], Any]

MOVES: dict[str, Move] = {
    "identity": lambda o, x, s: x,
    "dropout": lambda o, x, s: x,
    "contiguous": lambda o, x, s: x,
    "flatten": lambda o, x, s: _flatten(o, x),
    "unflatten": lambda o, x, s: _unflatten(o, x),
    "reshape": _reshape,
    "permute": lambda o, x, s: _permute(o, x),
    "transpose": lambda o, x, s: _transpose(o, x),
    "squeeze": lambda o, x, s: _squeeze(o, x),
    "unsqueeze": lambda o, x, s: x.unsqueeze(o["dim"]),
    "pixel_shuffle": lambda o, x, s: _pixel_shuffle(o, x),
    "channel_shuffle": lambda o, x, s: F.channel_shuffle(x, o["groups"]),
    "chunk": lambda o, x, s: _chunk(o, x),
    "split": lambda o, x, s: _split(o, x),
    "unbind": lambda o, x, s: x.unbind(o.get("dim", 0)),
    "getitem": lambda o, x, s: x[o["b"]],
}
"""Key of a row that moves values -> (options, input, the result's shape where it is known)."""

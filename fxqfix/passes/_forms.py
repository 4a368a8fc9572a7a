"""The float form of every op that a rewrite to decomposed ops has to spell out.

Ops that compute on floats under the name that they have in the graph need no entry: they keep
their node. Entries are for modules with quantized weights and for kernels that exist on quantized
tensors only. Each is a function of an `Emit`, keyed by the op table's row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxqfix import _torch
from fxqfix._devices import device_of
from fxqfix.dialects.int8 import bound
from fxqfix.dialects.weights import WeightView
from fxqfix.errors import UnsupportedError
from fxqfix.ops import Match
from fxqfix.passes._base import Rewriter
from fxqfix.qparams import QParams

__all__ = ["Emit", "emit_float", "has_form"]


@dataclass
class Emit:
    """Everything that a form needs to write its nodes.

    Attributes:
        rewriter: Where nodes and buffers go; its insertion point is set by the caller.
        name: Name for the last node, that of the op being rewritten.
        args: The op's arguments, with float nodes for tensors.
        kwargs: Its keyword arguments, likewise.
        source: The module, or for an op with packed weights the packed object; None without.
        weight: Its integer weight, where it has one.
        relu: Whether a relu is fused.
        module: For a module, all of it: of a fused one `source` is only the part with the weight.
        given: For a kernel, its arguments by name.
    """

    rewriter: Rewriter
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    source: Any = None
    weight: WeightView | None = None
    relu: bool = False
    module: nn.Module | None = None
    given: Mapping[str, Any] = field(default_factory=dict)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call; the last one of a form gets the op's own name from `emit_float`."""
        label = str(getattr(target, "__name__", "op")).strip("_")
        return self.rewriter.call(target, args, f"{self.name}_{label}", **kwargs)

    def constant(self, suffix: str, value: Tensor | None) -> fx.Node | None:
        """A buffer's node; None for None."""
        if value is None:
            return None
        return self.rewriter.buffer_node(f"{self.name}_{suffix}", value.detach().clone())

    def options(self, *names: str) -> dict[str, Any]:
        """Options by name, of the module or of the kernel; those that it lacks are left out."""
        if self.module is None:
            return {n: self.given[n] for n in names if n in self.given}
        return {n: getattr(self.module, n) for n in names if hasattr(self.module, n)}

    def weight_node(self) -> fx.Node:
        """Integer weight buffer and the dequantize behind it."""
        assert self.weight is not None  # forms with weights are called with one
        codes = self.weight.codes.to(self.weight.qparams.storage)
        node = self.rewriter.buffer_node(f"{self.name}_weight", codes)
        return dequantize_node(self.rewriter, node, self.weight.qparams, self.name + "_weight")


def qparams_arguments(rewriter: Rewriter, qparams: QParams, name: str) -> tuple[Any, ...]:
    """Arguments of a decomposed op behind its input; per-channel ones read buffers."""
    low, high, dtype = qparams.quant_min, qparams.quant_max, qparams.storage
    if qparams.axis is None:
        return (qparams.scale, qparams.zero_point, low, high, dtype)
    device = device_of(rewriter.module)
    points = torch.tensor(qparams.zero_points, device=device)
    points = points.float() if points.is_floating_point() else points.to(torch.int64)
    scale = rewriter.buffer_node(f"{name}_scale", torch.tensor(qparams.scales, device=device))
    point = rewriter.buffer_node(f"{name}_zero_point", points)
    return (scale, point, qparams.axis, low, high, dtype)


def quantize_node(rewriter: Rewriter, x: fx.Node, qparams: QParams, name: str) -> fx.Node:
    """Append the decomposed quantize and dequantize of a value; returns the dequantize."""
    ops = _torch.decomposed()
    given = qparams_arguments(rewriter, qparams, name)
    if qparams.axis is None:
        codes = rewriter.call(ops.quantize_per_tensor.default, (x, *given), f"{name}_quantize")
        target = ops.dequantize_per_tensor.default
    else:
        codes = rewriter.call(ops.quantize_per_channel.default, (x, *given), f"{name}_quantize")
        target = ops.dequantize_per_channel.default
    return rewriter.call(target, (codes, *given), f"{name}_dequantize")


def dequantize_node(rewriter: Rewriter, x: fx.Node, qparams: QParams, name: str) -> fx.Node:
    """Append the decomposed dequantize of integer codes."""
    ops = _torch.decomposed()
    per_tensor = qparams.axis is None
    target = ops.dequantize_per_tensor if per_tensor else ops.dequantize_per_channel
    given = qparams_arguments(rewriter, qparams, name)
    return rewriter.call(target.default, (x, *given), f"{name}_dequantize")


Form = Callable[[Emit], fx.Node]


def _conv(function: Callable[..., Tensor], dim: int) -> Form:
    def form(e: Emit) -> fx.Node:
        given = _attributes(e.source, dim, "stride", "padding", "dilation", "groups")
        x = e.args[0]
        mode = getattr(e.source, "padding_mode", "zeros")
        if mode != "zeros":
            x = e.call(F.pad, x, _wrap_padding(e.source, dim), mode=mode)
            given["padding"] = 0
        bias = e.constant("bias", e.weight.bias if e.weight else None)
        return e.call(function, x, e.weight_node(), bias, **given)

    return form


def _wrap_padding(source: Any, dim: int) -> list[int]:
    if hasattr(source, "_reversed_padding_repeated_twice") and source.padding == "same":
        return _torch.reversed_padding(source)
    padding = source.padding if isinstance(source.padding, tuple) else (source.padding,) * dim
    return [p for p in reversed(padding) for _ in range(2)]


def _conv_transpose(function: Callable[..., Tensor], dim: int) -> Form:
    def form(e: Emit) -> fx.Node:
        names = ("stride", "padding", "output_padding", "groups", "dilation")
        bias = e.constant("bias", e.weight.bias if e.weight else None)
        given = _attributes(e.source, dim, *names)
        return e.call(function, e.args[0], e.weight_node(), bias, **given)

    return form


def _attributes(source: Any, dim: int, *names: str) -> dict[str, Any]:
    """Convolution options of a module, or of a packed object, whose options are methods.

    A convolution of one dimension is packed as one of two: its own options come last.
    """
    found: dict[str, Any] = {}
    for name in names:
        value = getattr(source, name, None)
        if callable(value):
            value = value()
        if value is not None:
            found[name] = tuple(value)[-dim:] if isinstance(value, (list, tuple)) else value
    return found


def _linear(e: Emit) -> fx.Node:
    bias = e.constant("bias", e.weight.bias if e.weight else None)
    return e.call(F.linear, e.args[0], e.weight_node(), bias)


def _linear_then(function: Callable[..., Any], *options: str) -> Form:
    def form(e: Emit) -> fx.Node:
        given = e.options(*options)
        if isinstance(e.module, nn.Sequential):  # the float fusion holds the activation itself
            given = {n: getattr(e.module[1], n) for n in options}
        return e.call(function, _linear(e), **given)

    return form


def _embedding(e: Emit) -> fx.Node:
    names = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    given = {n: v for n, v in e.options(*names).items() if v is not None}
    return e.call(F.embedding, e.given.get("indices", e.args[0]), e.weight_node(), **given)


def _embedding_bag(e: Emit) -> fx.Node:
    names = ("max_norm", "norm_type", "scale_grad_by_freq", "sparse", "include_last_offset")
    given = e.options(*names, "padding_idx", "mode")
    inputs = ("indices", "offsets", "per_sample_weights")
    if e.module is None:
        given |= {n: e.given[n] for n in inputs if n in e.given}
    else:
        given |= {**dict(zip(inputs, e.args, strict=False)), **e.kwargs}
    x = given.pop("indices", given.pop("input", None))
    if given.setdefault("mode", "sum") == 0:  # the kernels know sums only
        given["mode"] = "sum"
    given = {n: v for n, v in given.items() if v is not None}
    return e.call(F.embedding_bag, x, e.weight_node(), **given)


def _conv_add(e: Emit) -> fx.Node:
    return e.call(torch.add, _conv(F.conv2d, 2)(e), e.args[1])


def _binary(function: Callable[..., Any]) -> Form:
    return lambda e: e.call(function, e.args[0], e.args[1])


def _cat(e: Emit) -> fx.Node:
    return e.call(torch.cat, e.args[0], e.given["dim"])


def _unary(function: Callable[..., Any], *options: str) -> Form:
    """X -> function(x, options)."""
    return lambda e: e.call(function, e.args[0], **e.options(*options))


def _norm(function: Callable[..., Any], *options: str) -> Form:
    """layer_norm(x, shape, weight, bias, eps) and the like; weight and bias are float tensors."""

    def form(e: Emit) -> fx.Node:
        given = e.options(*options, "weight", "bias", "eps")
        if e.module is not None:
            given |= {n: e.constant(n, given[n]) for n in ("weight", "bias")}
        return e.call(function, e.args[0], **given)

    return form


def _batch_norm(e: Emit) -> fx.Node:
    if e.module is None:
        names = ("mean", "var", "weight", "bias")
        parts = [e.given[n] for n in names]
        eps = e.given["eps"]
    else:
        module: Any = e.module
        names = ("running_mean", "running_var", "weight", "bias")
        parts = [e.constant(n, getattr(module, n)) for n in names]
        eps = module.eps
    return e.call(F.batch_norm, e.args[0], *parts, False, 0.0, eps)


def _prelu(e: Emit) -> fx.Node:
    if e.module is None:
        return e.call(F.prelu, e.args[0], e.call(torch.dequantize, e.given["weight"]))
    weight: Any = e.module.weight
    return e.call(F.prelu, e.args[0], e.constant("weight", weight.dequantize()))


def _dropout(e: Emit) -> fx.Node:
    # torch's quantized ones never drop anything, in train mode neither.
    return e.call(torch.nn.functional.dropout, e.args[0], 0.5, False)


_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")

_FORMS: dict[str, Form] = {
    **{f"conv{d}d": _conv(getattr(F, f"conv{d}d"), d) for d in (1, 2, 3)},
    **{
        f"conv_transpose{d}d": _conv_transpose(getattr(F, f"conv_transpose{d}d"), d)
        for d in (1, 2, 3)
    },
    "linear": _linear,
    "linear_leaky_relu": _linear_then(F.leaky_relu, "negative_slope"),
    "linear_tanh": _linear_then(torch.tanh),
    "conv2d_add": _conv_add,
    "embedding": _embedding,
    "embedding_bag": _embedding_bag,
    "add": _binary(torch.add),
    "mul": _binary(torch.mul),
    "add_scalar": _binary(torch.add),
    "mul_scalar": _binary(torch.mul),
    "matmul": _binary(torch.matmul),
    "cat": _cat,
    "relu6": _unary(F.relu6),
    "clamp": _unary(torch.clamp, "min", "max"),
    "threshold": _unary(F.threshold, "threshold", "value"),
    "hardswish": _unary(F.hardswish),
    "sigmoid": _unary(torch.sigmoid),
    "softmax": _unary(F.softmax, "dim"),
    "leaky_relu": _unary(F.leaky_relu, "negative_slope"),
    "elu": _unary(F.elu, "alpha"),
    "celu": _unary(F.celu, "alpha"),
    "prelu": _prelu,
    "layer_norm": _norm(F.layer_norm, "normalized_shape"),
    "group_norm": _norm(F.group_norm, "num_groups"),
    "instance_norm": _norm(F.instance_norm),
    **{f"batch_norm{n}": _batch_norm for n in ("", "1d", "2d", "3d")},
    "max_pool1d": _unary(F.max_pool1d, *_POOL),
    "max_pool2d": _unary(F.max_pool2d, *_POOL),
    "dropout": _dropout,
}


def has_form(key: str) -> bool:
    """Whether an op of the table has a float form of its own."""
    return key in _FORMS


def emit_float(emit: Emit, found: Match, old: fx.Node) -> fx.Node:
    """Write the float form of `old` before it and return the node with its value.

    Raises:
        UnsupportedError: The op has no float form.
    """
    form = _FORMS.get(found.spec.key)
    if form is None:
        raise UnsupportedError(
            f"{found.key} has no float form",
            where=f"decompose-quantize, node {old.name}",
            found=old.format_node(),
            remedy="pass the prepared model, whose ops are float ones; or leave this op in float",
        )
    if old.op == "call_module":
        emit.module = emit.rewriter.graph_module.get_submodule(str(old.target))
    else:
        emit.given = bound(old)
    node = form(emit)
    return emit.call(F.relu, node) if emit.relu else node

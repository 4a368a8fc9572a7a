"""Calls of int8 kernels as people write them by hand, each with its float meaning in plain torch.

No flow of torch emits some of these kernels, and the flows call none of them with numbers in place
of tensors; a graph that a user wrote does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CALLS", "GRID", "Call", "Handwritten"]

GRID = (0.05, 60)  # scale and zero point of the input
OWN = (0.04, 50)  # of the output, where a kernel takes them
SHAPE = (2, 4, 8, 8)

K = torch.ops.quantized


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        name: As in the test's id.
        row: Key of the op table's row, with "_relu" where one is fused.
        kernel: (module, quantized tensor) -> quantized tensor.
        meaning: (module, float tensor) -> float tensor.
        output: "own", "input", "scalar" or "float": whose grid the output has.
        shape: Of the input.
        parts: Makes what the module holds: packed weights, tensors.
    """

    name: str
    row: str
    kernel: Callable[[Any, Tensor], Tensor]
    meaning: Callable[[Any, Tensor], Tensor]
    output: str = "own"
    shape: tuple[int, ...] = SHAPE
    parts: Callable[[], dict[str, Any]] = dict


class Handwritten(nn.Module):
    """quantize -> kernel -> dequantize."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call
        for name, part in call.parts().items():
            if isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.quantize_per_tensor(x, *GRID, torch.quint8)
        out = self.call.kernel(self, x)
        return out if self.call.output == "float" else out.dequantize()


Function = Callable[..., Tensor]


def _arithmetic(name: str, function: Function, suffix: str, end: Function) -> Iterator[Call]:
    op, scalar = getattr(K, name + suffix), getattr(K, f"{name}_scalar{suffix}")
    yield Call(
        name + suffix,
        name + suffix,
        lambda m, q: op(q, q, *OWN),
        lambda m, x: end(function(x, x)),
    )
    for place, row, call in (
        ("behind", name, lambda m, q: op(q, 0.75)),
        ("before", name, lambda m, q: op(0.75, q)),
        ("scalar", f"{name}_scalar", lambda m, q: scalar(q, 0.75)),
    ):
        yield Call(
            f"{name}{suffix}-{place}",
            row + suffix,
            call,
            lambda m, x: end(function(x, 0.75)),
            output="scalar",
        )


def _out() -> dict[str, Any]:
    return {"out": torch.quantize_per_tensor(torch.zeros(SHAPE), *OWN, torch.quint8)}


def _written(name: str, function: Function, suffix: str, end: Function) -> Iterator[Call]:
    """Kernels that write to a tensor that is there already."""
    op, scalar = getattr(K, f"{name}{suffix}_out"), getattr(K, f"{name}_scalar{suffix}_out")
    yield Call(
        f"{name}{suffix}_out",
        name + suffix,
        lambda m, q: op(q, q, m.out),
        lambda m, x: end(function(x, x)),
        parts=_out,
    )
    yield Call(
        f"{name}_scalar{suffix}_out",
        f"{name}_scalar{suffix}",
        lambda m, q: scalar(q, 0.75, m.out),
        lambda m, x: end(function(x, 0.75)),
        output="scalar",
        parts=_out,
    )


def _cat_out(suffix: str, end: Function) -> Call:
    op = getattr(K, f"cat{suffix}_out")
    return Call(
        f"cat{suffix}_out",
        f"cat{suffix}",
        lambda m, q: op([q[:, :1], q[:, 1:]], 1, m.out),
        lambda m, x: end(torch.cat([x[:, :1], x[:, 1:]], 1)),
        parts=_out,
    )


def _cat(suffix: str, end: Function) -> Call:
    name, op = f"cat{suffix}", getattr(K, f"cat{suffix}")
    return Call(
        name,
        name,
        lambda m, q: op([q, q], 1, *OWN),
        lambda m, x: end(torch.cat([x, x], 1)),
    )


def _binaries() -> Iterator[Call]:
    for suffix, end in (("", torch.clone), ("_relu", F.relu)):
        yield from _arithmetic("add", torch.add, suffix, end)
        yield from _arithmetic("mul", torch.mul, suffix, end)
        yield from _written("add", torch.add, suffix, end)
        yield from _written("mul", torch.mul, suffix, end)
        yield _cat(suffix, end)
        yield _cat_out(suffix, end)
    yield Call("matmul", "matmul", lambda m, q: K.matmul(q, q, *OWN), lambda m, x: x @ x)


def _activations() -> Iterator[Call]:
    yield Call("relu6", "relu6", lambda m, q: K.relu6(q), lambda m, x: F.relu6(x), "input")
    yield Call(
        "clamp",
        "clamp",
        lambda m, q: K.clamp(q, -0.5, 0.75),
        lambda m, x: torch.clamp(x, -0.5, 0.75),
        "input",
    )
    yield Call(
        "threshold",
        "threshold",
        lambda m, q: K.threshold(q, 0.25, 0.0),
        lambda m, x: F.threshold(x, 0.25, 0.0),
        "input",
    )
    yield Call(
        "hardswish", "hardswish", lambda m, q: K.hardswish(q, *OWN), lambda m, x: F.hardswish(x)
    )
    yield Call("sigmoid", "sigmoid", lambda m, q: K.sigmoid(q, *OWN), lambda m, x: torch.sigmoid(x))
    yield Call("elu", "elu", lambda m, q: K.elu(q, *OWN, 0.5), lambda m, x: F.elu(x, 0.5))
    yield Call("celu", "celu", lambda m, q: K.celu(q, *OWN, 0.5), lambda m, x: F.celu(x, 0.5))
    yield Call(
        "leaky_relu",
        "leaky_relu",
        lambda m, q: K.leaky_relu(q, 0.125, False, *OWN),
        lambda m, x: F.leaky_relu(x, 0.125),
    )
    yield Call(
        "prelu",
        "prelu",
        lambda m, q: K.prelu(q, m.slope, *OWN),
        lambda m, x: F.prelu(x, m.slope.dequantize()),
        parts=lambda: {
            "slope": torch.quantize_per_tensor(torch.tensor([0.25]), 0.01, 0, torch.quint8)
        },
    )
    yield Call(
        "softmax",
        "softmax",
        lambda m, q: K.softmax(q, 1, *OWN),
        lambda m, x: torch.softmax(x, 1),
    )
    yield Call(
        "dropout", "dropout", lambda m, q: K.dropout(q, *OWN, 0.5, True), lambda m, x: x, "input"
    )
    yield _max_pool(1, (2, 4, 8))
    yield _max_pool(2, SHAPE)


def _max_pool(d: int, shape: tuple[int, ...]) -> Call:
    name = f"max_pool{d}d"
    op, function = getattr(K, name), getattr(F, name)
    return Call(
        name,
        name,
        lambda m, q: op(q, [3] * d, [2] * d, [1] * d, [1] * d, True),
        lambda m, x: function(x, 3, 2, 1, 1, True),
        "input",
        shape,
    )


def _affine() -> dict[str, Any]:
    return {n: torch.rand(4) + 0.5 for n in ("weight", "bias", "mean", "var")}


def _batch_norm(name: str, shape: tuple[int, ...], end: Function) -> Call:
    op = getattr(K, name)
    return Call(
        name,
        name,
        lambda m, q: op(q, m.weight, m.bias, m.mean, m.var, 1e-3, *OWN),
        lambda m, x: end(F.batch_norm(x, m.mean, m.var, m.weight, m.bias, eps=1e-3)),
        shape=shape,
        parts=_affine,
    )


def _norms() -> Iterator[Call]:
    for name, shape in (
        ("batch_norm", SHAPE),
        ("batch_norm1d", (2, 4, 8)),
        ("batch_norm2d", SHAPE),
        ("batch_norm3d", (2, 4, 3, 4, 4)),
    ):
        yield _batch_norm(name, shape, torch.clone)
        yield _batch_norm(f"{name}_relu", shape, F.relu)
    yield Call(
        "layer_norm",
        "layer_norm",
        lambda m, q: K.layer_norm(q, [8, 8], None, None, 1e-3, *OWN),
        lambda m, x: F.layer_norm(x, [8, 8], eps=1e-3),
    )
    yield Call(
        "group_norm",
        "group_norm",
        lambda m, q: K.group_norm(q, 2, m.weight, m.bias, 1e-3, *OWN),
        lambda m, x: F.group_norm(x, 2, m.weight, m.bias, 1e-3),
        parts=_affine,
    )
    yield Call(
        "instance_norm",
        "instance_norm",
        lambda m, q: K.instance_norm(q, m.weight, m.bias, 1e-3, *OWN),
        lambda m, x: F.instance_norm(x, weight=m.weight, bias=m.bias, eps=1e-3),
        parts=_affine,
    )


def _weight(*shape: int) -> tuple[Tensor, Tensor]:
    weight = torch.quantize_per_tensor(torch.randn(shape), 0.02, 0, torch.qint8)
    return weight, torch.randn(shape[0])


def _packed_linear() -> dict[str, Any]:
    weight, bias = _weight(6, 8)
    return {"packed": K.linear_prepack(weight, bias), "real": weight.dequantize(), "bias": bias}


def _weighted_call(
    name: str,
    function: Function,
    options: tuple[Any, ...],
    shape: tuple[int, ...],
    parts: Callable[[], dict[str, Any]],
) -> Call:
    op, end = getattr(K, name), F.relu if name.endswith("_relu") else torch.clone
    return Call(
        name,
        name,
        lambda m, q: op(q, m.packed, *OWN),
        lambda m, x: end(function(x, m.real, m.bias, *options)),
        shape=shape,
        parts=parts,
    )


def _weighted() -> Iterator[Call]:
    for suffix in ("", "_relu"):
        yield _weighted_call(f"linear{suffix}", F.linear, (), (3, 8), _packed_linear)
    for d, shape in ((1, (2, 4, 8)), (2, SHAPE), (3, (1, 4, 4, 4, 4))):
        function, parts = getattr(F, f"conv{d}d"), functools.partial(_conv, d)
        for suffix in ("", "_relu"):
            yield _weighted_call(f"conv{d}d{suffix}", function, (2, 1, 1, 2), shape, parts)
        name, parts = f"conv_transpose{d}d", functools.partial(_conv_transpose, d)
        yield _weighted_call(name, getattr(F, name), (2, 1, 1), shape, parts)


def _conv(d: int) -> dict[str, Any]:
    weight, bias = _weight(4, 2, *([3] * d))
    prepack = getattr(K, f"conv{d}d_prepack")
    packed = prepack(weight, bias, [2] * d, [1] * d, [1] * d, 2)
    return {"packed": packed, "real": weight.dequantize(), "bias": bias}


def _conv_transpose(d: int) -> dict[str, Any]:
    weight, bias = _weight(4, 4, *([3] * d))
    prepack = getattr(K, f"conv_transpose{d}d_prepack")
    packed = prepack(weight, bias, [2] * d, [1] * d, [1] * d, [1] * d, 1)
    return {"packed": packed, "real": weight.dequantize(), "bias": bias}


CALLS: tuple[Call, ...] = (*_binaries(), *_activations(), *_norms(), *_weighted())

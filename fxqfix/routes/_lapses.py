"""What deployed kernels are known to compute otherwise, as float64 recomputations of a site.

Each name of `LAPSES` is a change to convolutions and linears that read codes. A
route lists those of its kernels; they are asked one after the other, each on top of those before
it, and a code belongs to the first with which it is what was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxqfix import ops
from fxqfix.dialects._constants import bias_node, constant
from fxqfix.dialects.decomposed import is_dequantize, qparams_of_op
from fxqfix.dialects.int8 import fetch
from fxqfix.engines._lost import Lost, Walk
from fxqfix.export._options import arguments_of
from fxqfix.export.requantize import int32_bias
from fxqfix.qparams import QParams, dequantize

__all__ = ["LAPSES", "lapsed"]

LAPSES: Mapping[str, str] = {
    "weight-int8": "a weight that the graph leaves in float is quantized to int8, per tensor",
    "bias-int32": "the bias is rounded to an int32 in units of the accumulator",
    "weight-zero-point": "the weight's zero point is taken for 0",
    "int16-saturation": "products of neighbouring weights of a kernel saturate in pairs at 16 bits",
    "int16-saturation-by-channel": "products of neighbouring channels saturate in pairs at 16 bits",
}
_KNOWN = ("linear", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)))


@dataclass(frozen=True)
class _Weighted:
    """A convolution or linear of codes and an integer weight, in a region.

    Attributes:
        dims: Axes that its kernel walks.
        arguments: Its arguments by name.
        source: The dequantize of its input.
        grid: The input's.
        weight: What it takes for its weight: the dequantize, or a float constant.
        codes: The weight's.
        weights: Their grid.
        transposed: Whether it is a transposed convolution, whose output channels stand second.
    """

    dims: int
    arguments: Mapping[str, Any]
    source: fx.Node
    grid: QParams
    weight: fx.Node
    codes: Tensor
    weights: QParams
    transposed: bool = False

    @property
    def scale(self) -> float:
        return self.grid.scales[0]

    @property
    def scales(self) -> Tensor:
        return torch.tensor(self.weights.scales, dtype=torch.float32)

    @property
    def steps(self) -> Tensor:
        """The accumulator's step per output channel, or one for all."""
        found = torch.tensor(self.scale, dtype=torch.float32) * self.scales
        # Of a transposed convolution in groups, the channels of one group have the scales.
        groups = self.arguments.get("groups", 1) if self.transposed and len(found) > 1 else 1
        return found.repeat(groups)

    @property
    def depthwise(self) -> bool:
        return self.codes.shape[1] == 1  # a linear of one input has no pairs either

    def walk(self) -> Walk | None:
        """How the kernel walks its input; None where it pads one side more than the other."""
        stride, padding, dilation = (
            (given,) * self.dims if isinstance(given, int) else given
            for given in (
                self.arguments.get(name, default)
                for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
            )
        )
        if isinstance(padding, str):
            sizes = zip(dilation, self.codes.shape[2:], strict=True)
            both = [d * (size - 1) if padding == "same" else 0 for d, size in sizes]
            if any(n % 2 for n in both):
                return None
            padding = [n // 2 for n in both]
        return Walk(tuple(stride), tuple(padding), tuple(dilation), self.arguments.get("groups", 1))


def _weighted(
    node: fx.Node, graph_module: fx.GraphModule, names: tuple[str, ...]
) -> _Weighted | None:
    found = ops.match_node(node, {}) if node.op == "call_function" else None
    if found is None or found.key not in _KNOWN or len(node.all_input_nodes) < 2:
        return None
    source, weight = node.all_input_nodes[:2]
    grid = qparams_of_op(source, graph_module) if is_dequantize(source) else None
    if grid is None or grid.axis is not None:
        return None
    held: tuple[Any, QParams | None] = None, None
    if is_dequantize(weight):
        held = fetch(graph_module, weight.args[0]), qparams_of_op(weight, graph_module)
    elif "weight-int8" in names and _is_constant(weight):
        held = _quantized(constant(graph_module, weight))
    codes, weights = held
    if weights is None or not isinstance(codes, Tensor):
        return None
    arguments = arguments_of(node, graph_module)
    dims, transposed = found.spec.dims, found.spec.transposed
    return _Weighted(dims, arguments, source, grid, weight, codes, weights, transposed)


def _is_constant(node: fx.Node) -> bool:
    """Whether a node of a region computes from parameters and buffers alone."""
    inputs = node.all_input_nodes
    return node.op == "get_attr" or (bool(inputs) and all(map(_is_constant, inputs)))


def _quantized(weight: Tensor) -> tuple[Tensor, QParams]:
    """As ONNX Runtime does it (its pass WeightBiasQuantization): one grid, with zero on it."""
    low, high = weight.float().min().clamp(max=0.0), weight.float().max().clamp(min=0.0)
    scale = (high - low) / 255
    scale = torch.where(scale > 0, scale, torch.ones(()))
    point = torch.round(-128 - low / scale)
    codes = (torch.round(weight.float() / scale) + point).clamp(-128, 127).to(torch.int8)
    return codes, QParams(float(scale), int(point), -128, 127, torch.int8)


def lapsed(interpreter: fx.Interpreter, node: fx.Node, names: tuple[str, ...]) -> Tensor | None:
    """What a node gives in float64 with these lapses; None where they say nothing of it.

    Args:
        interpreter: Runs the region, and holds the values of all nodes before this one.
        node: The node.
        names: Names of `LAPSES`.
    """
    graph_module: Any = interpreter.module
    found = _weighted(node, graph_module, names)
    if found is None:
        return None
    changed: dict[fx.Node, Tensor] = {}
    steps = found.steps
    if not is_dequantize(found.weight):
        changed[found.weight] = dequantize(found.codes, found.weights).double()
    if "weight-zero-point" in names:
        scale, _ = found.weights.tensors(found.codes)
        changed[found.weight] = found.codes.double() * scale.double()
    bias = bias_node(node)
    if bias is not None and "bias-int32" in names:
        rounded = int32_bias(interpreter.env[bias], 1.0, steps)
        changed[bias] = rounded.double() * steps.double()

    def value(n: fx.Node) -> Any:
        return changed.get(n, interpreter.env[n])

    args: Any = fx.map_arg(node.args, value)
    kwargs: Any = fx.map_arg(node.kwargs, value)
    result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    pairs = [name for name in names if name.startswith("int16-saturation")]
    walk = found.walk() if pairs and not found.transposed else None
    if walk is None or found.depthwise or found.grid.storage != torch.uint8:
        return result
    raw: Any = interpreter.env[found.source.all_input_nodes[0]]
    point = int(found.grid.zero_points[0])
    order = "flat"
    if pairs[-1].endswith("by-channel"):
        order = "channel" if found.dims else "halves"
    lost: Tensor = Lost(found.codes, point, 0, walk, order)(raw)
    return result - lost * steps.double().reshape(-1, *(1,) * found.dims)

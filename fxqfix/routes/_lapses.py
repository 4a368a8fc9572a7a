"""What deployed kernels are known to compute otherwise, as float64 recomputations of a site.

Each name of `LAPSES` is a change to convolutions and linears that read codes and integer weights. A
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
from fxqfix.dialects.decomposed import is_dequantize, qparams_of_op
from fxqfix.dialects.int8 import fetch
from fxqfix.engines._lost import Lost, Walk
from fxqfix.export._options import arguments_of
from fxqfix.export.requantize import int32_bias
from fxqfix.qparams import QParams

__all__ = ["LAPSES", "lapsed"]

LAPSES: Mapping[str, str] = {
    "bias-int32": "the bias is rounded to an int32 in units of the accumulator",
    "weight-zero-point": "the weight's zero point is taken for 0",
    "int16-saturation": "products of neighbouring weights of a kernel saturate in pairs at 16 bits",
    "int16-saturation-by-channel": "products of neighbouring channels saturate in pairs at 16 bits",
}
_DIMS = {"linear": 0, "conv1d": 1, "conv2d": 2, "conv3d": 3}


@dataclass(frozen=True)
class _Weighted:
    """A convolution or linear of codes and an integer weight, in a region.

    Attributes:
        dims: Axes that its kernel walks.
        arguments: Its arguments by name.
        source: The dequantize of its input.
        grid: The input's.
        weight: The dequantize of its weight.
        codes: The weight's.
        weights: Their grid.
    """

    dims: int
    arguments: Mapping[str, Any]
    source: fx.Node
    grid: QParams
    weight: fx.Node
    codes: Tensor
    weights: QParams

    @property
    def scale(self) -> float:
        return self.grid.scales[0]

    @property
    def scales(self) -> Tensor:
        return torch.tensor(self.weights.scales, dtype=torch.float32)

    @property
    def depthwise(self) -> bool:
        return self.codes.dim() > 2 and self.codes.shape[1] == 1

    def walk(self) -> Walk:
        """How the kernel walks its input."""
        stride, padding, dilation = (
            (given,) * self.dims if isinstance(given, int) else tuple(given)
            for given in (
                self.arguments.get(name, default)
                for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
            )
        )
        return Walk(stride, padding, dilation, self.arguments.get("groups", 1))


def _weighted(node: fx.Node, graph_module: fx.GraphModule) -> _Weighted | None:
    found = ops.match_node(node, {}) if node.op == "call_function" else None
    sources = [n for n in node.all_input_nodes if is_dequantize(n)]
    if found is None or found.key not in _DIMS or len(sources) < 2:
        return None
    arguments = arguments_of(node, graph_module)
    grid, weights = (qparams_of_op(n, graph_module) for n in sources[:2])
    codes = fetch(graph_module, sources[1].args[0])
    if grid is None or weights is None or isinstance(arguments.get("padding"), str):
        return None
    if not isinstance(codes, Tensor):
        return None
    return _Weighted(_DIMS[found.key], arguments, sources[0], grid, sources[1], codes, weights)


def lapsed(interpreter: fx.Interpreter, node: fx.Node, names: tuple[str, ...]) -> Tensor | None:
    """What a node gives in float64 with these lapses; None where they say nothing of it.

    Args:
        interpreter: Runs the region, and holds the values of all nodes before this one.
        node: The node.
        names: Names of `LAPSES`.
    """
    graph_module: Any = interpreter.module
    found = _weighted(node, graph_module)
    if found is None:
        return None
    changed: dict[fx.Node, Tensor] = {}
    steps = torch.tensor(found.scale, dtype=torch.float32) * found.scales
    if "weight-zero-point" in names:
        scales = found.scales.double().reshape(-1, *(1,) * (found.codes.dim() - 1))
        changed[found.weight] = found.codes.double() * scales
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    if isinstance(bias, fx.Node) and "bias-int32" in names:
        rounded = int32_bias(interpreter.env[bias], found.scale, found.scales)
        changed[bias] = rounded.double() * steps.double()

    def value(n: fx.Node) -> Any:
        return changed.get(n, interpreter.env[n])

    args: Any = fx.map_arg(node.args, value)
    kwargs: Any = fx.map_arg(node.kwargs, value)
    result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    pairs = [name for name in names if name.startswith("int16-saturation")]
    if not pairs or found.depthwise or found.grid.storage != torch.uint8:
        return result
    raw: Any = interpreter.env[found.source.all_input_nodes[0]]
    point, by_channel = int(found.grid.zero_points[0]), pairs[-1].endswith("by-channel")
    lost: Tensor = Lost(found.codes, point, 0, found.walk(), by_channel=by_channel)(raw)
    return result - lost * steps.double().reshape(-1, *(1,) * found.dims)

"""Where a rewrite finds the integer weight and the options of a node, in each dialect."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxqfix import _torch
from fxqfix.dialects import Reading, int8
from fxqfix.dialects._base import modules_of
from fxqfix.dialects.weights import (
    WeightView,
    effective_weight,
    holder,
    reference_weight,
    weight_quantizer,
)
from fxqfix.passes._frozen import FrozenFakeQuantize
from fxqfix.qparams import quantize

__all__ = ["options_of", "weight_of"]


def weight_of(
    reading: Reading, node: fx.Node, graph_module: fx.GraphModule, module: nn.Module | None
) -> WeightView | None:
    """The integer weight that a node computes with; None where it has none."""
    if reading.has_kernels:
        found = int8.weight_of(node, graph_module, modules_of(graph_module))
        return found.checked(f"to_decomposed, node {node.name!r}") if found is not None else None
    if module is None:
        return None
    if not reading.prepared:
        return reference_weight(module)
    quantizer = weight_quantizer(module)
    if not isinstance(quantizer, FrozenFakeQuantize):
        return None
    codes = quantize(effective_weight(module), quantizer.qparams)
    return WeightView(codes, quantizer.qparams, getattr(holder(module), "bias", None))


def options_of(graph_module: fx.GraphModule, node: fx.Node, module: nn.Module | None) -> Any:
    """What holds stride, padding and the like: a module, or the packed object of an op."""
    if module is not None:
        return holder(module)
    for arg in node.all_input_nodes:
        if arg.op == "get_attr" and _torch.is_packed_params(value := int8.fetch(graph_module, arg)):
            return value
    return None

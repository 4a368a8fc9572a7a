"""How prepare_qat_pt2e writes a convolution with BatchNorm, found in the graph.

    scaled = weight * reshape(factor)               factor = gamma / sqrt(running_var + eps)
    y = conv(x, fake_quant(scaled), zeros) / factor + bias
    batch_norm(y, gamma, beta, running_mean, running_var, training)

torch.ao's QAT modules compute the same, out of the graph's sight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxqfix.dialects._base import modules_of
from fxqfix.dialects._constants import constant, constants
from fxqfix.dialects._modes import trains
from fxqfix.ops import match_node

__all__ = ["ConvBatchNorm", "conv_batch_norms"]


@dataclass(frozen=True)
class ConvBatchNorm:
    """The nodes of one convolution with its BatchNorm.

    Attributes:
        conv: The convolution.
        batch_norm: The BatchNorm.
        scaled: The weight times the factor, before its fake-quant.
        factor: Gamma / sqrt(running_var + eps), one per channel, in the very bits of the graph.
        bias: The convolution's own bias, added behind the division; None without one.
        zeros: What the convolution has in place of its bias.
        between: The nodes from the convolution to the BatchNorm.
        training: Whether the BatchNorm normalizes by the batch.
    """

    conv: fx.Node
    batch_norm: fx.Node
    scaled: fx.Node
    factor: Tensor
    bias: fx.Node | None
    zeros: fx.Node | None
    between: tuple[fx.Node, ...]
    training: bool


def conv_batch_norms(graph_module: fx.GraphModule) -> dict[fx.Node, ConvBatchNorm]:
    """Every such pattern, by its BatchNorm's node."""
    fixed = constants(graph_module)
    found: dict[fx.Node, ConvBatchNorm] = {}
    for node in graph_module.graph.nodes:
        held = node.target is torch.ops.aten.batch_norm.default and len(node.args) > 7
        if held and all(arg in fixed for arg in node.args[1:5]):
            pattern = _match(graph_module, node, fixed)
            if pattern is not None:
                found[node] = pattern
    return found


def _match(
    graph_module: fx.GraphModule, node: fx.Node, fixed: frozenset[fx.Node]
) -> ConvBatchNorm | None:
    aten = torch.ops.aten
    current: Any = node.args[0]
    bias, between = None, []
    if _is(current, aten.add.Tensor) and current.args[1] in fixed:
        bias = current.args[1]
        between.append(current)
        current = current.args[0]
    if not (_is(current, aten.div.Tensor) and current.args[1] in fixed):
        return None
    between.append(current)
    conv, divisor = current.args[0], current.args[1]
    row = match_node(conv, modules_of(graph_module)) if isinstance(conv, fx.Node) else None
    if row is None or row.spec.family != "weighted" or conv.op != "call_function":
        return None
    weight = conv.args[1]
    scaled = weight.args[0] if weight.op == "call_module" else weight
    if not (_is(scaled, aten.mul.Tensor) and scaled in fixed):
        return None
    if any(len(n.users) > 1 for n in (conv, *between)):
        return None
    factor = constant(graph_module, divisor).flatten()
    if not torch.equal(factor, _factor(graph_module, node)):
        return None
    zeros = conv.args[2] if len(conv.args) > 2 else None
    return ConvBatchNorm(conv, node, scaled, factor, bias, zeros, tuple(between), trains(node))


def _is(node: object, target: object) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _factor(graph_module: fx.GraphModule, batch_norm: fx.Node) -> Tensor:
    """What the BatchNorm itself multiplies by: its eps need not be the division's."""
    nodes: Any = batch_norm.args
    gamma, variance = constant(graph_module, nodes[1]), constant(graph_module, nodes[4])
    found: Tensor = gamma / torch.sqrt(variance + nodes[7])
    return found

"""Fold the BatchNorm of an exported QAT graph into its convolution, node by node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxqfix.dialects._constants import constant, constants
from fxqfix.dialects._conv_bn import ConvBatchNorm, conv_batch_norms
from fxqfix.passes._base import Rewriter

__all__ = ["FOLDED_IN_TRAINING", "fold_exported"]

# In node.meta of a convolution whose BatchNorm normalized by the batch before it was folded.
FOLDED_IN_TRAINING = "fxqfix_folded_in_training"


def fold_exported(rewriter: Rewriter) -> None:
    """Fold every convolution with BatchNorm, in eval semantics (running statistics).

    The weight's fake-quant gets the value that it had before, computed by the graph's own nodes.
    convert_pt2e then finds no BatchNorm to fold, which is also what takes most of its time.
    """
    for fold in conv_batch_norms(rewriter.graph_module).values():
        _fold(rewriter, fold)


def _fold(rewriter: Rewriter, fold: ConvBatchNorm) -> None:
    graph, conv = rewriter.graph, fold.conv
    nodes: Any = fold.batch_norm.args
    name = next(str(n.target) for n in fold.scaled.all_input_nodes if n.op == "get_attr")
    weight = constant(rewriter.graph_module, fold.scaled).clone()
    bias = _folded_bias(rewriter, fold)
    with graph.inserting_before(fold.scaled):
        new_weight = rewriter.parameter_node(f"{name}_folded", weight)
    fold.scaled.replace_all_uses_with(new_weight)
    quantized = fold.zeros is not None and fold.zeros.op == "call_module"
    with graph.inserting_before(fold.zeros if quantized else conv):
        new_bias = rewriter.parameter_node(f"{name}_folded_bias", bias)
    if fold.zeros is not None and quantized:
        fold.zeros.replace_input_with(fold.zeros.all_input_nodes[0], new_bias)
    else:
        conv.args = (*conv.args[:2], new_bias, *conv.args[3:])
    fold.batch_norm.replace_all_uses_with(conv)
    if fold.training:
        conv.meta[FOLDED_IN_TRAINING] = fold.batch_norm.name
    for node in (fold.batch_norm, *fold.between):
        graph.erase_node(node)
    _erase_unread(rewriter, str(nodes[3].target).rpartition(".")[0])
    rewriter.note(f"{conv.name}: {fold.batch_norm.name} folded into its weight and bias")


def _folded_bias(rewriter: Rewriter, fold: ConvBatchNorm) -> Tensor:
    """(b - mean) * factor + beta, summed in float64 and rounded once."""
    nodes: Any = fold.batch_norm.args
    beta, mean = (constant(rewriter.graph_module, n) for n in nodes[2:4])
    own = torch.zeros_like(mean)
    if fold.bias is not None:
        own = constant(rewriter.graph_module, fold.bias).flatten()
    centred = own.double() - mean.double()
    folded: Tensor = (centred * fold.factor.double() + beta.double()).to(beta.dtype)
    return folded


def _erase_unread(rewriter: Rewriter, statistics: str) -> None:
    """Erase what only the BatchNorm read, and the counter of its batches (an in-place add)."""
    graph = rewriter.graph
    for node in reversed(list(graph.nodes)):
        if node.target is torch.ops.aten.add_.Tensor and not node.users:
            counter = node.all_input_nodes[0]
            if counter.op == "get_attr" and str(counter.target).rpartition(".")[0] == statistics:
                graph.erase_node(node)
    fixed = constants(rewriter.graph_module)
    for node in reversed(list(graph.nodes)):
        if node in fixed and not node.users:
            graph.erase_node(node)

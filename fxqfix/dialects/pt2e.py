"""Dialect "pt2e-prepared": observers and fake-quants between ATen ops.

Reads what `prepare_pt2e` and `prepare_qat_pt2e` return, torchao's or an older torch's. Weights are
constants with a quantizer of their own in the graph. A convolution with BatchNorm, which QAT spells
out node by node, is one op here as in the other dialects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import fx, nn

from fxqfix import _torch
from fxqfix.dialects._base import (
    Reading,
    Tap,
    inside,
    is_exported,
    modules_of,
    op_name,
    scope,
    unique,
)
from fxqfix.dialects._constants import bias_of, constant, constants, reader, role
from fxqfix.dialects._conv_bn import ConvBatchNorm, conv_batch_norms
from fxqfix.dialects.prepared import qparams_fields, where
from fxqfix.dialects.quantizer import QuantizerState, read_quantizer
from fxqfix.dialects.site import Site
from fxqfix.dialects.weights import WeightView
from fxqfix.qparams import QParams, quantize

__all__ = ["NAME", "matches", "read"]

NAME = "pt2e-prepared"
PLACE = 10


def matches(graph_module: fx.GraphModule) -> bool:
    """True for an exported graph with observers or fake-quants."""
    modules = modules_of(graph_module)
    return is_exported(graph_module) and any(
        n.op == "call_module" and _torch.is_quantizer(modules[str(n.target)])
        for n in graph_module.graph.nodes
    )


def read(graph_module: fx.GraphModule) -> Reading:
    """Read every observer and fake-quant as a site; convert_pt2e asks them as they stand."""
    work = _Work(graph_module)
    taps: list[Tap] = []
    states: dict[int, QuantizerState] = {}
    for node in graph_module.graph.nodes:
        module = work.modules[str(node.target)] if node.op == "call_module" else None
        if module is None or not _torch.is_quantizer(module):
            continue
        if id(module) not in states:  # a shared quantizer is read once
            states[id(module)] = read_quantizer(module, where(node))
        taps.append(work.tap(node, states[id(module)]))
    hidden = tuple(inside(graph_module, read))
    return Reading(graph_module, NAME, tuple(taps), hidden, prepared=True, exported=True)


@dataclass
class _Work:
    """One reading: the graph, and what was found in it before."""

    graph_module: fx.GraphModule

    def __post_init__(self) -> None:
        self.taken: set[str] = set()
        self.modules: Mapping[str, nn.Module] = modules_of(self.graph_module)

    @cached_property
    def constants(self) -> frozenset[fx.Node]:
        return constants(self.graph_module)

    @cached_property
    def folds(self) -> dict[fx.Node, ConvBatchNorm]:
        return conv_batch_norms(self.graph_module)

    def tap(self, node: fx.Node, state: QuantizerState) -> Tap:
        """The tap of a quantizer's node."""
        producer = node.all_input_nodes[0]
        if producer in self.constants:
            return self._weight(node, producer, state)
        fold = self.folds.get(producer)
        site = Site(
            # A folded convolution keeps its name, so that its site has one name before and after.
            name=unique(fold.conv.name if fold else producer.name, self.taken),
            kind="activation",
            module=scope(fold.conv if fold else producer, self.graph_module),
            op=self._op(producer),
            **qparams_fields(state),
        )
        return Tap(site, node, producer, origins=frozenset((node.name,)))

    def _op(self, node: fx.Node) -> str:
        """The op's key; BatchNorm is part of its convolution."""
        if node in self.folds:
            return op_name(self.folds[node].conv, self.modules)
        own = op_name(node, self.modules)
        before = node.all_input_nodes[0] if own == "relu" and node.all_input_nodes else node
        if before in self.folds and len(before.users) == 1:
            return f"{op_name(self.folds[before].conv, self.modules)}_relu"
        return own

    def _weight(self, node: fx.Node, producer: fx.Node, state: QuantizerState) -> Tap:
        user = reader(node, self.modules)
        value, used = constant(self.graph_module, producer), state.used
        site = Site(
            name=unique(f"{user.name}.{role(node, user, self.modules)}", self.taken),
            kind="weight",
            module=scope(user, self.graph_module),
            op=op_name(user, self.modules),
            shape=tuple(value.shape),
            **qparams_fields(state),
        )
        folded = any(f.scaled is producer and not f.training for f in self.folds.values())

        def view() -> WeightView:
            assert used is not None  # views are made of sites with qparams only
            return self._view(producer, user, used, folded)

        origins = frozenset((node.name,))
        read_it = view if used is not None else None
        return Tap(site, user, producer, read_it, quantizer=node, origins=origins)

    def _view(self, producer: fx.Node, user: fx.Node, used: QParams, folded: bool) -> WeightView:
        value = constant(self.graph_module, producer)
        bias = bias_of(user, self.graph_module)
        return WeightView(quantize(value, used), used, bias, value, folded)

"""A prepared model whose nodes are copied into a twin as they fall due."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import getitem
from typing import Any, Protocol

from torch import Tensor, fx, nn

from fxqfix.dialects._base import modules_of
from fxqfix.dialects._writes import is_inplace
from fxqfix.pairing import Pair
from fxqfix.passes._base import Rewriter
from fxqfix.passes._draws import Draws, Replayed, called
from fxqfix.passes._ends import returned
from fxqfix.passes._held import HeldQuantize, held_weights, is_known_quantizer, owned, put
from fxqfix.passes._random import draws_in
from fxqfix.passes._shadow_modules import Clone, Nudge, Snapshot

__all__ = ["PREFIX", "Branch", "Host", "placeholders"]

PREFIX = "fxqfix_"  # of every module that is added to the converted model


class Host(Protocol):
    """What takes the nodes of a branch."""

    rewriter: Rewriter

    @property
    def draws(self) -> Draws:
        """What the converted model draws."""

    def module(self, name: str, module: nn.Module, args: tuple[Any, ...], stream: str) -> fx.Node:
        """Add a module under a free name and append its call."""

    def tag(self, node: fx.Node, stream: str) -> fx.Node:
        """Mark a node as added."""


class Branch:
    """A prepared model whose nodes are copied into the twin when they are due.

    Args:
        name: "prepared" or "nudged".
        model: A held copy of the prepared model; it becomes a submodule of the twin.
        pairs: The paired activation sites.
        nudged: Whether every value is scaled by (1 + 1e-6) before it is quantized.
        weights: Quantized weights by path, shared among branches.

    Attributes:
        codes: The node with the integer codes, of every site copied so far.
        snapshots: The module that takes them, likewise.
    """

    def __init__(
        self,
        name: str,
        model: fx.GraphModule,
        pairs: list[Pair],
        nudged: bool,
        weights: dict[str, Tensor],
    ) -> None:
        self.name, self.model, self.nudged = name, model, nudged
        nodes = {n.name: n for n in model.graph.nodes}
        self.sites = {nodes[p.prepared.node.name]: p for p in pairs}
        self.codes: dict[Pair, fx.Node] = {}
        self.snapshots: dict[Pair, Snapshot] = {}
        self.random = {node.name for node in draws_in(model)}
        put(model, held_weights(model, weights))
        self._modules = modules_of(model)
        self._held = {n for n, p in self.sites.items() if self._is_held(n, p)}
        self._env: dict[fx.Node, fx.Node] = {}
        self._todo: Iterator[fx.Node] = iter(list(model.graph.nodes))

    def parts(self) -> nn.Module:
        """What the branch's nodes call and read; not the graph, of which not all is copied."""
        made = nn.Module()
        made.__dict__.update({k: v for k, v in vars(self.model).items() if k != "_graph"})
        return made

    def start(self, host: Host, inputs: list[fx.Node]) -> None:
        """Give the branch copies of the inputs."""
        for node, given in zip(placeholders(self.model), inputs, strict=False):
            self._env[node] = host.module(f"{self.name}_in", Clone(), (given,), self.name)

    def advance(self, host: Host, wanted: Pair) -> None:
        """Copy nodes until the site of `wanted` has its snapshot."""
        while wanted not in self.codes:
            node = next(self._todo)
            here = self.sites.get(node)
            if here is not None and node in self._held:
                self._at_once(host, node, here)
                continue
            if node not in self._env:
                self._env[node] = self._copy(host, node)
            if here is not None and here.prepared.site.used is not None:
                name = f"{self.name}_codes_{here.prepared.site.name}"
                snapshot = self.snapshots[here] = Snapshot(here.prepared.site.used)
                self.codes[here] = host.module(name, snapshot, (self._env[node],), self.name)

    def _is_held(self, node: fx.Node, p: Pair) -> bool:
        """Whether a site's fake-quant is known, so that its codes tell its value."""
        used, quantizer = p.prepared.site.used, self._modules.get(str(node.target))
        if used is None or quantizer is None or node.op != "call_module":
            return False
        alone = len(node.args) == 1 and not node.kwargs and node.name not in self.random
        return alone and p.prepared.site.quantizes and is_known_quantizer(quantizer, used)

    def _at_once(self, host: Host, node: fx.Node, here: Pair) -> None:
        """A site whose fake-quant is held: its codes and its value from one pass."""
        used, (source,) = here.prepared.site.used, node.all_input_nodes
        assert used is not None  # `_is_held`
        given, overwrites = self._env[source], owned(source, self._modules, self._held)
        if self.nudged:
            given, overwrites = host.module("nudge", Nudge(), (given,), self.name), True
        site = here.prepared.site.name
        snapshot = HeldQuantize(site, used, self._modules[str(node.target)], overwrites)
        name = f"{self.name}_codes_{site}"
        both = host.module(name, snapshot, (given,), self.name)
        codes, value = (
            host.tag(host.rewriter.graph.call_function(getitem, (both, i)), self.name)
            for i in (0, 1)
        )
        self.snapshots[here], self.codes[here], self._env[node] = snapshot, codes, value

    def finish(self, host: Host) -> list[fx.Node]:
        """Copy the nodes that are left; what the model returns, in order."""
        for node in self._todo:
            if node.op != "output" and node not in self._env:
                self._env[node] = self._copy(host, node)
        return [self._env[node] for node in returned(self.model.graph)]

    def value(self, name: str) -> fx.Node:
        """The copy of a node that has been copied."""
        return next(copied for node, copied in self._env.items() if node.name == name)

    def _copy(self, host: Host, node: fx.Node) -> fx.Node:
        env = self._env
        if self.nudged and node in self.sites:
            source = node.all_input_nodes[0]
            nudge = host.module("nudge", Nudge(), (env[source],), self.name)
            env = {**env, source: nudge}  # for this node alone
        if node.name in self.random:
            return self._replayed(host, node, env)
        new = host.rewriter.graph.node_copy(node, lambda n: env[n])
        if node.op in ("call_module", "get_attr"):
            new.target = f"{PREFIX}{self.name}.{node.target}"
        return host.tag(new, self.name)

    def _replayed(self, host: Host, node: fx.Node, env: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """A copy that draws what the converted model's op drew."""
        modules = modules_of(self.model)
        inplace = is_inplace(node, modules)
        module = Replayed(called(node, modules), node.name, host.draws, inplace)
        args: Any = fx.map_arg(node.args, lambda n: env[n])
        kwargs: Any = fx.map_arg(node.kwargs, lambda n: env[n])
        new = host.module(f"{self.name}_{node.name}", module, args, self.name)
        new.kwargs = kwargs
        return new


def placeholders(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The inputs of a graph."""
    return [n for n in graph_module.graph.nodes if n.op == "placeholder"]

"""How insert-shadows weaves: branches of the prepared model, copied in as they fall due."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn

from fxqfix.dialects._writes import Overwrite
from fxqfix.pairing import Pair
from fxqfix.passes._base import Rewriter
from fxqfix.passes._branch import PREFIX, Branch, placeholders
from fxqfix.passes._draws import Draws, Mark
from fxqfix.passes._ends import TAG, returned
from fxqfix.passes._held import (
    HeldWeight,
    held_weights,
    put,
)
from fxqfix.passes._random import draws_in
from fxqfix.passes._region import Cutter, Region
from fxqfix.passes._shadow_modules import (
    Clone,
    Later,
    Shadow,
    Snapshot,
    Source,
    Tail,
)
from fxqfix.qparams import QParams

__all__ = [
    "PREFIX",
    "TAG",
    "Branch",
    "OutputFactory",
    "ProbeFactory",
    "Probing",
    "Weaver",
]


@dataclass(frozen=True)
class Probing:
    """What a probe factory gets to know about its site.

    Attributes:
        pair: The prepared and the converted site.
        shadow: The shadow whose record the probe will get; None where none is woven in.
        converted: The snapshot of the converted codes, which knows their grid.
        loose: Nodes of the prepared model that this site is computed from and that don't quantize:
            fake-quants that are off, observers, modules whose weight is only observed.
        inputs: Nodes of the converted model that the shadow takes its inputs from.
    """

    pair: Pair
    shadow: Shadow | None
    converted: Snapshot
    loose: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()

    @property
    def node(self) -> str:
        """The node of the converted model that gives the site's value."""
        return self.pair.converted.node.name


ProbeFactory = Callable[[Probing], nn.Module]
# What it makes takes four lists: what the converted model returns, what the prepared one returns,
# the records of the tails, and what the nudged one returns.
OutputFactory = Callable[[], nn.Module]


@dataclass(frozen=True)
class _Known:
    """Codes of a site that stand in the twin already: the converted and the prepared ones."""

    converted: tuple[Snapshot, fx.Node]
    prepared: tuple[Snapshot, fx.Node]


@dataclass
class Weaver:
    """Walks the converted graph and puts everything else where it is due.

    Attributes:
        rewriter: Holds the copy of the converted model.
        frozen: The prepared graph with fixed qparams; shadows are cut out of it.
        pairs: The paired activation sites.
        branches: The prepared model, and its nudged copy where the noise floor is wanted.
        probe: Makes the probe of a site, or None.
        loose: Nodes of the prepared model that should quantize and don't.
        uses: Uses in `frozen` of values that an in-place op has overwritten, as they were.
        outputs: Makes the probe of what the models return, or None.
        local: Whether to put shadows in.
        weights: Quantized weights by path, shared with the branches.
    """

    rewriter: Rewriter
    frozen: fx.GraphModule
    pairs: list[Pair]
    branches: list[Branch]
    probe: ProbeFactory | None
    loose: frozenset[str] = frozenset()
    uses: tuple[Overwrite, ...] = ()
    outputs: OutputFactory | None = None
    local: bool = True
    weights: dict[str, Tensor] = field(default_factory=dict)
    _inputs: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _stand_ins: dict[fx.Node, str] = field(default_factory=dict)
    _codes: dict[fx.Node, _Known] = field(default_factory=dict)

    def weave(self) -> None:
        """Weave everything into the converted graph."""
        graph = self.rewriter.graph
        nodes = list(graph.nodes)
        sites: dict[fx.Node, list[Pair]] = {}
        for p in self.pairs:
            sites.setdefault(p.converted.node, []).append(p)
            self._stand_ins[p.prepared.node] = p.converted.node.name
        first = next(n for n in nodes if n.op != "placeholder")
        inputs = [n for n in nodes if n.op == "placeholder"]
        for node in inputs:  # torch's conversion leaves an input where its quantize op stands
            first.prepend(node)
        drawing = self._drawing()
        with graph.inserting_before(first):
            self._begin(inputs)
        for node in nodes:
            with graph.inserting_before(node):
                if node.op == "output" and self.outputs is not None:
                    self._end(self.outputs)
                if node in drawing:
                    self._mark("before", drawing[node], (node.args, dict(node.kwargs)))
            behind = node.next
            with graph.inserting_before(behind):
                if node in drawing:
                    self._mark("after", drawing[node])
                for p in sites.get(node, ()):
                    self._site(p, node)
        self.rewriter.note(f"{len(self.pairs)} shadows")

    @cached_property
    def _cutter(self) -> Cutter:
        return Cutter(self.frozen, frozenset(p.prepared.node for p in self.pairs), self.uses)

    @cached_property
    def draws(self) -> Draws:
        """What the converted model draws, for all that draws it again."""
        return Draws(frozenset().union(*(branch.random for branch in self.branches)))

    def _drawing(self) -> dict[fx.Node, str]:
        """Nodes of the converted model that may draw -> the prepared model's node, by its name.

        Conversions keep the names of functions; else the order tells, where as many are left.
        """
        left = list(draws_in(self.rewriter.graph_module)) if self.draws.names else []
        found = {node: node.name for node in left if node.name in self.draws.names}
        order = [n.name for n in self.branches[0].model.graph.nodes if n.name in self.draws.names]
        others = [name for name in order if name not in found.values()]
        left = [node for node in left if node not in found]
        return found | (dict(zip(left, others, strict=True)) if len(left) == len(others) else {})

    def _begin(self, inputs: list[fx.Node]) -> None:
        for branch in self.branches:
            self.rewriter.module.add_module(f"{PREFIX}{branch.name}", branch.parts())
        if self.draws.names:
            self.rewriter.module.add_module(f"{PREFIX}draws", Mark(self.draws))
            self._mark("start")
        for branch in self.branches:
            branch.start(self, inputs)
        # An input that the prepared model does not use may be gone from the converted one.
        for own, given in zip(placeholders(self.frozen), inputs, strict=False):
            self._stand_ins[own] = given.name
            self._inputs[own] = self.module("shadow_in", Clone(), (given,), "shadow")

    def _site(self, p: Pair, node: fx.Node) -> None:
        name, used, theirs = p.prepared.site.name, p.prepared.site.used, p.converted.site.used
        if used is None or theirs is None:  # dynamic; readers keep these apart
            return
        snapshot = Snapshot(theirs)
        codes = self.module(f"codes_{name}", snapshot, (node,), "shadow")
        for branch in self.branches:
            branch.advance(self, p)
        first = self.branches[0]
        self._codes[p.prepared.node] = _Known(
            (snapshot, codes), (first.snapshots[p], first.codes[p])
        )
        known = tuple(branch.codes[p] for branch in self.branches)
        if not self.local:
            if self.probe is not None:
                alone = self.probe(Probing(p, None, snapshot))
                self.module(f"probe_{name}", alone, (None, codes, *known), "shadow")
            return
        region = self._cutter.region(p.prepared.producer, p.prepared.node)
        if any(n.op != "placeholder" and n not in self._codes for n in region.inputs):
            return  # the converted graph computes an input later: nothing local to compare
        shadow, inputs = self._shadow(region, used, "converted")
        local = self.module(f"shadow_{name}", shadow, inputs, "shadow")
        if self.probe is None:
            return
        loose = tuple(n.name for n in region.nodes if n.name in self.loose)
        if loose:
            local = self._settled(local, region, self._shadow(region, used, "prepared"))
        probe = self.probe(Probing(p, shadow, snapshot, loose, self._origins(region)))
        self.module(f"probe_{name}", probe, (local, codes, *known), "shadow")

    def _end(self, factory: OutputFactory) -> None:
        """Run every branch to its end, and compare what the models return."""
        given = [branch.finish(self) for branch in self.branches]
        ends = returned(self.frozen.graph)
        tails = {end: self._tail(end) for end in dict.fromkeys(ends)}
        found = returned(self.rewriter.graph, self.frozen.graph)
        args = (found, given[0], [tails[n] for n in ends], *given[1:])
        self.module("probe_outputs", factory(), args, "shadow")

    def _tail(self, end: fx.Node) -> fx.Node | None:
        """The record of an output on the converted model's codes; None where one is not known."""
        if not self.local:
            return None
        region = self._cutter.region(end)
        if any(n.op != "placeholder" and n not in self._codes for n in region.inputs):
            return None
        sources, nodes = self._sources(region, "converted")
        tail = Tail(self._module(region), sources, region.mutates, self.draws)
        return self.module(f"tail_{end.name}", tail, nodes, "shadow")

    def _origins(self, region: Region) -> tuple[str, ...]:
        """Names of the converted nodes that stand for the inputs of a region."""
        return tuple(self._stand_ins[n] for n in region.inputs)

    def _settled(
        self, local: fx.Node, region: Region, found: tuple[Shadow, tuple[fx.Node, ...]]
    ) -> fx.Node:
        """The record with the prepared op on the prepared model's own codes, if it is asked for."""
        first, (shadow, inputs) = self.branches[0], found
        names = tuple(n.name for n in region.inputs)
        loose = tuple(n.name for n in region.nodes if n.name in self.loose)
        later = Later(shadow, names, loose, first.model)
        raw = tuple(first.value(name) for name in later.raw)
        return self.module(f"settled_{local.name}", later, (local, *inputs, *raw), "shadow")

    def _shadow(
        self, region: Region, used: QParams, side: str
    ) -> tuple[Shadow, tuple[fx.Node, ...]]:
        """The prepared op on the codes of one model, and the nodes that it takes them from."""
        sources, nodes = self._sources(region, side)
        return Shadow(self._module(region), used, sources, region.mutates, self.draws), nodes

    def _module(self, region: Region) -> fx.GraphModule:
        """The region, with weights that are quantized once."""
        made = region.module(self.frozen)
        targets = {str(n.target) for n in made.graph.nodes if n.op == "call_module"}
        put(made, {path: m for path, m in self._held.items() if path in targets})
        return made

    @cached_property
    def _held(self) -> dict[str, HeldWeight]:
        return held_weights(self.frozen, self.weights)

    def _sources(
        self, region: Region, side: str
    ) -> tuple[tuple[Source | None, ...], tuple[fx.Node, ...]]:
        """Where a region takes the codes of one model from: the snapshots, and the nodes."""
        sources: list[Source | None] = []
        nodes = []
        for node in region.inputs:
            if node.op == "placeholder":
                sources.append(None)
                nodes.append(self._inputs[node])
                continue
            known = self._codes[node]
            codes, found = known.converted if side == "converted" else known.prepared
            sources.append((codes, known.prepared[0]))
            nodes.append(found)
        return tuple(sources), tuple(nodes)

    def module(self, name: str, module: nn.Module, args: tuple[Any, ...], stream: str) -> fx.Node:
        """Add a module under a free name and append its call."""
        path, count = f"{PREFIX}{name}", 0
        while hasattr(self.rewriter.module, path):
            count += 1
            path = f"{PREFIX}{name}_{count}"
        self.rewriter.module.add_module(path, module)
        return self.tag(self.rewriter.graph.create_node("call_module", path, args), stream)

    def tag(self, node: fx.Node, stream: str) -> fx.Node:
        """Mark a node as added."""
        node.meta[TAG] = stream
        return node

    def _mark(self, *args: Any) -> None:
        path = f"{PREFIX}draws"
        self.tag(self.rewriter.graph.create_node("call_module", path, args), "rng")

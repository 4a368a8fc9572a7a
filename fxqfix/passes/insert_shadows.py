"""insert-shadows: the twin graph. Beside every quantized op its fake-quant branch, with probes.

One graph, one forward: the converted model's nodes as they are; the prepared model's nodes (its
own value); per site a shadow (the prepared op on the converted model's inputs), and a nudged copy
of the prepared model for the noise floor. All woven in site by site, so that every tensor dies at
its last use. The output is the converted model's, to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx, nn

from fxqfix import _torch, dialects
from fxqfix.dialects._base import modules_of
from fxqfix.errors import PassError
from fxqfix.pairing import Pair, pair
from fxqfix.passes._base import Pass, Rewriter
from fxqfix.passes._region import cut, functional_uses
from fxqfix.passes._shadow_modules import Clone, Nudge, Shadow, Snapshot, Streams
from fxqfix.passes.freeze_qparams import FreezeQParams

__all__ = ["PREFIX", "InsertShadows", "Probing", "hold"]

PREFIX = "fxqfix_"
_TAG = "fxqfix_stream"


@dataclass(frozen=True)
class Probing:
    """What a probe factory gets to know about its site."""

    pair: Pair
    shadow: Shadow
    converted: Snapshot


ProbeFactory = Callable[[Probing], nn.Module]


@dataclass(frozen=True)
class InsertShadows(Pass):
    """Put a shadow fake-quant branch beside each quantized op of a converted graph.

    Attributes:
        prepared: The prepared model that the converted one came from; it is not changed.
        probe: Makes the module that takes (local, converted codes, prepared codes, nudged codes)
            of one site; None inserts the branches without probes.
        noise_floor: Whether to weave in the nudged prepared model as well.

    Raises:
        PairingError: The models don't belong together.
        UncalibratedError: The prepared model never saw data.

    Example:
        >>> from fxqfix.passes import InsertShadows
        >>> InsertShadows.name
        'insert-shadows'
    """

    name: ClassVar[str] = "insert-shadows"
    prepared: nn.Module = field(repr=False)
    probe: ProbeFactory | None = field(default=None, repr=False)
    noise_floor: bool = True

    def rewrite(self, rewriter: Rewriter) -> None:
        """Weave prepared, nudged and shadow branches into the copy of the converted graph."""
        converted = dialects.read(rewriter.graph_module)
        traced = dialects.trace(self.prepared)
        frozen = FreezeQParams()(traced).graph_module
        pairing = pair(dialects.read(frozen), converted)
        pairs = [p for p in pairing.pairs if p.converted.site.kind == "activation"]
        functional_uses(frozen)
        own = _Branch(rewriter, "prepared", hold(copy.deepcopy(traced)), pairs, nudged=False)
        branches = [own]
        if self.noise_floor:
            other = hold(copy.deepcopy(traced))
            branches.append(_Branch(rewriter, "nudged", other, pairs, nudged=True))
        _Weaver(rewriter, frozen, pairs, branches, self.probe).weave()

    def check(self, before: nn.Module, after: nn.Module) -> None:
        """The converted model's nodes are all there, in their order."""
        wanted = [n.format_node() for n in before.graph.nodes]  # type: ignore[union-attr]
        found = [n.format_node() for n in after.graph.nodes if _TAG not in n.meta]  # type: ignore[union-attr]
        if [_bare(w) for w in wanted] != [_bare(f) for f in found]:
            raise PassError("the converted model's own nodes were changed", where=self.name)


def _bare(text: str | None) -> str:
    # The count of users is the one thing that probes change.
    return str(text).partition("[num_users")[0] + str(text).partition("]")[2]


def hold(model: fx.GraphModule) -> fx.GraphModule:
    """Hold a copy of a prepared model still: no observer of it will move any more.

    Args:
        model: A copy of the user's prepared graph module; it is changed.

    Returns:
        The same module.
    """
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if path and _torch.is_observer(module) and not _inside_fake_quant(model, path):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, nn.Identity())
        elif _torch.is_fake_quant(module):
            module.disable_observer()
    return model


def _inside_fake_quant(model: nn.Module, path: str) -> bool:
    parent = model.get_submodule(path.rpartition(".")[0])
    return _torch.is_fake_quant(parent)


class _Branch:
    """A prepared model whose nodes are copied into the twin when they are due."""

    def __init__(
        self,
        rewriter: Rewriter,
        name: str,
        model: fx.GraphModule,
        pairs: list[Pair],
        nudged: bool,
    ) -> None:
        self.rewriter, self.name, self.model, self.nudged = rewriter, name, model, nudged
        rewriter.module.add_module(f"{PREFIX}{name}", model)
        nodes = {n.name: n for n in model.graph.nodes}
        self.sites = {nodes[p.prepared.node.name]: p for p in pairs}
        self.codes: dict[Pair, fx.Node] = {}
        self._env: dict[fx.Node, fx.Node] = {}
        self._todo: Iterator[fx.Node] = iter(list(model.graph.nodes))
        self._random = _draws(model)

    def start(self, weaver: _Weaver, inputs: list[fx.Node]) -> None:
        """Give the branch copies of the inputs."""
        for i, node in enumerate(n for n in self.model.graph.nodes if n.op == "placeholder"):
            if i < len(inputs):
                self._env[node] = weaver.module(f"{self.name}_in", Clone(), (inputs[i],), self.name)

    def advance(self, weaver: _Weaver, wanted: Pair) -> None:
        """Copy nodes until the site of `wanted` has its snapshot."""
        while wanted not in self.codes:
            node = next(self._todo)
            if node not in self._env:
                if self._random:
                    weaver.switch(self.name)
                self._env[node] = self._copy(weaver, node)
            pair_here = self.sites.get(node)
            if pair_here is not None:
                used = pair_here.prepared.site.used
                assert used is not None  # pairs have qparams on both sides
                snapshot = Snapshot(used)
                self.codes[pair_here] = weaver.module(
                    f"{self.name}_codes_{pair_here.prepared.site.name}",
                    snapshot,
                    (self._env[node],),
                    self.name,
                )

    def _copy(self, weaver: _Weaver, node: fx.Node) -> fx.Node:
        if self.nudged and node in self.sites:
            source = node.all_input_nodes[0]
            nudge = weaver.module("nudge", Nudge(), (self._env[source],), self.name)
            self._env[source], kept = nudge, self._env[source]
            new = self._plain_copy(weaver, node)
            self._env[source] = kept
            return new
        return self._plain_copy(weaver, node)

    def _plain_copy(self, weaver: _Weaver, node: fx.Node) -> fx.Node:
        new = self.rewriter.graph.node_copy(node, lambda n: self._env[n])
        if node.op in ("call_module", "get_attr"):
            new.target = f"{PREFIX}{self.name}.{node.target}"
        weaver.tag(new, self.name)
        return new


@dataclass
class _Weaver:
    """Walks the converted graph and puts everything else where it is due."""

    rewriter: Rewriter
    frozen: fx.GraphModule
    pairs: list[Pair]
    branches: list[_Branch]
    probe: ProbeFactory | None
    stream: str = "converted"
    random: bool = False
    count: int = 0

    def weave(self) -> None:
        graph = self.rewriter.graph
        nodes = list(graph.nodes)
        inputs = [n for n in nodes if n.op == "placeholder"]
        self.random = any(_draws(b.model) for b in self.branches)
        self.starts = {p.prepared.node for p in self.pairs}
        self.by_converted: dict[fx.Node, list[Pair]] = {}
        for p in self.pairs:
            self.by_converted.setdefault(p.converted.node, []).append(p)
        self.snapshots: dict[fx.Node, tuple[Snapshot, fx.Node]] = {}
        first = next(n for n in nodes if n.op != "placeholder")
        with graph.inserting_before(first):
            self._begin(inputs)
        for node in nodes:
            if self.random and node.op not in ("placeholder", "output"):
                with graph.inserting_before(node):
                    self.switch("converted")
            for p in self.by_converted.get(node, ()):
                with graph.inserting_before(node.next):
                    self._site(p, node)
        with graph.inserting_before(nodes[-1]):
            self.switch("converted")
        self.rewriter.note(f"{len(self.pairs)} shadows")

    def _begin(self, inputs: list[fx.Node]) -> None:
        if self.random:
            self.rewriter.module.add_module(f"{PREFIX}streams", Streams())
            self._switch_node("start")
        for branch in self.branches:
            branch.start(self, inputs)
        self.inputs = {
            i: self.module("shadow_in", Clone(), (x,), "shadow") for i, x in enumerate(inputs)
        }

    def _site(self, p: Pair, node: fx.Node) -> None:
        name, used = p.prepared.site.name, p.prepared.site.used
        mine = p.converted.site.used
        assert used is not None and mine is not None  # noqa: PT018  # pairs have qparams
        snapshot = Snapshot(mine)
        codes = self.module(f"codes_{name}", snapshot, (node,), "shadow")
        self.snapshots[p.prepared.node] = (snapshot, codes)
        for branch in self.branches:
            branch.advance(self, p)
        region = cut(self.frozen, p.prepared.producer, self.starts - {p.prepared.node})
        given, sources = self._region_inputs(region.inputs)
        if given is None:
            return
        if self.random:
            self.switch(f"shadow_{name}")
        shadow = Shadow(region.module, used, sources, region.mutates)
        local = self.module(f"shadow_{name}", shadow, given, "shadow")
        if self.probe is not None:
            probe = self.probe(Probing(p, shadow, snapshot))
            known = tuple(branch.codes[p] for branch in self.branches)
            self.module(f"probe_{name}", probe, (local, codes, *known), "shadow")

    def _region_inputs(
        self, inputs: tuple[fx.Node, ...]
    ) -> tuple[tuple[fx.Node, ...] | None, tuple[Snapshot | None, ...]]:
        placeholders = [n for n in self.frozen.graph.nodes if n.op == "placeholder"]
        given: list[fx.Node] = []
        sources: list[Snapshot | None] = []
        for node in inputs:
            if node.op == "placeholder":
                given.append(self.inputs[placeholders.index(node)])
                sources.append(None)
            elif node in self.snapshots:
                snapshot, codes = self.snapshots[node]
                given.append(codes)
                sources.append(snapshot)
            else:  # the converted graph computes this input later: nothing local to compare
                return None, ()
        return tuple(given), tuple(sources)

    def module(self, name: str, module: nn.Module, args: tuple[Any, ...], stream: str) -> fx.Node:
        path = f"{PREFIX}{name}"
        while hasattr(self.rewriter.module, path):
            self.count += 1
            path = f"{PREFIX}{name}_{self.count}"
        module.train(self.rewriter.module.training)
        self.rewriter.module.add_module(path, module)
        return self.tag(self.rewriter.graph.create_node("call_module", path, args), stream)

    def tag(self, node: fx.Node, stream: str) -> fx.Node:
        node.meta[_TAG] = stream
        return node

    def switch(self, stream: str) -> None:
        if self.random and stream != self.stream:
            self._switch_node(stream)
            self.stream = stream

    def _switch_node(self, stream: str) -> None:
        path = f"{PREFIX}streams"
        self.tag(self.rewriter.graph.create_node("call_module", path, (stream,)), "rng")


_RANDOM = ("dropout", "rand", "bernoulli", "multinomial", "normal", "rrelu", "attention", "gumbel")


def _draws(model: fx.GraphModule) -> bool:
    """Whether a graph may draw random numbers; torch's own eval-mode modules never do."""
    modules = modules_of(model)
    for node in model.graph.nodes:
        if node.op == "call_module":
            parts = list(modules[str(node.target)].modules())
            if any(not type(m).__module__.startswith(("torch.", "fxqfix.")) for m in parts):
                return True
            names = [type(m).__name__.lower() for m in parts if m.training]
            if any(word in name for name in names for word in _RANDOM):
                return True
        elif node.op in ("call_function", "call_method"):
            name = str(getattr(node.target, "__name__", node.target)).lower()
            own = str(getattr(node.target, "__module__", "torch") or "torch")
            known = own.startswith(("torch", "_operator", "builtins", "math"))
            if not known or (any(word in name for word in _RANDOM) and "norm" not in name):
                return True
    return False


def tagged(node: fx.Node) -> bool:
    """True for nodes that insert-shadows added."""
    return _TAG in node.meta or str(node.target).startswith(PREFIX)

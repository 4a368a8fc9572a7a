"""Compute a site anew under a hypothesis: other weights, float64, rounding in between.

The region is interpreted, not compiled: FX keeps the source of every GraphModule that it ever
compiled, so compiling anew for every batch would make memory grow.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from torch import Tensor, fx, nn

from fxqfix import _torch
from fxqfix.dialects._base import modules_of
from fxqfix.dialects._constants import bias_node, reader
from fxqfix.dialects._modes import drops
from fxqfix.dialects._writes import Overwrite
from fxqfix.dialects.weights import WeightView
from fxqfix.evidence._interpreter import AtPlaces, Interpreter
from fxqfix.evidence._shell import Shell, dequantize_wide, widened
from fxqfix.evidence._tail import Tail
from fxqfix.evidence.places import Places
from fxqfix.evidence.structure import Op, computing
from fxqfix.evidence.weights import WeightPair
from fxqfix.passes._draws import Draws
from fxqfix.passes._fold_exported import FOLDED_IN_TRAINING
from fxqfix.passes._region import Cutter, Region, interprets
from fxqfix.passes._shadow_modules import Local
from fxqfix.qparams import QParams

__all__ = ["Reads", "Recompute"]

Reads = tuple[tuple[Overwrite, fx.Node], ...]  # a use, and the node to read there


@dataclass(frozen=True)
class Recompute:
    """Computes a site anew from the folded and frozen prepared graph.

    Attributes:
        cutter: Of the prepared graph, frozen, BatchNorm folded; uses of values that an in-place op
            has overwritten read its result there.
        end: The node whose value the site quantizes.
        site: The node that quantizes it; None for an output of the model.
        weights: Module path -> (prepared, converted) weight, for the pairs of weights.
        unfolded: The same graph before BatchNorm was folded.
        inner: Node name -> qparams of values that only the converted model quantizes, inside what
            is one float computation for the prepared model (a pool that eager mode observes not).
        floats: What only the prepared model quantizes, inside what is one float computation for the
            converted one: node name of a fake-quant -> (site, None), path of a module -> (site, its
            float weight).
        blocks: Node name of a weight that the prepared model leaves in float since its grids are by
            block -> the converted values.
        draws: What the converted model drew, which the region draws again.
        others: Node name of a float constant, or layer, -> the converted one, with other values.
        native: Whether those values are rounded by kernels, which add the zero point before they
            round (an odd one flips the parity of a tie), or by decomposed ops, which add it after.
    """

    cutter: Cutter
    end: fx.Node
    site: fx.Node | None
    weights: Mapping[str, WeightPair]
    unfolded: fx.GraphModule
    inner: Mapping[str, QParams] = field(default_factory=dict)
    native: bool = True
    floats: Mapping[str, tuple[str, Tensor | None]] = field(default_factory=dict)
    draws: Draws | None = None
    blocks: Mapping[str, Tensor] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def _region(self) -> Region:
        return self.cutter.region(self.end, self.site)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the nodes that the region starts from, in the shadow's order."""
        return tuple(node.name for node in self._region.inputs)

    @property
    def names(self) -> frozenset[str]:
        """Names of the nodes of the region."""
        return frozenset(node.name for node in self._region.nodes)

    @cached_property
    def _paths(self) -> tuple[str, ...]:
        """Paths of the modules that the region calls."""
        nodes = self._region.graph.nodes
        return tuple(str(n.target) for n in nodes if n.op == "call_module")

    @cached_property
    def ops(self) -> tuple[Op, ...]:
        """The ops of the region."""
        return computing(self._region.graph, self.cutter.graph_module)

    @cached_property
    def own_weights(self) -> dict[str, WeightPair]:
        """The weights that this site's own region uses."""
        return {path: self.weights[path] for path in self._paths if path in self.weights}

    @cached_property
    def _bias_nodes(self) -> dict[str, str]:
        """Path of a functional op's weight's fake-quant -> node of the op's bias."""
        modules, found = modules_of(self.cutter.graph_module), dict[str, str]()
        for node in self._region.graph.nodes:
            if node.op == "call_module" and str(node.target) in self.own_weights:
                bias = bias_node(reader(node, modules))
                if bias is not None:
                    found[str(node.target)] = bias.name
        return found

    @cached_property
    def own_inner(self) -> dict[str, QParams]:
        """Those of `inner` that lie in this site's region."""
        names = {n.name for n in self._region.graph.nodes if n.op != "placeholder"}
        return {name: q for name, q in self.inner.items() if name in names - {self.end.name}}

    @cached_property
    def own_floats(self) -> dict[str, tuple[str, Tensor | None]]:
        """Those of `floats` that lie in this site's region."""
        nodes = [n for n in self._region.graph.nodes if n.op != "placeholder"]
        names = {n.name for n in nodes} | set(self._paths)
        return {name: value for name, value in self.floats.items() if name in names}

    @cached_property
    def own_blocks(self) -> dict[str, Tensor]:
        """Those of `blocks` that this site's region reads."""
        names = {n.name for n in self._region.graph.nodes if n.op != "placeholder"}
        return {name: value for name, value in self.blocks.items() if name in names}

    @cached_property
    def own_others(self) -> dict[str, Any]:
        """Those of `others` that this site's region reads, which are no bias of a weight."""
        biases = set(self._bias_nodes.values())
        nodes = [n for n in self._region.graph.nodes if n.op != "placeholder"]
        names = {n.name for n in nodes if str(n.target) not in self.own_weights} - biases
        return {name: value for name, value in self.others.items() if name in names}

    @cached_property
    def own_overwrites(self) -> tuple[Overwrite, ...]:
        """Those of `overwrites` whose reader lies in this site's region."""
        names = {n.name for n in self._region.graph.nodes if n.op != "placeholder"}
        return tuple(use for use in self.cutter.uses if use.reader.name in names)

    @cached_property
    def before(self) -> Reads:
        """Reading what was there before it was overwritten."""
        return tuple((use, use.value) for use in self.own_overwrites)

    @cached_property
    def behind(self) -> Reads:
        """Reading the sites of the ops that overwrote it."""
        sites = self.cutter.behind
        return tuple((use, sites[use.op]) for use in self.own_overwrites if use.op in sites)

    def trains(self, *kinds: type[nn.Module]) -> str:
        """Path of a module of these kinds in train mode that the region runs, "" without one.

        For a BatchNorm that an exported graph spells out, and for a call of dropout that was traced
        in train mode, the name of its node.
        """
        if _torch.BATCH_NORM in kinds:
            for node in self._region.graph.nodes:
                if FOLDED_IN_TRAINING in node.meta:
                    return str(node.meta[FOLDED_IN_TRAINING])
        if _torch.DROPOUT in kinds:
            for node in self._region.graph.nodes:
                if drops(node) and not self._drew(node):
                    return str(node.name)
        for path in self._paths:
            for name, module in self.unfolded.get_submodule(path).named_modules():
                if module.training and isinstance(module, kinds):
                    return f"{path}.{name}" if name else path
        return ""

    def _drew(self, node: fx.Node) -> bool:
        return self.draws is not None and self.draws.drew(node.name)

    def folded(self, local: Local) -> Tensor:
        """The site's value in float32, with BatchNorm folded."""
        inputs = _torch.tree_map_tensors(Tensor.clone, local.inputs)
        return self._interpreter.compute(inputs, {}, {}, wide=False)

    @cached_property
    def _interpreter(self) -> Interpreter:
        return self._interprets(self._region.graph)

    def _interprets(self, graph: fx.Graph) -> Interpreter:
        made = interprets(Interpreter, self.cutter.graph_module, graph)
        made.draws = self.draws
        return made

    @cached_property
    def _readers(self) -> dict[Reads, Interpreter]:
        return {}

    def _reading(self, reads: Reads) -> Interpreter:
        """The region with some uses as they were, or of another node, and nothing overwritten."""
        if reads not in self._readers:
            graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
            graph.output(graph.graph_copy(self._region.graph, copies))
            nodes = {old.name: new for old, new in copies.items()}
            for use, instead in reads:
                at = {**nodes, use.value.name: nodes[instead.name]}
                reader = nodes[use.reader.name]
                reader.args = fx.map_arg(use.args, partial(_named, at))
                reader.kwargs = fx.map_arg(use.kwargs, partial(_named, at))
            made = self._readers[reads] = self._interprets(graph)
            made.spared = frozenset(use.op.name for use in self.own_overwrites)
        return self._readers[reads]

    @cached_property
    def _shells(self) -> dict[str, Shell]:
        """What the region calls, in float64, without the weights: copying a module is expensive."""
        own = dict.fromkeys(self._paths)
        return {path: Shell(self.cutter.graph_module.get_submodule(path)) for path in own}

    def exact(
        self,
        local: Local,
        weights: Mapping[str, WeightView],
        *,
        inner: bool = False,
        floats: bool = False,
        blocks: bool = False,
        others: bool = False,
        reads: Reads = (),
    ) -> Tensor:
        """The site's value in float64 and eval mode, with the given weights.

        Args:
            local: The shadow's inputs.
            weights: Module path -> weight, in place of the region's own.
            inner: Whether to quantize in between where only the converted model does.
            floats: Whether to compute in float where only the prepared model quantizes.
            blocks: Whether weights by block have the converted values.
            others: Whether float constants and layers have the converted values.
            reads: Some of `before` or of `behind`: what the readers read there.
        """
        inputs = [
            widened(value) if pair is None else dequantize_wide(*pair)
            for value, pair in zip(local.inputs, local.codes, strict=True)
        ]
        grids = {n: (q, self.native) for n, q in self.own_inner.items()} if inner else {}
        biases = {node: weights[path].bias for path, node in self._bias_nodes.items()}
        biases |= self.own_blocks if blocks else {}
        own = self.own_others if others else {}
        biases |= {n: v for n, v in own.items() if isinstance(v, Tensor)}
        run = self._reading(reads) if reads else self._interpreter
        with self._modules(weights, floats) as modules:
            for node in self._region.graph.find_nodes(op="call_module") if own else ():
                if node.name in own:
                    modules[str(node.target)] = own[node.name]
            return run.compute(inputs, modules, grids, wide=True, biases=biases)

    @contextmanager
    def _modules(
        self, weights: Mapping[str, WeightView], floats: bool, skipped: Container[str] = ()
    ) -> Iterator[dict[str, Callable[..., Any]]]:
        """What to call in float64, by path; the weights are let go of afterwards."""
        loose = {n: v for n, (_, v) in self.own_floats.items()} if floats else {}
        shells = {path: shell for path, shell in self._shells.items() if path not in skipped}
        modules: dict[str, Callable[..., Any]] = {
            path: shell.filled(weights.get(path), loose.get(path)) for path, shell in shells.items()
        }
        for node in self._region.graph.nodes:
            if node.op == "call_module" and node.name in loose and loose[node.name] is None:
                modules[str(node.target)] = nn.Identity()
            if node.op == "call_module" and self._drew(node):
                modules.pop(str(node.target), None)
        try:
            yield modules
        finally:
            for shell in shells.values():
                shell.empty()

    @cached_property
    def _tail(self) -> Tail:
        modules = modules_of(self.cutter.graph_module)
        left_out = self.draws.names if self.draws is not None else ()
        return Tail.of(self._region.graph, modules, self.own_weights, left_out)

    @cached_property
    def _places_interpreter(self) -> AtPlaces:
        made = interprets(AtPlaces, self.cutter.graph_module, self._region.graph)
        made.draws = self.draws
        return made

    def at(
        self,
        places: Places,
        local: Local,
        weights: Mapping[str, WeightView],
        sums: dict[Any, Any],
        *,
        floats: bool = False,
        **options: Any,
    ) -> Tensor:
        """`exact` at some places of the site's value, 1-d.

        Args:
            places: Where.
            local: The shadow's inputs.
            weights: Module path -> weight, in place of the region's own.
            sums: Sums of integers that were computed for this batch; more are added.
            floats: See `exact`.
            options: The others of `exact`.
        """
        tail = self._tail
        if any(options.values()) or not (tail.nodes or tail.products):
            return places.take(self.exact(local, weights, floats=floats, **options))
        index = {n: i for i, n in enumerate(self._region.graph.find_nodes(op="placeholder"))}
        values, skipped = dict[fx.Node, Tensor](), set[str]()
        loose = self.own_floats if floats else {}
        for node, product in tail.products.items():
            weight, pair = weights.get(product.path), local.codes[index[product.source]]
            usable = weight is not None and pair is not None and product.takes(weight, pair[1])
            if not usable or product.path in loose or weight is None or pair is None:
                continue
            key = node, id(weight.codes), weight.qparams.zero_points
            if key not in sums:
                if product.source not in sums:
                    sums[product.source] = product.steps(*pair)
                found = product.sums(sums[product.source], weight, places)
                sums[key] = found, weight.codes  # whose id is in the key
            values[node] = product.value(sums[key][0], pair[1], weight, places)
            skipped.add(product.path)
        inputs = list[Any]()
        for node, i in index.items():
            pair = local.codes[i]
            if node.users and all(user in values for user in node.users):
                inputs.append(None)
            elif node not in tail.given or not isinstance(local.inputs[i], Tensor):
                inputs.append(widened(local.inputs[i]) if pair is None else dequantize_wide(*pair))
            elif pair is None:
                inputs.append(widened(places.take(local.inputs[i])))
            else:
                inputs.append(_taken(places, *pair))
        biases = {n: weights[path].bias for path, n in self._bias_nodes.items()}
        run = self._places_interpreter
        run.prepare(tail, places, values)
        with self._modules(weights, floats, skipped) as modules:
            for path in skipped:
                modules[path] = _nothing
            return run.compute(inputs, modules, {}, wide=True, biases=biases)


def _nothing(*_: Any) -> None:
    """What stands where a weight's fake-quant isn't asked."""


def _taken(places: Places, codes: Tensor, grid: QParams) -> Tensor:
    if grid.axis is not None or codes.shape != places.shape:
        return places.take(dequantize_wide(codes, grid))
    scale, point = places.grid(grid)
    return places.take(codes).double().sub_(point).mul_(scale)


def _named(nodes: Mapping[str, fx.Node], node: fx.Node) -> fx.Node:
    return nodes[node.name]

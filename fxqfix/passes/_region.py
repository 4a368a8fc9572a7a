"""The part of a prepared graph between sites, as a module of its own: what a shadow runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from torch import fx, nn

from fxqfix.dialects._base import modules_of
from fxqfix.dialects._writes import Overwrite, is_inplace, overwrites, twins
from fxqfix.ops import match_node

__all__ = ["Cutter", "Region", "functional_uses", "interprets"]

_Interpreter = TypeVar("_Interpreter", bound=fx.Interpreter)

_Writers = dict[fx.Node, list[fx.Node]]


@dataclass(frozen=True)
class Region:
    """A computation between sites.

    Attributes:
        graph: Its nodes; its placeholders are the values of `inputs`, in that order.
        inputs: Site nodes and placeholders of the prepared graph that it starts from.
        mutates: Whether any of its ops writes in place.
        nodes: The nodes of the prepared graph that it holds, the inputs among them.
    """

    graph: fx.Graph
    inputs: tuple[fx.Node, ...]
    mutates: bool
    nodes: tuple[fx.Node, ...]

    def module(self, root: fx.GraphModule) -> fx.GraphModule:
        """The region as a module, which shares the modules of `root`."""
        return fx.GraphModule(root, self.graph, "Region")


def interprets(
    kind: type[_Interpreter], graph_module: fx.GraphModule, graph: fx.Graph
) -> _Interpreter:
    """An interpreter of a part of a graph module, which holds no modules but those of the part.

    FX's own lists all modules of the model, again for each site, and keeps them.
    """
    made = kind(nn.Module(), graph=graph)
    made.module = graph_module
    paths = (str(n.target) for n in graph.nodes if n.op == "call_module")
    made.submodules = {path: graph_module.get_submodule(path) for path in paths}
    return made


def functional_uses(graph_module: fx.GraphModule) -> list[Overwrite]:
    """Let users behind an in-place op read its result, so that dataflow says what memory does.

    Cut out of its surroundings, a region has to see what the op wrote too. Users that take it from
    a second call of the op (explicit-writes) read its result again: a converted model may do so.

    Returns:
        The uses that were changed, as they were.
    """
    graph, modules = graph_module.graph, modules_of(graph_module)
    found = [(use.value, use) for use in overwrites(graph, modules)] + twins(graph, modules)
    for read, use in found:
        use.reader.replace_input_with(read, use.op)
    return [use for _, use in found]


def _writers(graph_module: fx.GraphModule, modules: Mapping[str, nn.Module]) -> _Writers:
    """In-place ops by the value whose memory they write through a view: ``x.flatten(1).add_(1)``.

    Dataflow does not lead from them to later readers of that value. An op that copies after all
    (flatten of a strided tensor) costs a region two needless nodes and changes nothing.
    """
    found: _Writers = {}
    for node in graph_module.graph.nodes:
        if not node.all_input_nodes or not is_inplace(node, modules):
            continue
        target = node.all_input_nodes[0]
        while target.all_input_nodes and _is_view(target, modules):
            target = target.all_input_nodes[0]
            found.setdefault(target, []).append(node)
    return found


def _is_view(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    found = match_node(node, modules)
    return found is not None and found.spec.output == "shape"


@dataclass(frozen=True)
class Cutter:
    """Cuts regions out of one graph, which must not be edited in between.

    Attributes:
        graph_module: The graph to cut from.
        starts: Nodes whose values are given; the walk upstream stops at them.
        uses: What `functional_uses` changed: where the region reads an in-place op's result, the
            site right behind that op is an input too, since it may be what a converted op reads.
    """

    graph_module: fx.GraphModule
    starts: frozenset[fx.Node]
    uses: tuple[Overwrite, ...] = ()

    @cached_property
    def _modules(self) -> Mapping[str, nn.Module]:
        return modules_of(self.graph_module)

    @cached_property
    def _order(self) -> dict[fx.Node, int]:
        return {node: i for i, node in enumerate(self.graph_module.graph.nodes)}

    @cached_property
    def _writers(self) -> _Writers:
        return _writers(self.graph_module, self._modules)

    @cached_property
    def behind(self) -> dict[fx.Node, fx.Node]:
        """The site right behind an op."""
        return {n.all_input_nodes[0]: n for n in self.starts if n.all_input_nodes}

    def region(self, end: fx.Node, site: fx.Node | None = None) -> Region:
        """Cut out what computes `end` from the starts and the graph's inputs.

        Args:
            end: The node whose value the region returns.
            site: The start that quantizes this value, which is not given here.

        Returns:
            The region; its inputs are the starts and placeholders that it really needs, and those
            sites behind in-place ops.
        """
        needed = self._needed(end, site)
        for use in self.uses:
            behind = self.behind.get(use.op)
            if use.reader in needed and behind is not None and behind is not site:
                needed.add(behind)
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        ordered = sorted(needed, key=self._order.__getitem__)
        inputs = tuple(n for n in ordered if self._given(n, site) or n.op == "placeholder")
        for node in inputs:
            copies[node] = graph.create_node("placeholder", node.name, name=node.name)
        for node in ordered:
            if node not in copies:
                copies[node] = graph.node_copy(node, lambda n: copies[n])
        graph.output(copies[end])
        mutates = any(is_inplace(n, self._modules) for n in ordered if n not in inputs)
        return Region(graph, inputs, mutates, tuple(ordered))

    def _needed(self, end: fx.Node, site: fx.Node | None) -> set[fx.Node]:
        needed: set[fx.Node] = set()
        queue = [end]
        while queue:
            node = queue.pop()
            if node in needed:
                continue
            needed.add(node)
            last = self._order[end]
            queue.extend(w for w in self._writers.get(node, ()) if self._order[w] < last)
            if not self._given(node, site) and node.op != "placeholder":
                queue.extend(node.all_input_nodes)
        return needed

    def _given(self, node: fx.Node, site: fx.Node | None) -> bool:
        return node in self.starts and node is not site

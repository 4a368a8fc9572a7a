"""The part of a prepared graph between sites, as a module of its own: what a shadow runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx, nn

from fxqfix.dialects._writes import Overwrite, is_inplace, overwrites
from fxqfix.ops import match_node

__all__ = ["Region", "cut", "functional_uses"]

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


def functional_uses(graph_module: fx.GraphModule) -> list[Overwrite]:
    """Let users behind an in-place op read its result, so that dataflow says what memory does.

    Cut out of its surroundings, a region has to see what the op wrote too.

    Returns:
        The uses that were changed, as they were.
    """
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    found = overwrites(graph_module.graph, modules)
    for use in found:
        use.reader.replace_input_with(use.value, use.op)
    return found


def _writers(graph_module: fx.GraphModule, modules: dict[str, nn.Module]) -> _Writers:
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


def _is_view(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    found = match_node(node, modules)
    return found is not None and found.spec.output == "shape"


def cut(
    graph_module: fx.GraphModule,
    end: fx.Node,
    starts: Iterable[fx.Node],
    uses: Sequence[Overwrite] = (),
) -> Region:
    """Cut out what computes `end` from `starts` (site nodes) and the graph's inputs.

    Args:
        graph_module: The graph to cut from.
        end: The node whose value the region returns.
        starts: Nodes whose values are given; the walk upstream stops at them.
        uses: What `functional_uses` changed: where the region reads an in-place op's result, the
            site right behind that op is an input too, since it may be what a converted op reads.

    Returns:
        The region; its inputs are the starts and placeholders that it really needs, and those.
    """
    given = set(starts)
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    writers = _writers(graph_module, modules)
    needed: set[fx.Node] = set()
    queue = [end]
    while queue:
        node = queue.pop()
        if node in needed:
            continue
        needed.add(node)
        queue.extend(w for w in writers.get(node, ()) if order[w] < order[end])
        if node not in given and node.op != "placeholder":
            queue.extend(node.all_input_nodes)
    behind = {n.all_input_nodes[0]: n for n in given if n.all_input_nodes} if uses else {}
    needed |= {behind[use.op] for use in uses if use.reader in needed and use.op in behind}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    ordered = [node for node in graph_module.graph.nodes if node in needed]
    inputs = tuple(n for n in ordered if n in given or n.op == "placeholder")
    for node in inputs:
        copies[node] = graph.create_node("placeholder", node.name, name=node.name)
    for node in ordered:
        if node not in copies:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(copies[end])
    mutates = any(is_inplace(n, modules) for n in ordered if n not in inputs)
    return Region(graph, inputs, mutates, tuple(ordered))

"""Values that lie in one memory, and who reads them behind an op that writes there."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from fxqfix import ops
from fxqfix.dialects._writes import is_inplace

__all__ = ["readers_behind"]


def readers_behind(
    writer: fx.Node, value: fx.Node, modules: Mapping[str, nn.Module]
) -> tuple[str, ...]:
    """Names of the nodes that read a value's memory behind an op that writes there.

    Args:
        writer: The op. It is listed itself where it takes this memory by another argument too, or
            where that is a constant, which the next forward reads.
        value: What it writes over.
        modules: Of the graph, by path.
    """
    shared = _sharing(value, modules)
    order = {node: i for i, node in enumerate(writer.graph.nodes)}
    users = dict.fromkeys(user for node in shared for user in node.users)
    found = [u for u in users if order[u] > order[writer] and not _asks_size(u, modules)]
    taken: list[fx.Node] = []
    fx.map_arg((writer.args, writer.kwargs), taken.append)
    kept = any(node.op == "get_attr" for node in shared)
    own = [writer] if kept or sum(node in shared for node in taken) > 1 else []
    return tuple(node.name for node in (*own, *found))


def _sharing(value: fx.Node, modules: Mapping[str, nn.Module]) -> set[fx.Node]:
    """The values that may lie in the memory of this one, itself among them."""
    found, queue = set[fx.Node](), [value]
    while queue:
        node = queue.pop()
        if node in found:
            continue
        found.add(node)
        queue.extend(user for user in node.users if _hands_on(user, node, modules))
        queue.extend(n for n in node.all_input_nodes[:1] if _hands_on(node, n, modules))
    return found


def _hands_on(node: fx.Node, source: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether an op's result may lie in the memory of its first input.

    Some reshapes copy after all, which the tensor's layout decides.
    """
    found = ops.match_node(node, modules)
    if found is None or not node.all_input_nodes or node.all_input_nodes[0] is not source:
        return False
    if found.spec.inplace and is_inplace(node, modules):
        return True
    copies = found.key == "stack" or "clone" in str(node.target)
    return found.spec.output == "shape" and not copies


def _asks_size(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    found = ops.match_node(node, modules)
    return found is not None and found.spec.output == "none"

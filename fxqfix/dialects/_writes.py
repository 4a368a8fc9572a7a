"""Ops that write in place, and what reads the written value by its old name."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

__all__ = ["Overwrite", "is_inplace", "overwrites"]

_INPLACE = {
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imatmul", "iand", "ior", "ixor")
}


def is_inplace(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """True where an op overwrites its first input."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op != "call_function":
        return False
    name = str(getattr(node.target, "__name__", "")).split(".")[0]
    inplace_option = bool(node.kwargs.get("inplace", False))
    return node.target in _INPLACE or name.endswith("_") or inplace_option


@dataclass(frozen=True)
class Overwrite:
    """An op that reads, behind an in-place op, a value that this op has overwritten.

    Attributes:
        op: The in-place op; it is the last that writes there before `reader` reads.
        value: What the reader names, and the op wrote over.
        reader: Any node behind the op that uses `value`, the graph's output too.
        args: The reader's arguments, as the graph has them.
        kwargs: Likewise.
    """

    op: fx.Node
    value: fx.Node
    reader: fx.Node
    args: tuple[Any, ...] = field(hash=False)  # they follow from the reader, and may hold slices
    kwargs: dict[str, Any] = field(hash=False)


def overwrites(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> list[Overwrite]:
    """Where memory says something else than dataflow: reads behind an in-place op.

    After ``y = x.relu_()`` every later reader of x sees y's values. Writes through views
    (``x.flatten(1).add_(1)``) are not followed.
    """
    writers: dict[fx.Node, list[fx.Node]] = {}  # the value that was there first -> in-place ops
    first: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        # Asked of few nodes: a value with one user is nobody else's to read.
        if not inputs or (len(inputs[0].users) == 1 and inputs[0] not in first):
            continue
        if is_inplace(node, modules):
            first[node] = root = first.get(inputs[0], inputs[0])
            writers.setdefault(root, []).append(node)
    if not writers:
        return []
    order = {node: i for i, node in enumerate(graph.nodes)}
    found = []
    for root, ops in writers.items():
        for value in (root, *ops):
            for reader in value.users:
                between = [op for op in ops if order[value] < order[op] < order[reader]]
                if between:
                    found.append(Overwrite(between[-1], value, reader, reader.args, reader.kwargs))
    return found

"""Ops that write in place, and what reads the written value by its old name."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

__all__ = ["IN_FLOAT", "Overwrite", "is_inplace", "overwrites", "twins"]

IN_FLOAT = "_in_float"  # ends the path of the module that an in-place op's twin calls

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


def twins(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> list[tuple[fx.Node, Overwrite]]:
    """Reads of an in-place op's result from a second call of the op, on a copy of its input.

    That is how explicit-writes spells reads of what an op has overwritten.

    Returns:
        (second call, the read as it would be if it named the overwritten value).
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    found: list[tuple[fx.Node, Overwrite]] = []
    for copied in graph.nodes:
        if not _is_copy(copied) or len(copied.users) != 1:
            continue
        (twin,), value = copied.users, copied.all_input_nodes[0]
        ops = (n for n in value.users if order[n] > order[copied] and is_inplace(n, modules))
        op = next((n for n in ops if _calls_alike(n, twin, {value: copied})), None)
        if op is None:
            continue
        for reader in (n for n in twin.users if order[n] > order[op]):
            args, kwargs = _swapped((reader.args, reader.kwargs), {twin: value})
            found.append((twin, Overwrite(op, value, reader, args, kwargs)))
    return found


def _is_copy(node: fx.Node) -> bool:
    called = node.target in (torch.clone, torch.ops.aten.clone.default)
    return called or (node.op == "call_method" and node.target == "clone")


def _calls_alike(op: fx.Node, twin: fx.Node, swap: Mapping[fx.Node, fx.Node]) -> bool:
    """Whether two nodes call the same, but for one input."""
    target = f"{op.target}{IN_FLOAT}" if op.op == "call_module" else op.target
    alike = (op.op, target) == (twin.op, twin.target)
    return alike and _swapped((op.args, op.kwargs), swap) == (twin.args, twin.kwargs)


def _swapped(arguments: Any, swap: Mapping[fx.Node, fx.Node]) -> Any:
    return fx.map_arg(arguments, lambda n: swap.get(n, n))

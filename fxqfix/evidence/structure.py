"""Which ops compute a site, and how: a converted region with others computes something else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

from torch import fx, nn

from fxqfix import ops
from fxqfix.dialects._base import modules_of
from fxqfix.engines import Call
from fxqfix.export._options import arguments_of, options
from fxqfix.inserted import round_to_grid

__all__ = ["Op", "computing", "counted", "otherwise"]

_EMULATED = "emulated_"
_ASIDE = frozenset({"boundary", "shape"})  # families that leave values as they are, or the grid's
_NO_OPTIONS = frozenset({"inplace", "training", "p", "memory_format", "dtype"})  # move no value
_INSERTED = (getitem, round_to_grid)  # in no row, and no op of anybody's


@dataclass(frozen=True)
class Op:
    """One op of a region.

    Attributes:
        parts: Keys of the op table, fused ones each; none of what leaves values as they are.
        key: Key of its row.
        relu: Whether a relu is fused, or is all.
        spelled: The function, the method or the class of the module.
        options: Its options by name.
    """

    parts: tuple[str, ...]
    key: str
    relu: bool
    spelled: Any
    options: Mapping[str, Any] = field(default_factory=dict)


def computing(
    graph: fx.Graph, root: fx.GraphModule, calls: Mapping[str, Call] | None = None
) -> tuple[Op, ...]:
    """The ops of a region.

    Args:
        graph: The region.
        root: The module that it calls into.
        calls: Of an emulated region: the int8 ops by the names of their nodes.
    """
    return tuple(_ops(graph, root, calls or {}))


def _ops(graph: fx.Graph, root: fx.GraphModule, calls: Mapping[str, Call]) -> Iterator[Op]:
    modules = modules_of(root)
    for node in graph.nodes:
        if node.op == "placeholder":
            continue  # the site that the region begins at
        call = calls.get(node.name.removeprefix(_EMULATED))
        match = ops.match_node(node, modules)
        if call is not None and node.name.startswith(_EMULATED):
            spelled = call.target if call.module is None else type(call.module)
            given = options(call.key, call.module, call.arguments, call.weight)
            key, relu = call.key, call.relu
        elif match is not None:
            module = modules[str(node.target)] if node.op == "call_module" else None
            if isinstance(module, nn.Sequential):
                module = module[0]  # fused modules
            spelled = node.target if module is None else type(module)
            key, relu = match.spec.key, match.relu
            given = options(key, module, arguments_of(node, root), None)
        elif node.op in ("call_function", "call_method") and node.target not in _INSERTED:
            key = str(getattr(node.target, "__name__", node.target))  # in no row, as torch.sin
            relu, spelled, given = False, node.target, {}
        else:
            continue
        row = ops.OPS.get(key)
        aside = key == "relu" or (row is not None and row.family in _ASIDE)
        parts = () if aside else ops.parts(key)
        yield Op(parts, key, relu or key == "relu", spelled, _plainly(key, given))


def _plainly(key: str, given: dict[str, Any]) -> dict[str, Any]:
    """Options by names that every spelling has: numbers that are operands are one.

    Every dialect has other names for the operands of arithmetic.
    """
    row = ops.OPS.get(ops.parts(key)[0])
    if row is None or row.pointwise != "arithmetic":
        # "same" has other names in integers, and is no other padding.
        moving = {n: v for n, v in given.items() if n not in _NO_OPTIONS}
        return {n: v for n, v in moving.items() if n != "padding" or not isinstance(v, str)}
    numbers = (v for n, v in given.items() if n != "alpha" and isinstance(v, int | float))
    return {"number": tuple(sorted(map(float, numbers)))}


def counted(found: tuple[Op, ...]) -> Counter[str]:
    """How often which op is there; a second relu changes nothing.

    Args:
        found: What `computing` gives.
    """
    counts = Counter(part for op in found for part in op.parts)
    if any(op.relu for op in found):
        counts["relu"] = 1
    return counts


def otherwise(mine: tuple[Op, ...], theirs: tuple[Op, ...]) -> Iterator[str]:
    """Options that ops have in the one region and not in the other, a sentence each.

    Args:
        mine: The ops of the prepared region.
        theirs: Those of the converted one.
    """
    for key in dict.fromkeys(ops.parts(op.key)[0] for op in theirs):
        pair = [[op for op in side if ops.parts(op.key)[0] == key] for side in (mine, theirs)]
        for a, b in zip(*pair, strict=False) if len(pair[0]) == len(pair[1]) else ():
            yield from _apart(key, a, b)


def _apart(key: str, mine: Op, theirs: Op) -> Iterator[str]:
    names = mine.options.keys() & theirs.options.keys()
    if mine.spelled == theirs.spelled:
        names = mine.options.keys() | theirs.options.keys()
    for name in sorted(names):
        due, found = (op.options.get(name, "its default") for op in (mine, theirs))
        if due != found:
            yield f"{key} has {name} {found}, {due} is due"

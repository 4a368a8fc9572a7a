"""What graphs return, and how a branch is taken out of a twin again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from fxqfix.dialects import Reading
from fxqfix.pairing import Pair, Pairing

__all__ = ["TAG", "other_structure", "returned", "rounded_outputs", "without"]

TAG = "fxqfix_stream"  # in node.meta of every node that insert-shadows adds


def returned(graph: fx.Graph, like: fx.Graph | None = None) -> list[fx.Node]:
    """The nodes that a graph returns, in the order of its containers.

    Args:
        graph: The graph.
        like: A graph that returns the same structure: in its order, whatever the order of keys.
    """
    own = {path: v for path, v in _leaves(_end(graph)) if isinstance(v, fx.Node)}
    if like is not None:
        order = [path for path, v in _leaves(_end(like)) if isinstance(v, fx.Node)]
        if own.keys() == set(order):
            return [own[path] for path in order]
    return list(own.values())


def other_structure(prepared: fx.Graph, converted: fx.Graph) -> str:
    """How two models differ in the keys and the constants that they return; "" where they don't.

    Args:
        prepared: The prepared graph.
        converted: The converted graph; an exported one has no keys, they are in its code.
    """
    mine, theirs = (dict(_leaves(_end(g))) for g in (prepared, converted))
    keyed = all(any(isinstance(k, _Key) for path in side for k in path) for side in (mine, theirs))
    fixed = [
        {path: repr(v) for path, v in side.items() if not isinstance(v, fx.Node)}
        for side in (mine, theirs)
    ]
    if (not keyed or mine.keys() == theirs.keys()) and all(
        fixed[1].get(path, said) == said for path, said in fixed[0].items()
    ):
        return ""
    shown = [_shown(_end(g)) for g in (prepared, converted)]
    return f"the prepared model returns {shown[0]}, the converted one {shown[1]}"


class _Key(str):
    """A key of a dict, as written; positions are integers."""

    __slots__ = ()


def _end(graph: fx.Graph) -> Any:
    return next(n for n in graph.nodes if n.op == "output").args[0]


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The values in containers, each with the keys and positions that lead to it."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, _Key(repr(key))))
    elif isinstance(value, (tuple, list)):
        for i, inner in enumerate(value):
            yield from _leaves(inner, (*path, i))
    else:
        yield path, value


def _shown(value: Any) -> str:
    """A structure in brief: its keys and constants."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {_shown(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(_shown, value)) + ")"
    return "a value" if isinstance(value, fx.Node) else repr(value)


def rounded_outputs(prepared: Reading, converted: Reading, pairing: Pairing) -> list[Pair | None]:
    """Of each value that the models return: the site that only the converted one returns quantized.

    An op without a qconfig whose value a quantized op reads: the prepared model returns it in float
    and quantizes it for that reader, the converted model returns the codes.

    Args:
        prepared: The prepared model.
        converted: The converted model.
        pairing: Their sites.
    """
    sites = {p.converted.node: p for p in pairing.pairs if p.prepared.site.kind == "activation"}
    own = returned(prepared.graph_module.graph)
    other = returned(converted.graph_module.graph, prepared.graph_module.graph)
    if len(own) != len(other):
        return [None] * len(own)
    found: list[Pair | None] = []
    for mine, theirs in zip(own, other, strict=True):
        while theirs not in sites and theirs.op == "call_method" and theirs.target == "dequantize":
            (theirs,) = theirs.all_input_nodes
        p = sites.get(theirs)
        before = p is not None and mine is p.prepared.producer is not p.prepared.node
        found.append(p if before else None)
    return found


def without(twin: fx.GraphModule, stream: str) -> None:
    """Take a branch out of a twin again, and what reads it out of the arguments of probes.

    Args:
        twin: The twin; it is changed.
        stream: The branch's name.
    """
    gone = {n for n in twin.graph.nodes if n.meta.get(TAG) == stream}

    def kept(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            whole = [x for x in value if not isinstance(x, fx.Node) or x not in gone]
            found = [kept(x) for x in whole]
            return type(value)(x for x, w in zip(found, whole, strict=True) if w == [] or x != [])
        return value

    for node in {user for source in gone for user in source.users} - gone:
        node.args = kept(node.args)
    for node in reversed(list(twin.graph.nodes)):
        if node in gone:
            twin.graph.erase_node(node)
    twin.recompile()

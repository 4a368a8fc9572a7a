"""What graphs return, and how a branch is taken out of a twin again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from fxqfix.dialects import Reading
from fxqfix.pairing import Pair, Pairing

__all__ = [
    "TAG",
    "not_returned",
    "only",
    "other_structure",
    "places_of",
    "returned",
    "rounded_outputs",
    "without",
]

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
    same = not _keyed(mine, theirs) or mine.keys() == theirs.keys()
    if same and not _other_constants(mine, theirs):
        return ""
    shown = [_shown(_end(g)) for g in (prepared, converted)]
    return f"the prepared model returns {shown[0]}, the converted one {shown[1]}"


def not_returned(prepared: fx.Graph, converted: fx.Graph) -> list[tuple[str, str]]:
    """Of what the prepared model returns, what the converted one does not: (place, why).

    Args:
        prepared: The prepared graph.
        converted: The converted graph.
    """
    mine, theirs = (dict(_leaves(_end(g))) for g in (prepared, converted))
    if _keyed(mine, theirs):
        gone = [path for path in mine if path not in theirs]
    else:  # positions are all that tells
        gone = list(mine)[len(theirs) :]
    due, found = (_shown(_end(g)) for g in (prepared, converted))
    said = f"the converted model does not return it: it returns {found}, {due} is due"
    others = [
        (_place(path), f"the converted model returns {theirs[path]!r}, {mine[path]!r} is due")
        for path in _other_constants(mine, theirs)
    ]
    return [*((_place(path), said) for path in gone), *others]


def places_of(graph: fx.Graph) -> list[str]:
    """Where each value that a graph returns stands in its containers, e.g. "['part'][0]"."""
    return [_place(path) for path, v in _leaves(_end(graph)) if isinstance(v, fx.Node)]


def _keyed(*sides: Mapping[tuple[Any, ...], Any]) -> bool:
    return all(any(isinstance(k, _Key) for path in side for k in path) for side in sides)


def _other_constants(
    mine: Mapping[tuple[Any, ...], Any], theirs: Mapping[tuple[Any, ...], Any]
) -> list[tuple[Any, ...]]:
    """Where both return a constant, and not the same."""
    return [
        path
        for path, value in mine.items()
        if path in theirs
        and not any(isinstance(v, fx.Node) for v in (value, theirs[path]))
        and repr(value) != repr(theirs[path])
    ]


def _place(path: tuple[Any, ...]) -> str:
    return "".join(f"[{key}]" for key in path)


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


def only(twin: fx.GraphModule, stream: str) -> None:
    """Leave one branch of a twin, which then returns None for each value.

    Args:
        twin: The twin; it is changed.
        stream: The branch's name.
    """
    for node in reversed(list(twin.graph.nodes)):
        if node.op == "output":
            node.args = fx.map_arg(node.args, lambda _: None)
        elif node.op != "placeholder" and node.meta.get(TAG) != stream:
            twin.graph.erase_node(node)
    twin.recompile()

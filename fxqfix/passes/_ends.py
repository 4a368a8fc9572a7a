"""What graphs return, and how a branch is taken out of a twin again."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxqfix.dialects import Reading
from fxqfix.pairing import Pair, Pairing

__all__ = ["TAG", "returned", "rounded_outputs", "without"]

TAG = "fxqfix_stream"  # in node.meta of every node that insert-shadows adds


def returned(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that a graph returns, in the order of its containers.

    Args:
        graph: The graph.
    """
    found: list[fx.Node] = []
    fx.map_arg(next(n for n in graph.nodes if n.op == "output").args, found.append)
    return found


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
    own, other = (returned(r.graph_module.graph) for r in (prepared, converted))
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

"""The nodes that hold a site's state, beside those of a donor, and what differs there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from fxqfix.dialects import Tap, decomposed
from fxqfix.dialects.int8 import fetch

__all__ = ["holders", "obstacle", "state_differs"]


def state_differs(
    mine: Tap, theirs: Tap, graph_module: fx.GraphModule, donor: fx.GraphModule
) -> bool:
    """Whether a site holds another grid, other codes or another bias than a donor's.

    The range counts where the dialect's ops carry one.

    Args:
        mine: The site in `graph_module`.
        theirs: The site in `donor`.
        graph_module: A converted model.
        donor: A model of the same dialect.
    """
    a, b = mine.site.used, theirs.site.used
    if a is None or b is None or not a.same_grid(b):
        return True
    if mine.weight is not None and theirs.weight is not None:
        one, other = mine.weight(), theirs.weight()
        if not torch.equal(one.codes.int(), other.codes.int()):
            return True
        if one.bias is None or other.bias is None:
            return one.bias is not other.bias
        if not torch.equal(one.bias, other.bias):
            return True
    if _is_decomposed(mine.node) and a != b:
        return True
    return any(_constants_differ(x, y, graph_module, donor) for x, y in holders(mine, theirs))


def _is_decomposed(node: fx.Node) -> bool:
    return "quantized_decomposed" in str(node.target)


def _constants_differ(
    mine: fx.Node, theirs: fx.Node, graph_module: fx.GraphModule, donor: fx.GraphModule
) -> bool:
    """Of tensors that both calls read from their modules: biases, mostly."""
    for a, b in zip(mine.args, theirs.args, strict=False):
        one, other = (fetch(g, v) for g, v in ((graph_module, a), (donor, b)))
        if isinstance(one, Tensor) and isinstance(other, Tensor) and not torch.equal(one, other):
            return True
    return False


def obstacle(
    mine: Tap, theirs: Tap, graph_module: fx.GraphModule, donor: fx.GraphModule
) -> tuple[str, str] | None:
    """(found, expected) where a site is spelled in another way than the donor's; else None."""
    for node, source in holders(mine, theirs):
        found, expected = _spelled(node, graph_module), _spelled(source, donor)
        if found != expected:
            return found, expected
    return None


def _spelled(node: fx.Node, graph_module: fx.GraphModule) -> str:
    if node.op == "call_module":
        return type(graph_module.get_submodule(str(node.target))).__name__
    return f"{node.op} {node.target}"


def holders(mine: Tap, theirs: Tap) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The nodes that hold a site's state, each beside the donor's."""
    if mine.producer is not mine.node and mine.site.kind == "weight":
        # A constant, the ops that quantize it, and the op that takes it, with its bias.
        yield from _chain(mine.producer, mine.node, theirs.producer, theirs.node)
        # What else reads this constant has a bias too; the constant itself is shared.
        yield from ((a, b) for (_, a), (_, b) in zip(mine.repeats, theirs.repeats, strict=False))
        return
    yield mine.held or mine.node, theirs.held or theirs.node
    if mine.node is mine.producer or mine.site.kind == "weight":
        return
    backs = [u for u in mine.node.users if decomposed.is_dequantize(u)]
    sources = [u for u in theirs.node.users if decomposed.is_dequantize(u)]
    for back in backs if sources else ():
        yield back, sources[0]


def _chain(
    mine: fx.Node, end: fx.Node, theirs: fx.Node, other_end: fx.Node
) -> Iterator[tuple[fx.Node, fx.Node]]:
    while True:
        yield mine, theirs
        if mine is end or theirs is other_end or not mine.users or not theirs.users:
            return
        mine, theirs = next(iter(mine.users)), next(iter(theirs.users))

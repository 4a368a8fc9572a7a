"""Random numbers of a deployed model: what the integers drew, the gradients' graph draws again."""

from __future__ import annotations

from torch import fx

from fxqfix.dialects._base import modules_of
from fxqfix.dialects._modes import drops
from fxqfix.dialects._writes import is_inplace
from fxqfix.errors import UnsupportedError
from fxqfix.passes._draws import Draws, Mark, Replayed, called
from fxqfix.passes._in_integers import EMULATED
from fxqfix.passes._random import draws_in

__all__ = ["draw_once"]

_MARK = "mark_draws"


def draw_once(integers: fx.GraphModule, gradients: fx.GraphModule) -> None:
    """Mark where the first graph draws, and let the second draw the same.

    Both are edited. Modules whose mode decides whether they draw have to be in train mode.

    Args:
        integers: The emulated graph; it runs first.
        gradients: The graph of the fake-quants.

    Raises:
        UnsupportedError: A call of dropout was traced in train mode: no mode switches it off.
    """
    random = list(draws_in(gradients))
    for node in random:
        if drops(node):
            raise UnsupportedError(
                "a call of dropout was traced in train mode, so that the int8 model drops too",
                where=f"as_deployed, node {node.name!r}",
                found=node.format_node(),
                remedy="use the module, nn.Dropout, or prepare the model in eval mode",
            )
    if not random:
        return
    draws = Draws(frozenset(node.name for node in random))
    _mark(integers, draws)
    modules = modules_of(gradients)
    for node in random:
        inplace = is_inplace(node, modules)
        path = f"redrawn_{node.name}"
        gradients.add_module(path, Replayed(called(node, modules), node.name, draws, inplace))
        node.op, node.target = "call_module", path
    gradients.recompile()


def _mark(model: fx.GraphModule, draws: Draws) -> None:
    model.add_module(_MARK, Mark(draws))
    nodes = list(model.graph.nodes)
    random = list(draws_in(model))
    first = next(n for n in nodes if n.op != "placeholder")
    with model.graph.inserting_before(first):
        model.graph.call_module(_MARK, ("start",))
    for node in random:
        name = node.name.removeprefix(EMULATED)
        with model.graph.inserting_before(node):
            model.graph.call_module(_MARK, ("before", name, (node.args, node.kwargs)))
        with model.graph.inserting_after(node):
            model.graph.call_module(_MARK, ("after", name))
    model.recompile()

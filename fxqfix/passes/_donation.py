"""Copying the state of one site from a donor's graph, node by node."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxqfix.dialects import Tap, decomposed
from fxqfix.dialects.int8 import fetch
from fxqfix.errors import UnsupportedError
from fxqfix.passes._base import Rewriter
from fxqfix.passes._state import obstacle

__all__ = ["Donation"]

# What a node's arguments hold besides values of the graph, when it is not a module.
_CONSTANTS = (int, float, torch.dtype)


@dataclass(frozen=True)
class Donation:
    """Copying of one site's state."""

    rewriter: Rewriter
    donor: fx.GraphModule
    site: str

    def check(self, mine: Tap, theirs: Tap) -> None:
        """Refuse a site that is spelled in another way."""
        kinds = obstacle(mine, theirs, self.rewriter.graph_module, self.donor)
        if kinds is not None:
            raise UnsupportedError(
                "this site is spelled in another way than conversion spells it",
                where=f"restore-qparams, site {self.site!r}",
                found=kinds[0],
                expected=kinds[1],
                remedy="convert fxqfix.freeze(prepared) anew",
            )

    def state(self, node: fx.Node, source: fx.Node) -> None:
        """Of a module all of it, of a call the constants that it takes."""
        if node.op == "call_module":
            self._module(node, source)
            return
        graph, above = self.rewriter.graph, next(iter(node.all_input_nodes), None)
        pin = above if above is not None and decomposed.is_pin(above) else None
        held = decomposed.code_pin(node)
        with graph.inserting_before(node):
            node.args = tuple(self._value(a, b) for a, b in _zip(node.args, source.args))
            node.kwargs = {k: self._value(v, source.kwargs.get(k)) for k, v in node.kwargs.items()}
        if pin is not None:  # its bounds are those of the qparams that were
            given = decomposed.arguments(node)
            names = ("scale", "zero_point", "quant_min", "quant_max")
            pin.args = (pin.args[0], *decomposed.pin_bounds(*(given[n] for n in names)))
        if held is not None:
            given = decomposed.arguments(node)
            held.args = (node, given["quant_min"], given["quant_max"])
        self.rewriter.note(f"{self.site}: constants of {node.name} restored")

    def repeat(self, tap: Tap) -> None:
        """Let the other readers of a weight's constant read the restored one."""
        for node, _ in tap.repeats:
            node.args, node.kwargs = tap.producer.args, tap.producer.kwargs
            self.rewriter.note(f"{self.site}: {node.name} reads what {tap.producer.name} does")

    def _module(self, node: fx.Node, source: fx.Node) -> None:
        """A module that other nodes call too is left to them."""
        path, new = str(node.target), self.donor.get_submodule(str(source.target))
        old = self.rewriter.graph_module.get_submodule(path)
        users = [n for n in self.rewriter.graph.nodes if n.target == path]
        if len(users) > 1:
            path = node.target = f"{path}_of_{node.name}"
        fresh = copy.deepcopy(new).train(old.training)
        self.rewriter.set_module(path, fresh, f"{self.site}: restored")

    def _value(self, mine: Any, theirs: Any) -> Any:
        """An argument: the donor's where it is a constant, the graph's own value otherwise."""
        if isinstance(theirs, fx.Node) and theirs.op == "get_attr":
            return self._constant(theirs)
        constant = isinstance(theirs, _CONSTANTS) and not isinstance(theirs, bool)
        return theirs if constant and not isinstance(mine, fx.Node) else mine

    def _constant(self, theirs: fx.Node) -> fx.Node:
        value = fetch(self.donor, theirs)
        name = str(theirs.target)
        if isinstance(value, Tensor):
            return self.rewriter.buffer_node(f"{name}_restored", value.detach().clone())
        free = self.rewriter.add_constant(f"{name}_restored", copy.deepcopy(value))
        return self.rewriter.graph.create_node("get_attr", free, name=free)


def _zip(mine: tuple[Any, ...], theirs: tuple[Any, ...]) -> Iterator[tuple[Any, Any]]:
    """Arguments side by side; what the donor lacks stays."""
    padded = (*theirs, *(None,) * (len(mine) - len(theirs)))
    return zip(mine, padded, strict=False)

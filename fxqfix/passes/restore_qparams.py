"""restore-qparams: scales, zero points and weights of a converted model, taken from a right one.

The donor is the conversion of the frozen prepared model: what it holds at a site is what was
trained. State is copied from node to node; the structure of the user's graph stays.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from fxqfix import dialects
from fxqfix.dialects import Tap, decomposed
from fxqfix.dialects.int8 import fetch
from fxqfix.errors import PassError, UnsupportedError
from fxqfix.passes._base import Pass, Rewriter

__all__ = ["RestoreQParams", "obstacle", "state_differs"]

# What a node's arguments hold besides values of the graph, when it is not a module.
_CONSTANTS = (int, float, torch.dtype)


@dataclass(frozen=True)
class RestoreQParams(Pass):
    """Give sites of a converted model the grids, codes and biases that a donor has there.

    Works on reference, int8 and decomposed models; the donor is of the same dialect.

    Attributes:
        donor: A conversion of the same model with the right state; it is not changed.
        sites: Name of a site -> name of the donor's site. A site and the weight of its op share a
            module in most dialects, and are restored together.

    Raises:
        UnsupportedError: A site's node and the donor's are of different kinds.

    Example:
        >>> import copy, torch
        >>> from torch.ao.quantization import get_default_qat_qconfig_mapping
        >>> from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx
        >>> import fxqfix
        >>> from fxqfix.passes import RestoreQParams
        >>> x = torch.linspace(-1, 1, 16).reshape(2, 8)
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 2)).train()
        >>> prepared = prepare_qat_fx(net, get_default_qat_qconfig_mapping("fbgemm"), (x,))
        >>> _ = prepared(x)
        >>> donor = convert_fx(fxqfix.freeze(prepared))
        >>> converted = convert_fx(copy.deepcopy(prepared))
        >>> restored = RestoreQParams(donor, {"_0.weight": "_0.weight"})(converted).graph_module
        >>> torch.equal(restored(x), donor(x))
        True
    """

    name: ClassVar[str] = "restore-qparams"
    donor: fx.GraphModule | None = field(default=None, repr=False)
    sites: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), hash=False)

    def rewrite(self, rewriter: Rewriter) -> None:
        """Copy site by site."""
        if self.donor is None or not self.sites:
            return
        mine = {t.site.name: t for t in dialects.read(rewriter.graph_module).taps}
        theirs = {t.site.name: t for t in dialects.read(self.donor).taps}
        done: set[fx.Node] = set()
        for name, other in self.sites.items():
            work = _Copy(rewriter, self.donor, name)
            work.check(mine[name], theirs[other])
            for node, source in _nodes(mine[name], theirs[other]):
                if node not in done:
                    work.state(node, source)
                    done.add(node)
        for node in reversed(list(rewriter.graph.nodes)):
            if node.op == "get_attr" and not node.users:
                rewriter.graph.erase_node(node)

    def check(self, before: nn.Module, after: nn.Module) -> None:
        """Every site has the donor's grid, every weight its codes."""
        if self.donor is None:
            return
        theirs = {t.site.name: t for t in dialects.read(self.donor).taps}
        found = {t.site.name: t for t in dialects.read(after).taps}
        for name, other in self.sites.items():
            if found[name].site.used != theirs[other].site.used:
                raise PassError(
                    "a site does not have the donor's qparams",
                    where=f"{self.name}, site {name!r}",
                    found=str(found[name].site.used),
                    expected=str(theirs[other].site.used),
                )


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
    return any(_constants_differ(x, y, graph_module, donor) for x, y in _nodes(mine, theirs))


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
    for node, source in _nodes(mine, theirs):
        found, expected = _spelled(node, graph_module), _spelled(source, donor)
        if found != expected:
            return found, expected
    return None


def _spelled(node: fx.Node, graph_module: fx.GraphModule) -> str:
    if node.op == "call_module":
        return type(graph_module.get_submodule(str(node.target))).__name__
    return f"{node.op} {node.target}"


def _nodes(mine: Tap, theirs: Tap) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The nodes that hold a site's state, each beside the donor's."""
    if mine.producer is not mine.node and mine.site.kind == "weight":
        # A constant, the ops that quantize it, and the op that takes it, with its bias.
        yield from _chain(mine.producer, mine.node, theirs.producer, theirs.node)
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


@dataclass(frozen=True)
class _Copy:
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

"""float-islands: ops with weights left in float, because the engine's kernel is wrong for them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

from torch import fx, nn

from fxqfix import _torch
from fxqfix.dialects import int8
from fxqfix.dialects.weights import effective_weight, holder, weight_quantizer
from fxqfix.errors import UnsupportedError
from fxqfix.inserted import FloatIsland, Functional, QuantizedIsland
from fxqfix.passes._base import Pass, Rewriter
from fxqfix.passes._frozen import FrozenFakeQuantize

__all__ = ["FloatIslands"]


@dataclass(frozen=True)
class FloatIslands(Pass):
    """Replace modules of a frozen prepared model by float ones with the frozen weight's values.

    torch's conversion doesn't know them: in FX it puts a dequantize before and a quantize behind,
    in eager mode they do that themselves. What they compute is what the fake-quants saw.

    Attributes:
        reasons: Path of the module, or name of the node that calls a function -> why.

    Raises:
        UnsupportedError: A module's weight is not frozen.

    Example:
        >>> from fxqfix.passes import FloatIslands
        >>> FloatIslands({"up": "transposed-permutes"}).name
        'float-islands'
    """

    name: ClassVar[str] = "float-islands"
    requires: ClassVar[tuple[str, ...]] = (
        "freeze-qparams",
        "fold-batchnorm",
        "hold-weights",
    )
    reasons: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), hash=False)

    def rewrite(self, rewriter: Rewriter) -> None:
        """Swap module by module."""
        eager = not isinstance(rewriter.module, fx.GraphModule)
        done: dict[int, nn.Module] = {}
        nodes = (
            {} if eager else {n.name: n for n in rewriter.graph.nodes if n.op == "call_function"}
        )
        for path, reason in self.reasons.items():
            if path in nodes:
                _functional(rewriter, nodes[path], reason)
                continue
            module = rewriter.module.get_submodule(path)
            if id(module) not in done:
                island = _island(module, f"{self.name}, {path}", reason)
                done[id(module)] = _closed(island, module) if eager else island
            rewriter.set_module(path, done[id(module)], f"float, {reason}")


def _island(module: nn.Module, where: str, reason: str) -> FloatIsland:
    quantizer: Any = weight_quantizer(module)
    if quantizer is not None and not isinstance(quantizer, FrozenFakeQuantize):
        raise UnsupportedError(
            f"the weight of {type(module).__name__} is not frozen",
            where=where,
            found=type(quantizer).__name__,
            expected="FrozenFakeQuantize",
            remedy="call fxqfix.freeze(prepared) first",
        )
    inner: Any = copy.deepcopy(module)
    if hasattr(inner, "weight_fake_quant"):
        with _torch.quiet():
            inner = inner.to_float()
    for part in inner.modules():  # what eager prepare attached would be converted, or run
        _torch.strip_observer_hook(part)
        for name in ("qconfig", "activation_post_process"):
            if hasattr(part, name):
                delattr(part, name)
    if quantizer is not None:
        weight = quantizer(effective_weight(module)).detach()
        holder(inner).weight = nn.Parameter(weight, requires_grad=False)
    qparams = quantizer.qparams if quantizer is not None else None
    return FloatIsland(inner, qparams, reason).eval()


def _functional(rewriter: Rewriter, node: fx.Node, reason: str) -> None:
    """Call an island that holds the function's weight and bias."""
    given = int8.arguments(node, rewriter.graph_module)
    source = given.pop("input", given.pop("self", None))
    fake_quant, bias = given.pop("weight"), given.pop("bias", None)
    quantizer: Any = rewriter.graph_module.get_submodule(str(fake_quant.target))
    weight = quantizer(int8.fetch(rewriter.graph_module, fake_quant.args[0])).detach()
    bias = None if bias is None else bias.detach().clone()
    function: Any = node.target
    inner = Functional(function, weight, bias, given)
    path = rewriter.add_module(node.name, FloatIsland(inner, quantizer.qparams, reason).eval())
    with rewriter.graph.inserting_before(node):
        new = rewriter.graph.create_node("call_module", path, (source,))
    name = node.name
    rewriter.replace(node, new, f"float, {reason}")
    new.name = name
    for unused in (fake_quant, *fake_quant.all_input_nodes):
        if not unused.users:
            rewriter.graph.erase_node(unused)


def _closed(island: FloatIsland, module: nn.Module) -> nn.Module:
    observer = getattr(module, "activation_post_process", None)
    output = observer.qparams if isinstance(observer, FrozenFakeQuantize) else None
    return QuantizedIsland(island, output).eval()

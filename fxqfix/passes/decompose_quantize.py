"""decompose-quantize: rewrite to quantized_decomposed ops, which carry quant_min / quant_max."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

from torch import fx, nn

from fxqfix import _torch, dialects, ops
from fxqfix.dialects import Reading, Tap, int8, prepared
from fxqfix.dialects._base import modules_of
from fxqfix.dialects.weights import (
    WeightView,
    effective_weight,
    holder,
    reference_weight,
    tensor_weight,
    weight_quantizer,
)
from fxqfix.errors import RangeUnknownError, UnsupportedError
from fxqfix.passes._base import Pass, Rewriter
from fxqfix.passes._decomposed_module import decompose_inside
from fxqfix.passes._forms import Emit, emit_float, quantize_node
from fxqfix.passes._frozen import FrozenFakeQuantize
from fxqfix.qparams import quantize

__all__ = ["DecomposeQuantize"]


@dataclass(frozen=True)
class DecomposeQuantize(Pass):
    """Rewrite a frozen prepared, a reference or an int8 graph to decomposed ops.

    Weights become integer buffers with a dequantize op; every site becomes
    ``quantize_per_tensor(x, scale, zero_point, quant_min, quant_max, dtype)`` and its dequantize.

    Attributes:
        ranges: Site name -> (quant_min, quant_max). A frozen prepared graph knows its own; a
            reference or int8 graph has lost them, so each of its sites needs an entry.

    Raises:
        RangeUnknownError: A site's range is in neither the graph nor `ranges`.
        UnsupportedError: An op has no float form.

    Example:
        >>> from fxqfix.passes import DecomposeQuantize
        >>> DecomposeQuantize().name
        'decompose-quantize'
    """

    name: ClassVar[str] = "decompose-quantize"
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=lambda: MappingProxyType({}))

    def rewrite(self, rewriter: Rewriter) -> None:
        """Rewrite node by node, in graph order; a value's node always carries floats."""
        reading = dialects.read(rewriter.graph_module)
        if reading.dialect == "decomposed":
            return
        taps = {tap.node: tap for tap in reading.activations}
        for node in list(rewriter.graph.nodes):
            with rewriter.graph.inserting_before(node):
                self._node(rewriter, reading, taps, node)
        _drop_unused_inputs(rewriter.graph)

    def _node(
        self, rewriter: Rewriter, reading: Reading, taps: Mapping[fx.Node, Tap], node: fx.Node
    ) -> None:
        modules = modules_of(rewriter.graph_module)
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        found = ops.match_node(node, modules)
        if module is not None and _torch.is_quantizer(module):
            _fake_quant(rewriter, node, module)
        elif found is not None and found.spec.family == "boundary":
            self._boundary(rewriter, taps, node, found)
        elif found is not None:
            self._op(rewriter, reading, taps, node, found, module)

    def _boundary(
        self, rewriter: Rewriter, taps: Mapping[fx.Node, Tap], node: fx.Node, found: ops.Match
    ) -> None:
        if found.key == "quantize" and node.args[0].op == "get_attr":  # type: ignore[union-attr]
            weight = _constant_weight(rewriter.graph_module, node)
            value = Emit(rewriter, node.name, (), {}, None, weight).weight_node()
        elif found.key == "quantize" and node in taps:
            value = self._site(rewriter, taps[node], node.all_input_nodes[0])
        elif found.key == "quantize":
            raise UnsupportedError(
                "qparams that are chosen at run time can't be decomposed",
                where=f"{self.name}, node {node.name}",
                found=node.format_node(),
            )
        else:
            value = node.all_input_nodes[0]  # stubs and dequantize: already float
        rewriter.replace(node, value, f"{found.key} -> decomposed")

    def _site(self, rewriter: Rewriter, tap: Tap, value: fx.Node) -> fx.Node:
        used = tap.site.used
        assert used is not None  # readers list sites without qparams elsewhere
        limits = self.ranges.get(tap.site.name)
        if limits is None:
            raise RangeUnknownError(
                "quant_min / quant_max of this site are not in the model",
                where=f"{self.name}, site {tap.site.name!r}",
                found=f"{used}, the whole range of its dtype",
                remedy="pass ranges_from= the prepared model (or the qconfig mapping) that this "
                "model was converted from",
            )
        return quantize_node(rewriter, value, used.with_range(*limits), tap.site.name)

    def _op(
        self,
        rewriter: Rewriter,
        reading: Reading,
        taps: Mapping[fx.Node, Tap],
        node: fx.Node,
        found: ops.Match,
        module: nn.Module | None,
    ) -> None:
        weight = _weight(reading, node, rewriter.graph_module, module)
        quantized = node in taps and reading.dialect == int8.NAME
        if weight is None and found.column == "spelled" and not quantized:
            if module is not None:
                decompose_inside(rewriter, str(node.target), module)
            return
        value = node
        if weight is not None or found.column in ("int8", "dynamic"):
            value = self._float_form(rewriter, node, found, weight, module)
        result = value
        if quantized and found.spec.output not in ("shape", "tuple"):
            with rewriter.graph.inserting_before(node.next if value is node else node):
                users = list(node.users)
                result = self._site(rewriter, taps[node], value)
            for user in users if value is node else ():
                user.replace_input_with(node, result)
        if value is node:
            rewriter.note(f"{node.name}: {found.key} runs on floats")
            return
        rewriter.replace(node, result, f"{found.key} -> float form")
        value.name = node.name

    def _float_form(
        self,
        rewriter: Rewriter,
        node: fx.Node,
        found: ops.Match,
        weight: WeightView | None,
        module: nn.Module | None,
    ) -> fx.Node:
        if found.column == "dynamic" and not (weight and found.spec.output == "float"):
            raise UnsupportedError(
                "a dynamically quantized op has no static qparams to decompose",
                where=f"{self.name}, node {node.name}",
                remedy="quantize it statically, or leave it out of the model",
            )
        source = _source(rewriter.graph_module, node, module)
        emit = Emit(rewriter, node.name, node.args, node.kwargs, source, weight, found.relu)
        return emit_float(emit, found, node)


def _fake_quant(rewriter: Rewriter, node: fx.Node, module: nn.Module) -> None:
    """A frozen fake-quant -> quantize and dequantize; a weight's becomes an integer buffer."""
    if not isinstance(module, FrozenFakeQuantize):
        if _torch.is_placeholder(module) and not _torch.is_dynamic(module):
            rewriter.replace(node, node.all_input_nodes[0], "placeholder -> nothing")
            return
        raise UnsupportedError(
            f"{type(module).__name__} has no fixed qparams",
            where=f"decompose-quantize, node {node.name}",
            found=str(node.target),
            expected="a frozen fake-quant",
            remedy="call fxqfix.freeze first; dynamic quantization has no static qparams",
        )
    producer = node.all_input_nodes[0]
    if producer.op == "get_attr":
        value = int8.fetch(rewriter.graph_module, producer)
        weight = WeightView(quantize(value, module.qparams), module.qparams)
        user = next(iter(node.users), node)
        new = Emit(rewriter, user.name, (), {}, None, weight).weight_node()
    else:
        new = quantize_node(rewriter, producer, module.qparams, producer.name)
    rewriter.replace(node, new, f"fake-quant -> decomposed {module.qparams}")


def _weight(
    reading: Reading, node: fx.Node, graph_module: fx.GraphModule, module: nn.Module | None
) -> WeightView | None:
    if reading.dialect == int8.NAME:
        return int8.weight_of(node, graph_module, modules_of(graph_module))
    if module is None:
        return None
    if reading.dialect != prepared.NAME:
        return reference_weight(module)
    quantizer = weight_quantizer(module)
    if not isinstance(quantizer, FrozenFakeQuantize):
        return None
    codes = quantize(effective_weight(module), quantizer.qparams)
    return WeightView(codes, quantizer.qparams, getattr(holder(module), "bias", None))


def _constant_weight(graph_module: fx.GraphModule, node: fx.Node) -> WeightView:
    given = [int8.fetch(graph_module, a) if isinstance(a, fx.Node) else a for a in node.args]
    target: Any = node.target
    return tensor_weight(target(*given))


def _source(graph_module: fx.GraphModule, node: fx.Node, module: nn.Module | None) -> Any:
    if module is not None:
        return holder(module)
    for arg in node.all_input_nodes:
        if arg.op == "get_attr" and _torch.is_packed_params(value := int8.fetch(graph_module, arg)):
            return value
    return None


def _drop_unused_inputs(graph: fx.Graph) -> None:
    """Erase get_attr nodes that nothing reads any more (scales, packed weights)."""
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)

"""decompose-quantize: rewrite to quantized_decomposed ops, which carry quant_min / quant_max."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar

from torch import fx, nn

from fxqfix import _torch, dialects, ops
from fxqfix.dialects import Reading, Tap, int8
from fxqfix.dialects._base import modules_of
from fxqfix.dialects.quantizer import read_quantizer
from fxqfix.dialects.weights import WeightView
from fxqfix.errors import RangeUnknownError, UnsupportedError
from fxqfix.passes._base import Pass, Rewriter
from fxqfix.passes._decomposed_module import decompose_inside
from fxqfix.passes._forms import Emit, emit_float, quantize_node
from fxqfix.passes._frozen import FrozenFakeQuantize
from fxqfix.passes._sources import options_of, weight_of
from fxqfix.qparams import quantize

__all__ = ["DecomposeQuantize"]


@dataclass(frozen=True)
class DecomposeQuantize(Pass):
    """Rewrite a frozen prepared, a reference or an int8 graph to decomposed ops.

    Weights become integer buffers with a dequantize op; every site becomes
    ``quantize_per_tensor(x, scale, zero_point, quant_min, quant_max, dtype)`` and its dequantize.

    Attributes:
        ranges: Site name -> (quant_min, quant_max). A frozen prepared graph knows its own; a
            reference or int8 graph has lost them, so each of its sites needs an entry, but for
            those that `restore-range` restored.

    Raises:
        RangeUnknownError: A site's range is in neither the graph nor `ranges`.
        UnsupportedError: An op has no float form.

    Example:
        >>> from fxqfix.passes import DecomposeQuantize
        >>> DecomposeQuantize().name
        'decompose-quantize'
    """

    name: ClassVar[str] = "decompose-quantize"
    requires: ClassVar[tuple[str, ...]] = (
        "freeze-qparams",
        "fold-batchnorm",
        "hold-weights",
    )
    ranges: Mapping[str, tuple[int, int]] = field(
        default_factory=lambda: MappingProxyType({}), hash=False
    )

    def rewrite(self, rewriter: Rewriter) -> None:
        """Rewrite node by node, in graph order; a value's node always carries floats."""
        reading = dialects.read(rewriter.graph_module)
        if reading.carries_ranges:
            return
        own = int8.own_ranges(reading)
        if any(tap.held is not None for tap in reading.activations):
            _drop_holds(rewriter, reading)
            reading = dialects.read(rewriter.graph_module)
        taps = {tap.node: tap for tap in reading.activations}
        ranges = {**own, **self.ranges}
        modules = dict(modules_of(rewriter.graph_module))  # as they are now: some get replaced
        work = _Work(rewriter, reading, taps, modules, ranges)
        for node in list(rewriter.graph.nodes):
            with rewriter.graph.inserting_before(node):
                self._node(work, node)
        _drop_unused_inputs(rewriter.graph)

    def _node(self, work: _Work, node: fx.Node) -> None:
        module = work.modules.get(str(node.target)) if node.op == "call_module" else None
        found = ops.match_node(node, work.modules)
        if module is not None and _torch.is_quantizer(module):
            _fake_quant(work.rewriter, node, module)
        elif isinstance(module, fx.GraphModule) and found is None:
            self._nested(work, str(node.target), module)
        elif found is not None and found.spec.family == "boundary":
            self._boundary(work, node, found)
        elif found is not None:
            self._op(work, node, found, module)

    def _nested(self, work: _Work, path: str, module: fx.GraphModule) -> None:
        """A graph that is called as a whole (a standalone module): decomposed where it stands."""
        if not any(map(_torch.is_quantizer, module.modules())):
            if int8.matches(module):
                raise UnsupportedError(
                    "a nested int8 graph can't be decomposed",
                    where=f"{self.name}, module {path!r}",
                    found="a standalone module that was converted",
                    remedy="pass the prepared model, in which nested graphs are decomposed too",
                )
            return
        nested = replace(self, ranges={})(module).graph_module
        work.rewriter.set_module(path, nested, "nested graph -> decomposed")

    def _boundary(self, work: _Work, node: fx.Node, found: ops.Match) -> None:
        source = node.all_input_nodes[0]
        if found.key != "quantize":
            value = source  # stubs and dequantize: already float
        elif source.op == "get_attr":
            weight = int8.constant_weight(work.rewriter.graph_module, node)
            value = Emit(work.rewriter, node.name, (), {}, None, weight).weight_node()
        elif node in work.taps:
            value = self._site(work, node, source)
        else:
            raise UnsupportedError(
                "qparams that are chosen at run time can't be decomposed",
                where=f"{self.name}, node {node.name}",
                found=node.format_node(),
                remedy="quantize statically, or leave this value out of the quantized part",
            )
        work.rewriter.replace(node, value, f"{found.key} -> decomposed")

    def _site(self, work: _Work, node: fx.Node, value: fx.Node) -> fx.Node:
        site = work.taps[node].site
        assert site.used is not None  # readers list sites without qparams elsewhere
        limits = work.ranges.get(site.name)
        if limits is None:
            raise RangeUnknownError(
                "quant_min / quant_max of this site are not in the model",
                where=f"{self.name}, site {site.name!r}",
                found=f"{site.used}, the whole range of its dtype",
                remedy="pass ranges_from= the prepared model (or the qconfig mapping) that this "
                "model was converted from",
            )
        return quantize_node(work.rewriter, value, site.used.with_range(*limits), site.name)

    def _op(self, work: _Work, node: fx.Node, found: ops.Match, module: nn.Module | None) -> None:
        weight = weight_of(work.reading, node, work.rewriter.graph_module, module)
        quantized = node in work.taps and work.reading.has_kernels
        if weight is None and found.column == "spelled" and not quantized:
            if module is not None:
                decompose_inside(work.rewriter, str(node.target), module)
            return
        value = node
        if weight is not None or found.column in ("int8", "dynamic"):
            value = self._float_form(work, node, found, weight, module)
        result = value
        if quantized and found.spec.output not in ("shape", "tuple"):
            with work.rewriter.graph.inserting_before(node.next if value is node else node):
                users = list(node.users)
                result = self._site(work, node, value)
            for user in users if value is node else ():
                user.replace_input_with(node, result)
        if value is node:
            work.rewriter.note(f"{node.name}: {found.key} runs on floats")
            return
        work.rewriter.replace(node, result, f"{found.key} -> float form")
        value.name = node.name

    def _float_form(
        self,
        work: _Work,
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
        source = options_of(work.rewriter.graph_module, node, module)
        emit = Emit(work.rewriter, node.name, node.args, node.kwargs, source, weight, found.relu)
        return emit_float(emit, found, node)


@dataclass(frozen=True)
class _Work:
    """One rewrite: what is rewritten, and what was read of it before."""

    rewriter: Rewriter
    reading: Reading
    taps: Mapping[fx.Node, Tap]
    modules: Mapping[str, nn.Module]
    ranges: Mapping[str, tuple[int, int]]


def _fake_quant(rewriter: Rewriter, node: fx.Node, module: nn.Module) -> None:
    """A frozen fake-quant -> quantize and dequantize; a weight's becomes an integer buffer."""
    if not isinstance(module, FrozenFakeQuantize):
        if _torch.is_placeholder(module) and not _torch.is_dynamic(module):
            rewriter.replace(node, node.all_input_nodes[0], "placeholder -> nothing")
            return
        state = read_quantizer(module, str(node.target))
        raise UnsupportedError(
            f"{type(module).__name__} has no fixed qparams",
            where=f"decompose-quantize, node {node.name}",
            found=f"{node.target}: {state.source}",
            expected="a frozen fake-quant",
            remedy="call fxqfix.freeze first"
            if state.used is not None
            else "quantize this value statically, by an observer that gives integer qparams; PT2E "
            "models may be dynamic",
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


def _drop_holds(rewriter: Rewriter, reading: Reading) -> None:
    """Take out what holds ranges: the decomposed ops do."""
    for tap in reading.activations:
        node = tap.node
        while tap.held is not None and node is not tap.held:
            source = node.all_input_nodes[0]
            node.replace_all_uses_with(source)
            rewriter.graph.erase_node(node)
            node = source


def _drop_unused_inputs(graph: fx.Graph) -> None:
    """Erase get_attr nodes that nothing reads any more (scales, packed weights)."""
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)

"""avoid-defects: ways round kernels of an int8 graph that are wrong, or drop a declared grid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import fx

from fxqfix import dialects, ops
from fxqfix.dialects import int8
from fxqfix.dialects._base import modules_of
from fxqfix.engines import Call, Defect, calls, met
from fxqfix.inserted import InMemoryOrder, round_to_grid
from fxqfix.passes._base import Pass, Rewriter
from fxqfix.passes._forms import Emit, emit_float, has_form
from fxqfix.qparams import QParams

__all__ = ["ROUTE", "AvoidDefects", "defects_of"]

_AVERAGES = ("avg_pool", "adaptive_avg_pool", "mean")
ROUTE = "fxqfix_route"  # in node.meta of an op that is routed: (way, reason)


@dataclass(frozen=True)
class AvoidDefects(Pass):
    """Go round wrong kernels of ops without weights, by each row's own cure.

    "island": the op in float, between a dequantize and a quantize. "contiguous": on a contiguous
    input. "memory order": over its input's memory as it lies. An op whose value is declared on a
    grid of its own, where its kernel only knows its input's, is quantized to that grid.

    Attributes:
        engine: The engine that the model was converted for.
        grids: Site name -> the declared qparams.
        averages: Whether averages that can meet ties are routed too, as "island".
        leave: Names of nodes that are left as they are.

    Example:
        >>> from fxqfix.passes import AvoidDefects
        >>> AvoidDefects("qnnpack").name
        'avoid-defects'
    """

    name: ClassVar[str] = "avoid-defects"
    engine: str
    grids: Mapping[str, QParams] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    leave: frozenset[str] = frozenset()
    averages: bool = False

    def rewrite(self, rewriter: Rewriter) -> None:
        """Go round node by node; a node that was routed already meets no row any more."""
        work = _Work(rewriter, int8.propagate(rewriter.graph_module))
        taps = [tap for tap in self._taps(rewriter) if tap.node.name not in self.leave]
        wanted = {tap.node: self.grids.get(tap.site.name) for tap in taps}
        ties = _meeting_ties(rewriter.graph_module, self.engine) if self.averages else {}
        for node, defect in list(defects_of(rewriter.graph_module, self.engine).items()):
            if node.name in self.leave:
                continue
            if defect.cure == "contiguous":
                work.contiguous(node, defect.name)
            elif defect.cure == "memory order":
                work.in_memory_order(node, defect.name)
            elif defect.cure == "island" and work.runs_on_floats(node):
                work.island(node, wanted.pop(node, None) or work.qparams[node], defect.name)
        for node in ties:
            if node in wanted and work.runs_on_floats(node):
                wish = wanted.pop(node) or work.qparams[node]
                work.island(node, wish, "ties round otherwise", contiguous=ties[node])
        for node, grid in wanted.items():
            if grid is not None and not grid.same_grid(work.qparams[node]):
                work.regrid(node, grid)

    def _taps(self, rewriter: Rewriter) -> list[dialects.Tap]:
        return list(dialects.read(rewriter.graph_module).activations)


def defects_of(
    graph_module: fx.GraphModule, engine: str, *, unlikely: bool = False
) -> dict[fx.Node, Defect]:
    """The wrong kernels that an int8 graph may run on, with or without VNNI; each row is probed.

    Args:
        graph_module: The graph.
        engine: The engine that it was converted for.
        unlikely: Whether to list those too that only images of one pixel meet, where the graph has
            no pool that makes them.
    """
    found: dict[fx.Node, Defect] = {}
    for node, call in calls(graph_module, engine, strict=False).items():
        for defect in met(call, engine):
            likely = unlikely or defect.certain or defect.cure != "island"
            if _is_cured(call, defect) or not (likely or _has_one_pixel(node, graph_module)):
                continue
            found.setdefault(node, defect)
    return found


def _meeting_ties(graph_module: fx.GraphModule, engine: str) -> dict[fx.Node, bool]:
    """Averages that can lie half-way between two codes: those of an even number of codes.

    The value: whether what comes out in float depends on the layout, which training has
    contiguous: a mean over all pixels adds in another order where it is channels-last.
    """
    found = calls(graph_module, engine, strict=False)
    return {
        node: not call.key.startswith("avg_pool")
        for node, call in found.items()
        if call.key.startswith(_AVERAGES) and _even(call)
    }


def _even(call: Call) -> bool:
    """Whether an average may be one of an even number of codes; some tell only at run time."""
    if not call.key.startswith("avg_pool"):
        return True
    kernel, padding = call.option("kernel_size", 2), call.option("padding", 0)
    sizes = kernel if isinstance(kernel, list | tuple) else (kernel,)
    padded = any(padding) if isinstance(padding, list | tuple) else bool(padding)
    varies = call.option("ceil_mode", False) or (
        padded and not call.option("count_include_pad", True)
    )
    divisor = call.option("divisor_override")
    return bool(varies or divisor is not None or any(size % 2 == 0 for size in sizes))


def _is_cured(call: Call, defect: Defect) -> bool:
    if defect.cure != "contiguous" or not call.inputs:
        return False
    source = call.inputs[0]
    return source.op == "call_method" and source.target == "contiguous"


def _has_one_pixel(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    """Whether a global pool stands somewhere before a node."""
    modules = modules_of(graph_module)
    return any(_pools_globally(n, modules) for n in _upstream(node))


def _upstream(node: fx.Node) -> Iterator[fx.Node]:
    queue, seen = list(node.all_input_nodes), set[fx.Node]()
    while queue:
        current = queue.pop()
        if current not in seen:
            seen.add(current)
            queue.extend(current.all_input_nodes)
            yield current


def _pools_globally(node: fx.Node, modules: Mapping[str, torch.nn.Module]) -> bool:
    """Whether an op may give images of one pixel."""
    found = ops.match_node(node, modules)
    return found is not None and found.key.startswith(("adaptive_", "mean"))


@dataclass
class _Work:
    """One rewrite.

    Attributes:
        rewriter: What is rewritten.
        qparams: The grids of its quantized values.
    """

    rewriter: Rewriter
    qparams: dict[fx.Node, QParams]

    def runs_on_floats(self, node: fx.Node) -> bool:
        """Whether the very node computes the same op on floats."""
        found = ops.match_node(node, modules_of(self.rewriter.graph_module))
        return found is not None and found.column == "spelled" and node in self.qparams

    def contiguous(self, node: fx.Node, reason: str) -> None:
        """Hand over a contiguous input."""
        source = next(n for n in node.all_input_nodes if n in self.qparams)
        with self.rewriter.graph.inserting_before(node):
            copied = self.rewriter.graph.call_method("contiguous", (source,))
        node.meta[ROUTE] = "contiguous input", reason
        node.replace_input_with(source, copied)
        self.rewriter.note(f"{node.name}: contiguous input, {reason}")

    def in_memory_order(self, node: fx.Node, reason: str) -> None:
        """Run a module over its input's memory; a function gets a contiguous input."""
        if node.op != "call_module":
            self.contiguous(node, reason)
            return
        inner = self.rewriter.graph_module.get_submodule(str(node.target))
        node.target = self.rewriter.add_module(f"{node.name}_ordered", InMemoryOrder(inner, reason))
        self.rewriter.note(f"{node.name}: in memory order, {reason}")

    def island(
        self, node: fx.Node, grid: QParams, reason: str, *, contiguous: bool = False
    ) -> None:
        """Dequantize, the op on floats (on contiguous ones), quantize."""
        graph = self.rewriter.graph
        with graph.inserting_before(node):
            for source in [n for n in node.all_input_nodes if n in self.qparams]:
                real = graph.call_method("dequantize", (source,))
                real = graph.call_method("contiguous", (real,)) if contiguous else real
                node.replace_input_with(source, real)
            value = self._float_form(node)
        point, limits = int(grid.zero_points[0]), (grid.quant_min, grid.quant_max)
        as_float32 = float(torch.tensor(grid.scales[0]))
        with graph.inserting_after(value):
            given = value, as_float32, point, *limits
            rounded = self.rewriter.call(round_to_grid, given, f"{value.name}_rounded")
        rounded.meta["is_wrapped"] = True  # fx traces anew what it unpickles, and has to stop there
        with graph.inserting_after(rounded):
            codes = graph.call_function(
                torch.quantize_per_tensor, (rounded, grid.scales[0], point, grid.dtype)
            )
        node.replace_all_uses_with(codes, delete_user_cb=lambda user: user is not rounded)
        if value is not node:
            graph.erase_node(node)
            value.name = node.name
        self.qparams[codes] = grid
        value.meta[ROUTE] = "float island", reason
        self.rewriter.note(f"{value.name}: float island, {reason}")

    def _float_form(self, node: fx.Node) -> fx.Node:
        found = ops.match_node(node, modules_of(self.rewriter.graph_module))
        if found is None or found.column == "spelled":
            return node
        args = node.args  # a number may come first: it commutes
        if len(args) > 1 and not isinstance(args[0], fx.Node):
            args = (args[1], args[0], *args[2:])
        emit = Emit(self.rewriter, node.name, args, dict(node.kwargs), None, None, found.relu)
        return emit_float(emit, found, node)

    def regrid(self, node: fx.Node, grid: QParams) -> None:
        """Quantize to the declared grid what a kernel would leave on its input's.

        Ops whose grid torch's conversion chose stay as they are.
        """
        found = ops.match_node(node, modules_of(self.rewriter.graph_module))
        if found is None or node not in self.qparams:
            return
        keeps = found.spec.output in ("input", "shape", "scalar") or _takes_number(node)
        formed = found.column == "spelled" or has_form(found.spec.key)
        if keeps and formed:
            self.island(node, grid, "the kernel only knows its input's grid")


def _takes_number(node: fx.Node) -> bool:
    return isinstance(int8.bound(node).get("b"), int | float)

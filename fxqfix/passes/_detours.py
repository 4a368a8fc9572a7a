"""Ways round a kernel: other layouts of its input, or the op in float between its grids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fxqfix import ops
from fxqfix.dialects import int8
from fxqfix.dialects._base import modules_of
from fxqfix.inserted import InMemoryOrder, round_to_grid
from fxqfix.passes._base import Rewriter
from fxqfix.passes._forms import Emit, emit_float, has_form
from fxqfix.qparams import QParams

__all__ = ["ROUTE", "Detours"]

ROUTE = "fxqfix_route"  # in node.meta of an op that is routed: (way, reason)

_NOT_OWN = ("input", "shape", "scalar", "fixed")  # output rules of kernels that are given no grid


@dataclass
class Detours:
    """One rewrite of an int8 graph: ways round the kernels of its ops.

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
        self.qparams[copied] = self.qparams[source]  # an island may follow
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
        """Quantize to the declared grid what a kernel would leave on its input's, or on its own.

        A sigmoid that shares a cat's observer is one: its kernel knows 1/256 only. Ops whose grid
        torch's conversion chose stay as they are.
        """
        found = ops.match_node(node, modules_of(self.rewriter.graph_module))
        if found is None or node not in self.qparams:
            return
        keeps = found.spec.output in _NOT_OWN or _takes_number(node)
        formed = found.column == "spelled" or has_form(found.spec.key)
        if keeps and formed:
            whose = "a grid of its own" if found.spec.output == "fixed" else "its input's grid"
            self.island(node, grid, f"the kernel only knows {whose}")


def _takes_number(node: fx.Node) -> bool:
    return isinstance(int8.bound(node).get("b"), int | float)

"""One run of a decomposed graph, with the values that a certificate compares."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from fxqfix.dialects import Reading
from fxqfix.passes.cut_sites import float_ends, output_nodes

__all__ = ["Seen"]


class Seen(fx.Interpreter):
    """Runs the decomposed graph and keeps, for one batch, what the comparison needs."""

    def __init__(self, graph_module: fx.GraphModule, reading: Reading) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False  # it prints the graph with every error
        taps = [t for t in reading.activations if t.site.used is not None]
        self._kept = {node for t in taps for node in (t.node, t.producer)}
        self._kept |= set(float_ends(reading))
        self._kept |= {n for n in graph_module.graph.nodes if n.op == "placeholder"}
        self._kept |= set(output_nodes(graph_module))
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; a copy is kept, since a later op may write in place."""
        value = super().run_node(n)
        if n in self._kept:
            self.values[n] = value.clone() if isinstance(value, Tensor) else value
        return value

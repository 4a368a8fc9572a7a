"""avoid-defects: ways round kernels of an int8 graph that are wrong, or drop a declared grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

from torch import fx

from fxqfix import dialects
from fxqfix.dialects import int8
from fxqfix.engines import Defect
from fxqfix.names import Engine
from fxqfix.passes._base import Pass, Rewriter
from fxqfix.passes._detours import Detours
from fxqfix.passes._met import defects_of, meeting_ties
from fxqfix.qparams import QParams

__all__ = ["AvoidDefects"]


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
    engine: Engine
    grids: Mapping[str, QParams] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    leave: frozenset[str] = frozenset()
    averages: bool = False

    def rewrite(self, rewriter: Rewriter) -> None:
        """Go round node by node; a node that was routed already meets no row any more."""
        work = Detours(rewriter, int8.propagate(rewriter.graph_module))
        taps = [tap for tap in self._taps(rewriter) if tap.node.name not in self.leave]
        wanted = {tap.node: self.grids.get(tap.site.name) for tap in taps}
        ties = meeting_ties(rewriter.graph_module, self.engine) if self.averages else {}
        curable: dict[fx.Node, Defect] = {}
        for node, defect, _ in defects_of(rewriter.graph_module, self.engine):
            if defect.cure and node.name not in self.leave:
                curable.setdefault(node, defect)
        for node, defect in curable.items():
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

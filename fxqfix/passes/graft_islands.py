"""graft-islands: float islands of one int8 graph put in place of another's kernels."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import fx

from fxqfix import dialects
from fxqfix.dialects import int8
from fxqfix.inserted import FloatIsland
from fxqfix.passes._base import Pass, Rewriter

__all__ = ["GraftIslands"]


@dataclass(frozen=True)
class GraftIslands(Pass):
    """Replace kernels of an int8 graph by the float islands that a donor has in their place.

    The island stands between a dequantize of each quantized input and a quantize to the donor's
    grid, as torch's conversion puts it.

    Attributes:
        donor: A conversion of the same model with islands; it is not changed.
        sites: Name of a site -> name of the donor's site, which an island computes.

    Example:
        >>> from fxqfix.passes import GraftIslands
        >>> GraftIslands().name
        'graft-islands'
    """

    name: ClassVar[str] = "graft-islands"
    donor: fx.GraphModule | None = field(default=None, repr=False)
    sites: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), hash=False)

    def rewrite(self, rewriter: Rewriter) -> None:
        """Node by node."""
        if self.donor is None or not self.sites:
            return
        mine = {t.site.name: t for t in dialects.read(rewriter.graph_module).activations}
        theirs = {t.site.name: t for t in dialects.read(self.donor).activations}
        qparams = int8.propagate(rewriter.graph_module)
        for name, other in self.sites.items():
            node, source = mine[name].producer, theirs[other]
            island = self.donor.get_submodule(str(source.producer.target))
            assert isinstance(island, FloatIsland)  # the caller's promise
            path = rewriter.add_module(f"{name}_island", copy.deepcopy(island))
            graph, grid = rewriter.graph, source.site.used
            assert grid is not None  # activations of int8 graphs have qparams
            with graph.inserting_before(node):
                given = tuple(
                    graph.call_method("dequantize", (n,)) if n in qparams else n
                    for n in node.all_input_nodes
                    if n.op != "get_attr"
                )
                new = graph.call_module(path, given)
                where = new, grid.scales[0], int(grid.zero_points[0]), grid.dtype
                codes = graph.call_function(torch.quantize_per_tensor, where)
            node_name = node.name
            rewriter.replace(node, codes, f"float island, {island.reason}")
            new.name = node_name
            qparams[codes] = grid  # what the next island may read


def has_island(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node calls a float island."""
    if node.op != "call_module":
        return False
    return isinstance(graph_module.get_submodule(str(node.target)), FloatIsland)

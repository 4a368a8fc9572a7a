"""reroute-reads: ops of an int8 graph read another value than they did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

from fxqfix.passes._base import Pass, Rewriter
from fxqfix.registry import check_name

__all__ = ["RerouteReads"]


@dataclass(frozen=True)
class RerouteReads(Pass):
    """Let ops read the result of the op that wrote, in training, over what they read.

    Attributes:
        reads: Name of a reader -> names of the value that it reads and of the one that it should.

    Raises:
        UnknownNameError: The graph has no node of such a name.

    Example:
        >>> import torch
        >>> from torch import fx, nn
        >>> from fxqfix.passes import RerouteReads
        >>> class Net(nn.Module):
        ...     def forward(self, x):
        ...         return torch.neg(x) + x
        >>> result = RerouteReads({"add": ("x", "neg")})(fx.symbolic_trace(Net()))
        >>> result.edits, result.graph_module(torch.ones(1))
        (('add: reads neg in place of x',), tensor([-2.]))
    """

    name: ClassVar[str] = "reroute-reads"
    reads: Mapping[str, tuple[str, str]] = field(
        default_factory=lambda: MappingProxyType({}), hash=False
    )

    def rewrite(self, rewriter: Rewriter) -> None:
        """Those that the graph computes before the reader; it says what was left."""
        nodes = {node.name: node for node in rewriter.graph.nodes}
        order = {name: i for i, name in enumerate(nodes)}
        for reader, (old, new) in self.reads.items():
            for name in (reader, old, new):
                check_name("node", name, tuple(nodes), self.name)
            if order[new] < order[reader]:
                nodes[reader].replace_input_with(nodes[old], nodes[new])
                rewriter.note(f"{reader}: reads {new} in place of {old}")
            else:
                rewriter.remark(f"{reader}: {new} comes behind it")

"""unshare: a module of its own for each call, since an int8 module has one output grid."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

from fxqfix import ops
from fxqfix.dialects._base import modules_of
from fxqfix.passes._base import Pass, Rewriter

__all__ = ["Unshare"]


@dataclass(frozen=True)
class Unshare(Pass):
    """Copy modules with weights that a graph calls more than once.

    The calls of a prepared graph have an observer each; torch's conversion gives the int8 module
    the grid of one of them.

    Example:
        >>> import torch
        >>> from torch import fx
        >>> from fxqfix.passes import Unshare
        >>> class Twice(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.p = torch.nn.Linear(2, 2)
        ...
        ...     def forward(self, x):
        ...         return self.p(self.p(x))
        >>> Unshare()(fx.symbolic_trace(Twice())).edits
        ('p_1: calls a copy of p',)
    """

    name: ClassVar[str] = "unshare"

    def rewrite(self, rewriter: Rewriter) -> None:
        """Give every further call a copy."""
        modules = modules_of(rewriter.graph_module)
        seen: set[int] = set()
        for node in list(rewriter.graph.nodes):
            found = ops.match_node(node, modules) if node.op == "call_module" else None
            if found is None or found.spec.family != "weighted":
                continue
            module = modules[str(node.target)]
            if id(module) in seen:
                path = rewriter.add_module(node.name, copy.deepcopy(module))
                rewriter.note(f"{node.name}: calls a copy of {node.target}")
                node.target = path
            seen.add(id(module))

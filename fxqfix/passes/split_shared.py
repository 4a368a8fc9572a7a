"""split-shared: a module of its own for every call, where calls declare grids of their own.

prepare_fx gives each call of a shared module (a detection head, a weight-tied block) an observer of
its own, but conversion makes one int8 module, which has one output scale: that of the last call.
Every call before it then writes its codes on another call's grid.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fxqfix.dialects.prepared import shared_calls
from fxqfix.passes._base import Pass, Rewriter

__all__ = ["SplitShared", "tied"]


@dataclass(frozen=True)
class SplitShared(Pass):
    """Give each call but the first of a shared module a copy of it, with the same parameters.

    Only modules whose int8 form holds an output scale are copied: those that the op table gives a
    grid of their own. Parameters stay tied, so that training can go on.

    Example:
        >>> from fxqfix.passes import SplitShared
        >>> str(SplitShared.name)
        'split-shared'
    """

    name: ClassVar[str] = "split-shared"
    requires: ClassVar[tuple[str, ...]] = ("freeze-qparams",)

    def rewrite(self, rewriter: Rewriter) -> None:
        """Copy per call; a copy's path is the original's with the call's number behind it."""
        for path, nodes in shared_calls(rewriter.graph_module).items():
            module = rewriter.graph_module.get_submodule(path)
            for number, node in enumerate(nodes[1:], start=1):
                free = f"{path}_call_{number}"
                rewriter.set_module(free, tied(module), f"{node.name} has {path} to itself")
                node.target = free


def tied(module: nn.Module) -> nn.Module:
    """A copy that holds the very same parameters."""
    memo = {id(p): p for p in module.parameters()}
    return copy.deepcopy(module, memo)

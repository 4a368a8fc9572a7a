"""remove-shadows: take out everything that insert-shadows put in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fxqfix.errors import PassError
from fxqfix.passes._base import Pass, Rewriter
from fxqfix.passes._weave import PREFIX
from fxqfix.passes.insert_shadows import tagged

__all__ = ["RemoveShadows"]


@dataclass(frozen=True)
class RemoveShadows(Pass):
    """Turn a twin graph back into the converted model that it was made from, node for node.

    Example:
        >>> from fxqfix.passes import RemoveShadows
        >>> RemoveShadows()
        RemoveShadows()
    """

    name: ClassVar[str] = "remove-shadows"
    requires: ClassVar[tuple[str, ...]] = ("insert-shadows",)

    def rewrite(self, rewriter: Rewriter) -> None:
        """Erase the added nodes from the last to the first, then the modules they used."""
        for node in reversed(list(rewriter.graph.nodes)):
            if tagged(node):
                rewriter.graph.erase_node(node)
                rewriter.note(f"{node.name}: removed")
        for name in [n for n, _ in rewriter.module.named_children() if n.startswith(PREFIX)]:
            delattr(rewriter.module, name)

    def ensures(self, after: nn.Module) -> None:
        """Nothing of the twin is left."""
        left = [n for n, _ in after.named_children() if n.startswith(PREFIX)]
        if left:
            raise PassError("parts of the twin graph are left", where=self.name, found=left)

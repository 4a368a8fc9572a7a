"""own-readers: a dequantize op of its own for each reader of codes, and a bias of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx, nn

from fxqfix.dialects.decomposed import is_dequantize
from fxqfix.dialects.int8 import fetch
from fxqfix.errors import PassError
from fxqfix.passes._base import Pass, Rewriter

__all__ = ["OwnReaders"]


@dataclass(frozen=True)
class OwnReaders(Pass):
    """Dequantize anew for each reader, and copy a bias that several calls share.

    Backends match dequantize, op and quantize as one pattern, and may lower codes that a second op
    reads as floats as codes for both; a shared bias they may round once, to one call's steps. No
    value changes.

    Example:
        >>> import torch
        >>> from torch import fx, nn
        >>> from fxqfix.passes import OwnReaders
        >>> class Net(nn.Module):
        ...     def forward(self, codes):
        ...         q = torch.ops.quantized_decomposed
        ...         x = q.dequantize_per_tensor.default(codes, 0.5, 3, 0, 127, torch.uint8)
        ...         return torch.relu(x), torch.sigmoid(x)
        >>> OwnReaders()(fx.symbolic_trace(Net())).edits
        ('dequantize_per_tensor_default: dequantized again for sigmoid',)
    """

    name: ClassVar[str] = "own-readers"
    requires: ClassVar[tuple[str, ...]] = ("decompose-quantize",)

    def rewrite(self, rewriter: Rewriter) -> None:
        """Split what is shared."""
        for node in filter(is_dequantize, list(rewriter.graph.nodes)):
            for user in list(node.users)[1:]:
                with rewriter.graph.inserting_after(node):
                    user.replace_input_with(node, rewriter.graph.node_copy(node))
                rewriter.note(f"{node.name}: dequantized again for {user.name}")
        _own_biases(rewriter)

    def ensures(self, after: nn.Module) -> None:
        """Each dequantize op has one reader."""
        assert isinstance(after, fx.GraphModule)
        for node in filter(is_dequantize, after.graph.nodes):
            if len(node.users) > 1:
                raise PassError("codes have two readers", where=f"{self.name}, node {node.name!r}")


def _own_biases(rewriter: Rewriter) -> None:
    """A tensor of its own for every reader of a float parameter."""
    taken: set[int] = set()
    for node in [n for n in rewriter.graph.nodes if n.op == "get_attr"]:
        value = fetch(rewriter.graph_module, node)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        for user in list(node.users):
            known = value.data_ptr() in taken
            taken.add(value.data_ptr())
            if known and not is_dequantize(user):
                with rewriter.graph.inserting_before(user):
                    own = rewriter.buffer_node(f"{node.name}_own", value.detach().clone())
                user.replace_input_with(node, own)
                rewriter.note(f"{user.name}: {node.name} of its own")

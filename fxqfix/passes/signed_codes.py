"""signed-codes: activations quantized to int8 in place of uint8, for backends that want it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from fxqfix.dialects.decomposed import arguments, is_dequantize
from fxqfix.errors import PassError
from fxqfix.passes._base import Pass, Rewriter

__all__ = ["SHIFT", "SignedCodes", "is_unsigned"]

SHIFT = 128  # from unsigned codes to signed ones


@dataclass(frozen=True)
class SignedCodes(Pass):
    """Shift unsigned codes of a decomposed graph to signed ones, 128 lower.

    Zero points and ranges are shifted with them, so that no value changes, to the bit. Inputs and
    outputs that are codes are signed after it.

    Example:
        >>> import torch
        >>> from torch import fx, nn
        >>> from fxqfix.passes import SignedCodes
        >>> class Net(nn.Module):
        ...     def forward(self, x):
        ...         q = torch.ops.quantized_decomposed
        ...         x = q.quantize_per_tensor.default(x, 0.5, 3, 0, 127, torch.uint8)
        ...         return q.dequantize_per_tensor.default(x, 0.5, 3, 0, 127, torch.uint8)
        >>> result = SignedCodes()(fx.symbolic_trace(Net()))
        >>> next(n.args[1:] for n in result.graph_module.graph.nodes if "quantize" in n.name)
        (0.5, -125, -128, -1, torch.int8)
    """

    name: ClassVar[str] = "signed-codes"
    requires: ClassVar[tuple[str, ...]] = ("decompose-quantize",)

    def rewrite(self, rewriter: Rewriter) -> None:
        """Shift both ends of each."""
        for node in filter(is_unsigned, list(rewriter.graph.nodes)):
            given = arguments(node)
            low, high, point = (
                given[name] - SHIFT for name in ("quant_min", "quant_max", "zero_point")
            )
            node.args = (node.args[0], given["scale"], point, low, high, torch.int8)
            node.kwargs = {k: v for k, v in node.kwargs.items() if k == "out_dtype"}
            rewriter.note(f"{node.name}: signed codes")

    def ensures(self, after: nn.Module) -> None:
        """No activation has unsigned codes."""
        assert isinstance(after, fx.GraphModule)
        for node in filter(is_unsigned, after.graph.nodes):
            raise PassError("unsigned codes are left", where=f"{self.name}, node {node.name!r}")


def is_unsigned(node: fx.Node) -> bool:
    """Whether a node quantizes to, or dequantizes, unsigned 8-bit codes of an activation.

    Args:
        node: Any node of a decomposed graph.
    """
    if "per_tensor.default" not in str(node.target) or node.op != "call_function":
        return False
    weight = is_dequantize(node) and node.all_input_nodes[0].op == "get_attr"
    return bool(arguments(node).get("dtype") == torch.uint8) and not weight

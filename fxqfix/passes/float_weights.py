"""float-weights: weights with zero points as floats, for kernels that take these for 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from fxqfix import dialects
from fxqfix.dialects import Tap
from fxqfix.dialects._constants import constant
from fxqfix.dialects.decomposed import is_dequantize
from fxqfix.errors import DialectError, PassError
from fxqfix.passes._base import Pass, Rewriter

__all__ = ["FloatWeights", "to_float"]


@dataclass(frozen=True)
class FloatWeights(Pass):
    """Put the real values in place of an integer weight that has zero points.

    torch's fused fake-quant gives a channel whose weights share one sign a zero point of -128 or
    127; Inductor's int8 kernels take it for 0. The op then runs on floats; no value changes.

    Raises:
        DialectError: The graph has no decomposed ops.

    Example:
        >>> from fxqfix.passes import FloatWeights
        >>> FloatWeights().name
        'float-weights'
    """

    name: ClassVar[str] = "float-weights"
    requires: ClassVar[tuple[str, ...]] = ("decompose-quantize",)

    def rewrite(self, rewriter: Rewriter) -> None:
        """Replace the dequantize ops of such weights by what they give."""
        reading = dialects.read(rewriter.graph_module)
        if not reading.carries_ranges:
            raise DialectError(
                "only decomposed graphs have weights to make float",
                where=self.name,
                found=f"a model of dialect {reading.dialect}",
                remedy="call fxqfix.to_decomposed(model) first",
            )
        for tap in reading.weights:
            if _has_points(tap):
                to_float(rewriter, tap)

    def ensures(self, after: nn.Module) -> None:
        """No weight with a zero point is left."""
        assert isinstance(after, fx.GraphModule)
        if not any(is_dequantize(node) for node in after.graph.nodes):
            return  # nothing quantized is left to read
        for tap in dialects.read(after).weights:
            if _has_points(tap):
                raise PassError(
                    "a weight with a zero point is not a dequantize of a constant",
                    where=f"{self.name}, site {tap.site.name!r}",
                    found=str(tap.site.used),
                )


def _has_points(tap: Tap) -> bool:
    return tap.site.used is not None and any(tap.site.used.zero_points)


def to_float(rewriter: Rewriter, tap: Tap) -> None:
    """Replace the dequantize of a weight by its values.

    Args:
        rewriter: Holds the graph.
        tap: The weight's tap.
    """
    node = tap.producer
    if not is_dequantize(node):
        return
    for again, _ in tap.repeats:
        again.replace_all_uses_with(node)
        rewriter.graph.erase_node(again)
    with rewriter.graph.inserting_before(node):
        value = constant(rewriter.graph_module, node)
        rewriter.replace(node, rewriter.buffer_node(f"{node.name}_float", value), "float weight")

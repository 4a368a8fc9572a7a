"""pin-ranges: an explicit clamp before each quantize whose range is narrower than its dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fxqfix import dialects
from fxqfix.dialects.decomposed import is_pin, pin_bounds
from fxqfix.errors import PassError
from fxqfix.passes._base import Pass, Rewriter

__all__ = ["PinRanges"]


@dataclass(frozen=True)
class PinRanges(Pass):
    """Clamp to the real values of quant_min and quant_max before each narrow quantize.

    ONNX export and Inductor's int8 lowering drop a decomposed op's quant_min / quant_max; with the
    clamp in the graph the range survives both. The clamp changes no bit of the graph itself: it
    only moves values that the quantize would clamp anyway.

    Example:
        >>> from fxqfix.passes import PinRanges
        >>> PinRanges()
        PinRanges()
    """

    name: ClassVar[str] = "pin-ranges"

    def rewrite(self, rewriter: Rewriter) -> None:
        """Insert the clamps; a quantize that has one already is left alone."""
        reading = dialects.read(rewriter.graph_module)
        for tap in reading.activations:
            qparams, source = tap.site.used, tap.node.all_input_nodes[0]
            if qparams is None or not qparams.is_narrow or is_pin(source):
                continue
            if qparams.axis is not None or reading.dialect != "decomposed":
                continue
            bounds = pin_bounds(
                qparams.scales[0], int(qparams.zero_points[0]), qparams.quant_min, qparams.quant_max
            )
            with rewriter.graph.inserting_before(tap.node):
                clamp = rewriter.call(torch.clamp, (source, *bounds), f"{tap.site.name}_clamp")
            tap.node.replace_input_with(source, clamp)
            rewriter.note(f"{tap.site.name}: clamped to {qparams.range_text} before quantize")

    def check(self, before: nn.Module, after: nn.Module) -> None:
        """Every narrow per-tensor quantize is pinned."""
        for tap in dialects.read(after).activations:
            used = tap.site.used
            narrow = used is not None and used.is_narrow and used.axis is None
            if narrow and not is_pin(tap.node.all_input_nodes[0]):
                raise PassError(
                    "a narrow quantize has no clamp before it",
                    where=f"{self.name}, site {tap.site.name!r}",
                    found=str(used),
                    remedy="decompose the model first: fxqfix.to_decomposed(model)",
                )

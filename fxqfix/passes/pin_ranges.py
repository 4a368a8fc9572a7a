"""pin-ranges: an explicit clamp before each quantize whose range is narrower than its dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn

from fxqfix import dialects
from fxqfix.dialects import decomposed, reference
from fxqfix.dialects.decomposed import clamp_bounds, pin_bounds
from fxqfix.errors import PassError
from fxqfix.passes._base import Pass, Rewriter

__all__ = ["PinRanges"]

_DIALECTS = (decomposed.NAME, reference.NAME)


@dataclass(frozen=True)
class PinRanges(Pass):
    """Clamp to the real values of quant_min and quant_max before each narrow quantize.

    ONNX export and Inductor's int8 lowering drop a decomposed op's quant_min / quant_max; with the
    clamp in the graph the range survives both. The clamp changes no bit of the graph itself: it
    only moves values that the quantize would clamp anyway.

    A reference model's quantize has no range at all: there the clamp is the range, and changes the
    codes that were outside it.

    Attributes:
        ranges: For a reference model, site name -> (quant_min, quant_max); decomposed ops carry
            their own.

    Example:
        >>> from fxqfix.passes import PinRanges
        >>> PinRanges()
        PinRanges(ranges=mappingproxy({}))
    """

    name: ClassVar[str] = "pin-ranges"
    ranges: Mapping[str, tuple[int, int]] = field(
        default_factory=lambda: MappingProxyType({}), hash=False
    )

    def rewrite(self, rewriter: Rewriter) -> None:
        """Insert the clamps; a quantize that has one already is left alone."""
        reading = dialects.read(rewriter.graph_module)
        for tap in reading.activations:
            qparams, source = tap.site.used, tap.node.all_input_nodes[0]
            if qparams is not None and tap.site.name in self.ranges:
                qparams = qparams.with_range(*self.ranges[tap.site.name])
            if qparams is None or not qparams.is_narrow or qparams.axis is not None:
                continue
            bounds = pin_bounds(
                qparams.scales[0], int(qparams.zero_points[0]), qparams.quant_min, qparams.quant_max
            )
            if reading.dialect not in _DIALECTS or clamp_bounds(source) == bounds:
                continue
            with rewriter.graph.inserting_before(tap.node):
                clamp = rewriter.call(torch.clamp, (source, *bounds), f"{tap.site.name}_clamp")
            tap.node.replace_input_with(source, clamp)
            rewriter.note(f"{tap.site.name}: clamped to {qparams.range_text} before quantize")

    def check(self, before: nn.Module, after: nn.Module) -> None:
        """Every narrow per-tensor quantize is pinned."""
        for tap in dialects.read(after).activations:
            used = tap.site.used
            narrow = used is not None and used.is_narrow and used.axis is None
            if narrow and clamp_bounds(tap.node.all_input_nodes[0]) is None:
                raise PassError(
                    "a narrow quantize has no clamp before it",
                    where=f"{self.name}, site {tap.site.name!r}",
                    found=str(used),
                    remedy="decompose the model first: fxqfix.to_decomposed(model)",
                )

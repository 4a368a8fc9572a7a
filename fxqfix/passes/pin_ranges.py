"""pin-ranges: an explicit clamp at each quantize whose range is narrower than its dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn

from fxqfix import dialects
from fxqfix.dialects import Tap, decomposed
from fxqfix.dialects.decomposed import clamp_bounds, is_pinned, pin_bounds
from fxqfix.errors import PassError
from fxqfix.names import PinPlace
from fxqfix.passes._base import Pass, Rewriter
from fxqfix.qparams import QParams, quantize
from fxqfix.registry import check_name

__all__ = ["PinRanges"]


@dataclass(frozen=True)
class PinRanges(Pass):
    """Clamp to quant_min and quant_max at each narrow quantize.

    ONNX export and Inductor's int8 lowering drop a decomposed op's quant_min / quant_max; with the
    clamp in the graph the range survives. The clamp changes no bit of the graph itself: it only
    moves what the quantize would clamp anyway. What only picks codes (reshapes, cat, max pools) or
    moves them towards zero (relu, relu6, hardtanh) needs none where it keeps their grid.

    It stands before the quantize, on values (where their dtype holds the bounds: bfloat16 does not
    hold those of 16-bit codes), or behind it, on codes. Inductor keeps its int8
    kernels with clamps on values, and fails on convolutions with those on codes. ONNX Runtime keeps
    its int8 kernels with clamps on codes, and runs in float with those on values; codes of 16 bits
    it can't clamp, so that these are clamped on values in any case.

    A reference model's quantize has no range at all: there the clamp is the range, and changes the
    codes that were outside it.

    Attributes:
        ranges: For a reference model, site name -> (quant_min, quant_max); decomposed ops carry
            their own.
        where: "values" or "codes". Clamps that stand elsewhere are moved. A reference model has no
            codes to clamp.

    Raises:
        UnknownNameError: `where` is neither.

    Example:
        >>> from fxqfix.passes import PinRanges
        >>> PinRanges(where="codes").where
        'codes'
    """

    name: ClassVar[str] = "pin-ranges"
    requires: ClassVar[tuple[str, ...]] = ("decompose-quantize",)
    ranges: Mapping[str, tuple[int, int]] = field(
        default_factory=lambda: MappingProxyType({}), hash=False
    )
    where: PinPlace = "values"

    def rewrite(self, rewriter: Rewriter) -> None:
        """Insert the clamps; a quantize that has one already is left alone."""
        check_name("place of a clamp", self.where, ("values", "codes"), self.name)
        reading = dialects.read(rewriter.graph_module)
        # A max pool of codes that are in range gives such codes; a clamp would keep it off int8.
        free = {tap.node for tap in reading.activations if decomposed.held_by(tap, reading)}
        for tap in reading.activations:
            qparams = tap.site.used if tap.node not in free else None
            if qparams is not None and tap.site.name in self.ranges:
                qparams = qparams.with_range(*self.ranges[tap.site.name])
            if qparams is None or not qparams.is_narrow or qparams.axis is not None:
                continue
            small = qparams.storage.itemsize == 1
            if reading.carries_ranges and self.where == "codes" and small:
                self._pin_codes(rewriter, tap, qparams)
            elif not (reading.prepared or reading.has_kernels):
                self._pin_values(rewriter, tap, qparams)

    def _pin_values(self, rewriter: Rewriter, tap: Tap, qparams: QParams) -> None:
        kernel, source = tap.kernel, tap.kernel.all_input_nodes[0]
        bounds = pin_bounds(
            qparams.scales[0], int(qparams.zero_points[0]), qparams.quant_min, qparams.quant_max
        )
        if not _fits(bounds, qparams, decomposed.floats_of(kernel)):
            self._pin_codes(rewriter, tap, qparams)
            return
        if tap.held is not None:
            rewriter.replace(tap.node, kernel, f"{tap.site.name}: its codes are not clamped")
        if clamp_bounds(source) == bounds:
            return
        with rewriter.graph.inserting_before(kernel):
            clamp = rewriter.call(torch.clamp, (source, *bounds), f"{tap.site.name}_clamp")
        kernel.replace_input_with(source, clamp)
        rewriter.note(f"{tap.site.name}: clamped to {qparams.range_text} before quantize")

    def _pin_codes(self, rewriter: Rewriter, tap: Tap, qparams: QParams) -> None:
        source = tap.kernel.all_input_nodes[0]
        if decomposed.is_pin(source):
            rewriter.replace(source, source.all_input_nodes[0], f"{source.name}: moved")
        if tap.held is not None:
            return
        limits = (qparams.quant_min, qparams.quant_max)
        with rewriter.graph.inserting_after(tap.node):
            clamp = rewriter.call(torch.clamp, (tap.node, *limits), f"{tap.site.name}_clamp")
        tap.node.replace_all_uses_with(clamp, delete_user_cb=lambda user: user is not clamp)
        rewriter.note(f"{tap.site.name}: codes clamped to {qparams.range_text}")

    def ensures(self, after: nn.Module) -> None:
        """Every narrow per-tensor quantize is pinned."""
        reading = dialects.read(after)
        for tap in reading.activations:
            used = tap.site.used
            narrow = used is not None and used.is_narrow and used.axis is None
            if narrow and not is_pinned(tap, reading):
                raise PassError(
                    "a narrow quantize has no clamp",
                    where=f"{self.name}, site {tap.site.name!r}",
                    found=str(used),
                    remedy="decompose the model first: fxqfix.to_decomposed(model)",
                )


def _fits(bounds: tuple[float, float], qparams: QParams, dtype: torch.dtype) -> bool:
    """Whether bounds that are rounded to a dtype are quantized to the codes that they stand for."""
    codes = quantize(torch.tensor(bounds, dtype=dtype), qparams.with_range(*qparams.container))
    return codes.tolist() == [qparams.quant_min, qparams.quant_max]

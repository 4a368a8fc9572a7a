"""The streaming probe of one site: numbers in, numbers kept, tensors let go."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fxqfix._settings import default_cpu
from fxqfix.measure.discrepancy import Discrepancy, discrepancy
from fxqfix.measure.histogram import Histogram, histogram
from fxqfix.passes._shadow_modules import Local, Snapshot, check_shape
from fxqfix.qparams import QParams, regrid

__all__ = ["Probe"]

Attribute = Callable[[Local, Tensor, Tensor, QParams], None]


class Probe(nn.Module):
    """Adds up the discrepancies of one site over batches.

    Args:
        name: The site, for messages.
        grid: The prepared qparams.
        converted: The snapshot that the converted codes come from; it knows their grid.
        attribute: Called with (local, converted codes, prepared codes, converted grid) on every
            batch where a code differs; None to skip causes.

    Attributes:
        local: Against the shadow, which had the same inputs.
        cumulative: Against the prepared model's own value.
        noise_floor: The nudged prepared model against the prepared model.
        either: Codes that differ from the shadow's or from the prepared model's.
        histogram: The codes of both models, counted; None where they are wider than 8 bits.
        keep: Whether to keep the prepared codes of a batch until somebody takes them.
        kept: These codes.
    """

    def __init__(
        self, name: str, grid: QParams, converted: Snapshot, attribute: Attribute | None
    ) -> None:
        super().__init__()
        self.name, self.grid = name, grid
        self._converted = (converted,)  # owned by the twin graph, not by this module
        self._attribute = attribute
        self.local, self.cumulative = Discrepancy(), Discrepancy()
        self.noise_floor: Discrepancy | None = None
        self.either = 0
        self.histogram: Histogram | None = None
        self.keep = False
        self.kept: Tensor | None = None

    @property
    def converted_qparams(self) -> QParams:
        """The grid that the converted codes really have."""
        return self._converted[0].qparams

    def forward(
        self, local: Local, converted: Tensor, prepared: Tensor, nudged: Tensor | None = None
    ) -> None:
        """Take one batch of codes."""
        check_shape(self.name, local.expected, converted)
        check_shape(self.name, prepared, converted)
        self.kept = prepared if self.keep else None
        grid, target = self.grid, self.converted_qparams
        now = discrepancy(local.expected, converted, grid, target)
        cumulative = discrepancy(prepared, converted, grid, target)
        self.local, self.cumulative = self.local + now, self.cumulative + cumulative
        counts = histogram(prepared, converted, grid, target)
        if self.histogram is not None and counts is not None:
            counts = self.histogram + counts
        self.histogram = counts
        self.either += now.differing or cumulative.differing
        if now.differing and cumulative.differing:
            codes = regrid(converted, target, grid)
            apart = (codes == local.expected) & (codes != prepared)
            self.either += int(torch.count_nonzero(apart))
        if nudged is not None:
            floor = discrepancy(prepared, nudged, grid, grid)
            self.noise_floor = floor if self.noise_floor is None else self.noise_floor + floor
        if self._attribute is not None and (now.differing or cumulative.differing):
            with default_cpu():  # not the model's code
                self._attribute(local, converted, prepared, target)

"""The streaming probe of one site: numbers in, numbers kept, tensors let go."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxqfix._regrid import differ
from fxqfix._settings import default_cpu
from fxqfix.measure.compared import discrepancy, jointly
from fxqfix.measure.discrepancy import Discrepancy
from fxqfix.measure.histogram import Histogram, histogram, of_bins
from fxqfix.measure.sums import Sums
from fxqfix.measure.tally import MANY, apart, bins, countable, pairs
from fxqfix.passes._shadow_modules import Local, Snapshot, check_shape
from fxqfix.qparams import QParams

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
        most: For how many batches it is called.

    Attributes:
        keep: Whether to keep the prepared codes of a batch until somebody takes them.
        kept: These codes.
    """

    def __init__(
        self,
        name: str,
        grid: QParams,
        converted: Snapshot,
        attribute: Attribute | None,
        most: float = math.inf,
    ) -> None:
        super().__init__()
        self.name, self.grid = name, grid
        self._converted = (converted,)  # owned by the twin graph, not by this module
        self._attribute, self._most, self._batches = attribute, most, 0
        self._not_attributed: Tensor | int = 0
        self._local, self._cumulative, self._floor = (Sums(grid) for _ in range(3))
        self._either: Tensor | int = 0
        self._histogram: Histogram | None = None
        self._bins: list[Any] = []  # of the prepared codes, of the converted ones
        self.keep = False
        self.kept: Tensor | None = None

    @property
    def converted_qparams(self) -> QParams:
        """The grid that the converted codes really have."""
        return self._converted[0].qparams

    @property
    def local(self) -> Discrepancy | None:
        """Against the shadow, which had the same inputs; None where there was none."""
        return self._local.discrepancy if self._local else None

    @property
    def cumulative(self) -> Discrepancy:
        """Against the prepared model's own value."""
        return self._cumulative.discrepancy

    @property
    def noise_floor(self) -> Discrepancy | None:
        """The nudged prepared model against the prepared model."""
        return self._floor.discrepancy if self._floor else None

    @property
    def either(self) -> int:
        """Codes that differ from the shadow's or from the prepared model's."""
        return int(self._either)

    @property
    def not_attributed(self) -> int:
        """Differing codes of the batches for which no cause was asked."""
        return int(self._not_attributed)

    @property
    def histogram(self) -> Histogram | None:
        """The codes of both models, counted; None where they are wider than 8 bits."""
        if not self._bins:
            return self._histogram
        counts = of_bins(self._bins[0], self._bins[1], self.grid.storage)
        return counts if self._histogram is None else self._histogram + counts

    def forward(
        self,
        local: Local | None,
        converted: Tensor,
        prepared: Tensor,
        nudged: Tensor | None = None,
    ) -> None:
        """Take one batch of codes."""
        expected = local.expected if local is not None else None
        for codes in (expected, prepared):
            if codes is not None:
                check_shape(f"site {self.name!r}", codes, converted)
        self.kept = prepared if self.keep else None
        target = self.converted_qparams
        take = self._count if countable(self.grid, target) else self._sum
        differs = take(expected, converted, prepared, nudged)
        self._either = self._either + differs
        if self._attribute is None or local is None:
            return
        self._batches += 1
        if self._batches > self._most:
            self._not_attributed = self._not_attributed + differs
        elif bool(differs):
            with default_cpu():  # not the model's code
                self._attribute(local, converted, prepared, target)

    def _count(
        self, expected: Tensor | None, converted: Tensor, prepared: Tensor, nudged: Tensor | None
    ) -> Tensor:
        """Count codes of one grid; how many differ, on their device."""
        # Of one layout: codes of two would be compared one by one.
        storage = self.grid.storage
        converted, prepared = (t.to(storage).contiguous() for t in (converted, prepared))
        differs = prepared != converted
        mine, theirs = self._add(self._cumulative, prepared, converted, differs)
        known = self._bins or [0, 0]
        self._bins = [known[0] + mine, known[1] + theirs]
        if expected is not None:
            expected = expected.to(storage).contiguous()
            here = expected != converted
            self._add(self._local, expected, converted, here, theirs=theirs)
            differs |= here
        if nudged is not None:
            nudged = nudged.contiguous()
            self._add(self._floor, prepared, nudged, prepared != nudged, mine=mine)
        return torch.count_nonzero(differs)

    def _add(
        self,
        sums: Sums,
        reference: Tensor,
        actual: Tensor,
        differs: Tensor,
        mine: Tensor | None = None,
        theirs: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Count the codes of one stream; how often each occurs in both."""
        if reference.device.type == "cpu" and reference.numel() >= MANY:
            counts = pairs(reference, actual)
            sums.count_pairs(counts)
            return counts.sum(1), counts.sum(0)
        mine = bins(reference) if mine is None else mine
        theirs = bins(actual) if theirs is None else theirs
        sums.count(mine, theirs, apart(reference, actual, differs))
        return mine, theirs

    def _sum(
        self, expected: Tensor | None, converted: Tensor, prepared: Tensor, nudged: Tensor | None
    ) -> Tensor:
        """Add up codes of two grids, or of wide ones; how many differ."""
        grid, target = self.grid, self.converted_qparams
        now = self._compare(prepared, converted, target)
        self._cumulative.add(now)
        if nudged is not None:
            self._floor.add(discrepancy(prepared, nudged, grid, grid))
        if expected is None:
            return torch.tensor(now.differing, device=converted.device)
        self._local.add(self._compare(expected, converted, target, histogram_too=False))
        masks = differ(converted, target, grid, [prepared, expected])
        return torch.count_nonzero(masks[0].logical_or_(masks[1]))

    def _compare(
        self, reference: Tensor, converted: Tensor, target: QParams, *, histogram_too: bool = True
    ) -> Discrepancy:
        """A discrepancy, and the histogram of both streams."""
        grid, counts = self.grid, None
        alike = grid.storage == target.storage
        if grid.one_byte and target.one_byte and alike and reference.numel() >= MANY:
            counts = pairs(*(t.to(grid.storage) for t in (reference, converted)))
        if histogram_too:
            found = (
                histogram(reference, converted, grid, target)
                if counts is None
                else of_bins(counts.sum(1), counts.sum(0), grid.storage)
            )
            if self._histogram is not None and found is not None:
                found = self._histogram + found
            self._histogram = found
        if counts is None:
            return discrepancy(reference, converted, grid, target)
        return jointly(counts, grid, target)

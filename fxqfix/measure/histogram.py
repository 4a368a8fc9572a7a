"""How often each integer value (code) occurs, in both models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxqfix._notebook import Shown
from fxqfix.qparams import QParams

__all__ = ["Histogram", "histogram", "of_bins"]


@dataclass(frozen=True)
class Histogram(Shown):
    """Counts of the codes of one site, as each model holds them.

    Attributes:
        first: The code that bin 0 counts, the same for both models.
        prepared: Codes of the prepared model per bin.
        converted: Codes of the converted model per bin; as many bins.

    Example:
        >>> (Histogram(0, (1, 0), (0, 1)) + Histogram(0, (2, 0), (0, 2))).prepared
        (3, 0)
    """

    first: int
    prepared: tuple[int, ...]
    converted: tuple[int, ...]

    def __add__(self, other: Histogram) -> Histogram:
        """The counts of both streams together; all bins that either has."""
        first = min(self.first, other.first)
        last = max(h.first + len(h.prepared) for h in (self, other))

        def total(side: str) -> tuple[int, ...]:
            bins = [0] * (last - first)
            for one in (self, other):
                for place, count in enumerate(getattr(one, side), one.first - first):
                    bins[place] += count
            return tuple(bins)

        return Histogram(first, total("prepared"), total("converted"))


def histogram(
    prepared: Tensor, converted: Tensor, grid: QParams, converted_grid: QParams
) -> Histogram | None:
    """Count the codes of one batch.

    Args:
        prepared: Integer codes on `grid`, any shape.
        converted: Integer codes on `converted_grid`, any shape.
        grid: The prepared qparams.
        converted_grid: The converted ones.

    Returns:
        A bin per code that either container can hold; None for containers wider than 8 bits.

    Example:
        >>> q = QParams(0.5, 0, 0, 127, torch.quint8)
        >>> found = histogram(torch.tensor([1, 1]), torch.tensor([1, 2]), q, q)
        >>> found.first, found.prepared[:3], found.converted[:3]
        (0, (0, 2, 0), (0, 1, 1))
    """
    limits = [torch.iinfo(g.storage) for g in (grid, converted_grid)]
    if any(limit.bits > 8 for limit in limits):
        return None
    first, last = min(i.min for i in limits), max(i.max for i in limits)

    def counts(codes: Tensor) -> tuple[int, ...]:
        places = codes.flatten() if first == 0 else codes.flatten().to(torch.int32) - first
        bins = torch.bincount(places, minlength=last - first + 1)
        return tuple(bins.tolist())

    return Histogram(first, counts(prepared), counts(converted))


def of_bins(prepared: Tensor, converted: Tensor, storage: torch.dtype) -> Histogram:
    """The counts of codes that were counted by their bits.

    Args:
        prepared: Of the prepared model: int64 of 256, bin 255 is 255 or -1.
        converted: Of the converted model, likewise.
        storage: torch.uint8 or torch.int8.

    Example:
        >>> one = torch.zeros(256, dtype=torch.int64)
        >>> one[255] = 1
        >>> of_bins(one, one, torch.int8).prepared[127]
        1
    """
    first = torch.iinfo(storage).min
    both = (tuple(counts.roll(-first).tolist()) for counts in (prepared, converted))
    return Histogram(first, *both)

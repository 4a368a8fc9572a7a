"""Discrepancies of one stream of codes, added up over batches: counts where counts tell all."""

from __future__ import annotations

from torch import Tensor

from fxqfix.measure.compared import discrepancy
from fxqfix.measure.discrepancy import Discrepancy
from fxqfix.measure.tally import Tally, apart, bins, countable
from fxqfix.qparams import QParams

__all__ = ["Sums"]


class Sums:
    """Discrepancies of one stream over batches.

    Args:
        grid: The grid of the reference.
    """

    def __init__(self, grid: QParams) -> None:
        self._grid = grid
        self._tally: Tally | None = None
        self._plain: Discrepancy | None = None

    def count(self, reference: Tensor, actual: Tensor, differences: Tensor) -> None:
        """Add the histograms of a batch; see `Tally.of`."""
        self._put(Tally.of(reference, actual, differences, self._grid))

    def count_pairs(self, counts: Tensor) -> None:
        """Add the pairs of codes of a batch; see `Tally.of_pairs`."""
        self._put(Tally.of_pairs(counts, self._grid))

    def _put(self, found: Tally) -> None:
        self._tally = found if self._tally is None else self._tally + found

    def compare(self, reference: Tensor, actual: Tensor, actual_grid: QParams) -> None:
        """Add the codes of a batch; see `discrepancy`."""
        if not countable(self._grid, actual_grid):
            self.add(discrepancy(reference, actual, self._grid, actual_grid))
            return
        a, b = (t.to(self._grid.storage).contiguous() for t in (reference, actual))
        self.count(bins(a), bins(b), apart(a, b, a != b))

    def add(self, found: Discrepancy) -> None:
        """Add the sums of a batch."""
        self._plain = found if self._plain is None else self._plain + found

    def __bool__(self) -> bool:
        """Whether there was a batch."""
        return self._tally is not None or self._plain is not None

    @property
    def discrepancy(self) -> Discrepancy:
        """All batches."""
        found = self._plain or Discrepancy()
        return found if self._tally is None else found + self._tally.discrepancy(self._grid)

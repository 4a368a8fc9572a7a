"""Two streams of 8-bit codes on one grid: every figure is a sum of integers over histograms.

These sums add up over batches, on whatever device the codes are: nothing waits for a device before
somebody asks for a figure.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxqfix.measure.discrepancy import Discrepancy
from fxqfix.qparams import QParams

__all__ = ["MANY", "Tally", "apart", "bins", "countable", "pairs"]

_CODES = 256
# Above this share of differing codes, all differences are counted; below, those that are not 0.
_FEW = 8
_PART = 2**19  # elements whose pairs are counted at a time: the int32 of all would cost more
MANY = 2**15  # elements from which on counting their pairs costs less


def countable(grid: QParams, other: QParams) -> bool:
    """Whether both are the same grid of 8 bits per tensor, so that integers tell everything.

    Args:
        grid: One.
        other: The other.

    Example:
        >>> q = QParams(0.5, 0, 0, 127, torch.quint8)
        >>> countable(q, q.with_range(0, 255)), countable(q, QParams(0.25, 0, 0, 9, torch.quint8))
        (True, False)
    """
    whole = grid.axis is None and grid.whole
    same = grid.storage == other.storage and grid.same_grid(other)
    return whole and same and grid.storage.itemsize == 1


def bins(codes: Tensor) -> Tensor:
    """How often each code occurs, int64 of 256: by its bits, so that -1 is the last bin.

    Args:
        codes: uint8 or int8, any shape.

    Example:
        >>> bins(torch.tensor([1, -1, -1], dtype=torch.int8))[[1, 255]].tolist()
        [1, 2]
    """
    return _counted(codes.view(torch.uint8).flatten(), _CODES)


def pairs(reference: Tensor, actual: Tensor) -> Tensor:
    """How often each pair of codes occurs, int64 of 256 x 256: by their bits.

    Args:
        reference: uint8 or int8, any shape.
        actual: Of the same shape and layout.

    Example:
        >>> a, b = (torch.tensor(x, dtype=torch.uint8) for x in ([1, 2], [1, 4]))
        >>> pairs(a, b).nonzero().tolist()
        [[1, 1], [2, 4]]
    """
    a, b = (t.view(torch.uint8).flatten() for t in (reference, actual))
    size = _PART if a.device.type == "cpu" else max(a.numel(), 1)
    found = torch.zeros(_CODES**2, dtype=torch.int64, device=a.device)
    part = torch.empty(min(size, a.numel()), dtype=torch.int32, device=a.device)
    for start in range(0, a.numel(), size):
        mine, theirs = (t[start : start + size] for t in (a, b))
        both = part[: mine.numel()].copy_(mine).mul_(_CODES).add_(theirs)
        found += _counted(both, _CODES**2)
    return found.reshape(_CODES, _CODES)


def apart(reference: Tensor, actual: Tensor, differs: Tensor) -> Tensor:
    """How often each difference occurs, int64 of 511: bin 255 is 0.

    Args:
        reference: uint8 or int8, any shape.
        actual: Of the same shape and dtype.
        differs: Mask of the codes that differ.

    Example:
        >>> a, b = (torch.tensor(x, dtype=torch.uint8) for x in ([1, 2], [1, 4]))
        >>> apart(a, b, a != b).nonzero().flatten().tolist()
        [255, 257]
    """
    size = reference.numel()
    if reference.device.type != "cpu":  # a look at how many there are would wait for the device
        return _counted(_difference(reference.flatten(), actual.flatten()), 2 * _CODES - 1)
    count = int(torch.count_nonzero(differs))
    few = count * _FEW < size
    if few:
        at = differs.flatten().nonzero().squeeze(1) if count else torch.empty(0, dtype=torch.int64)
        pairs = (t.flatten()[at] for t in (reference, actual))
    else:
        pairs = (t.flatten() for t in (reference, actual))
    found = _counted(_difference(*pairs), 2 * _CODES - 1)
    if few:
        found[_CODES - 1] = size - count
    return found


def _difference(reference: Tensor, actual: Tensor) -> Tensor:
    return actual.to(torch.int16).sub_(reference).add_(_CODES - 1)


def _counted(values: Tensor, count: int) -> Tensor:
    if values.device.type == "cpu":
        return torch.bincount(values, minlength=count)
    found = torch.zeros(count, dtype=torch.int64, device=values.device)
    places = values.to(torch.int64)
    return found.scatter_add_(0, places, torch.ones_like(places))


@dataclass(frozen=True)
class Tally:
    """Integer sums over codes of one stream and those of a reference stream, on their device.

    Attributes:
        sums: int64: squares of the reference's steps, of the compared codes' steps, codes out of
            range, at its lower and at its upper end, squares of the differences, their sizes, how
            many differ, and how many there are.
        most: The largest difference, int64.
    """

    sums: Tensor
    most: Tensor

    @classmethod
    def of(cls, reference: Tensor, actual: Tensor, differences: Tensor, grid: QParams) -> Tally:
        """Add up one batch.

        Args:
            reference: `bins` of the reference.
            actual: `bins` of the compared codes.
            differences: `apart` of both.
            grid: The grid of both; its range decides what is out of range.

        Example:
            >>> a, b = (torch.tensor(x, dtype=torch.uint8) for x in ([1, 2], [1, 130]))
            >>> grid = QParams(0.5, 0, 0, 127, torch.quint8)
            >>> tally = Tally.of(bins(a), bins(b), apart(a, b, a != b), grid)
            >>> found = tally.discrepancy(grid)
            >>> found.differing, found.max_lsb, found.out_of_range
            (1, 128, 1)
        """
        signed, device = grid.storage == torch.int8, reference.device
        point = int(grid.zero_points[0])
        weights = _of_codes(signed, point, grid.quant_min, grid.quant_max, device)
        lsb = _of_lsb(device)
        mine = (reference * weights[0]).sum().reshape(1)
        theirs = (actual * weights).sum(1)  # CUDA has no products of integer matrices
        both = (differences * lsb).sum(1)
        found = torch.cat([mine, theirs, both, differences.sum().reshape(1)])
        return cls(found, ((differences != 0) * lsb[1]).max())

    @classmethod
    def of_pairs(cls, counts: Tensor, grid: QParams) -> Tally:
        """Add up one batch.

        Args:
            counts: `pairs` of the reference and the compared codes.
            grid: The grid of both.
        """
        signed = grid.storage == torch.int8
        apart = counts.new_zeros(2 * _CODES - 1)
        apart.scatter_add_(0, _of_pairs(signed, counts.device), counts.flatten())
        return cls.of(counts.sum(1), counts.sum(0), apart, grid)

    def __add__(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(self.sums + other.sums, torch.maximum(self.most, other.most))

    def discrepancy(self, grid: QParams) -> Discrepancy:
        """The figures.

        Args:
            grid: The grid of both.
        """
        sums: Any = self.sums.tolist()
        signal, energy, outside, at_low, at_high, noise, total, differing, elements = sums
        most = int(self.most)
        scale = float(torch.tensor(grid.scales[0], dtype=torch.float32, device="cpu"))
        return Discrepancy(
            elements=elements,
            differing=differing,
            max_lsb=most,
            sum_lsb=total,
            out_of_range=outside,
            saturated_low=at_low,
            saturated_high=at_high,
            max_abs=scale * most,
            signal=scale * scale * signal,
            noise=scale * scale * noise,
            energy=scale * scale * energy,
            # 2ab = a^2 + b^2 - (a - b)^2
            product=scale * scale * ((signal + energy - noise) / 2),
        )


@functools.lru_cache(maxsize=4096)
def _of_codes(signed: bool, point: int, low: int, high: int, device: torch.device) -> Tensor:
    """Per bin: its code's square, whether it is out of range, at or below it, at or above it."""
    codes: Any = torch.arange(_CODES, device=device)
    if signed:
        codes = torch.where(codes < _CODES // 2, codes, codes - _CODES)
    flags = ((codes < low) | (codes > high), codes <= low, codes >= high)
    return torch.stack([(codes - point).square(), *(f.to(torch.int64) for f in flags)])


@functools.lru_cache(maxsize=64)
def _of_pairs(signed: bool, device: torch.device) -> Tensor:
    """Per pair of bins: the bin of its difference."""
    codes = torch.arange(_CODES, device=device)
    if signed:
        codes = torch.where(codes < _CODES // 2, codes, codes - _CODES)
    return (codes.reshape(1, -1) - codes.reshape(-1, 1) + _CODES - 1).flatten()


@functools.lru_cache(maxsize=64)
def _of_lsb(device: torch.device) -> Tensor:
    """Per difference of two codes: its square, its size, whether it is one."""
    lsb = torch.arange(1 - _CODES, _CODES, device=device)
    return torch.stack([lsb.square(), lsb.abs(), (lsb != 0).to(torch.int64)])

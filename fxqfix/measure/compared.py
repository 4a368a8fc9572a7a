"""One batch of values against its reference: codes on grids of any kind, or floats."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fxqfix._regrid import regrid
from fxqfix.measure.discrepancy import Discrepancy
from fxqfix.measure.tally import Tally, apart, bins, countable, pairs
from fxqfix.qparams import QParams

__all__ = ["differing", "discrepancy", "float_discrepancy", "jointly"]

_CODES, _MANY = 256, 4096
_CACHED = 2**18  # elements, in float64


def discrepancy(
    reference: Tensor, actual: Tensor, grid: QParams, actual_grid: QParams
) -> Discrepancy:
    """Compare one batch of codes against its reference.

    Args:
        reference: Integer codes on `grid`, any shape.
        actual: Integer codes on `actual_grid`, of the same shape.
        grid: The reference's qparams; its range decides what is out of range.
        actual_grid: The compared stream's qparams.

    Returns:
        The sums of this batch; add them up over batches. Energies are summed in float64.

    Example:
        >>> q = QParams(0.5, 0, 0, 127, torch.quint8)
        >>> d = discrepancy(torch.tensor([1, 127]), torch.tensor([1, 130]), q, q)
        >>> d.differing, d.max_lsb, d.out_of_range, d.max_abs
        (1, 3, 1, 1.5)
    """
    if countable(grid, actual_grid) and reference.numel():
        a, b = (t.to(grid.storage) for t in (reference, actual))
        return Tally.of(bins(a), bins(b), apart(a, b, a != b), grid).discrepancy(grid)
    if grid.one_byte and actual_grid.one_byte and reference.numel() > _MANY:
        given = reference.to(grid.storage), actual.to(actual_grid.storage)
        return jointly(pairs(*given), grid, actual_grid)
    parts = _rows(reference, actual, grid, actual_grid)
    return sum((_summed(*part) for part in parts), Discrepancy())


def _rows(
    reference: Tensor, actual: Tensor, grid: QParams, actual_grid: QParams
) -> Iterator[tuple[Tensor, Tensor, QParams, QParams]]:
    """Both in parts along the first axis, each small enough to stay in a cache."""
    count = math.ceil(reference.numel() / _CACHED)
    if count < 2 or not reference.dim() or {grid.axis, actual_grid.axis} - {None, 0}:
        yield reference, actual, grid, actual_grid
        return
    size = max(reference.shape[0] // count, 1)
    for start in range(0, reference.shape[0], size):
        part = slice(start, start + size)
        grids = (_part(g, part) for g in (grid, actual_grid))
        yield reference[part], actual[part], *grids  # type: ignore[misc]  # two of them


def _part(grid: QParams, part: slice) -> QParams:
    """The grid of some of the rows."""
    if grid.axis is None:
        return grid
    return replace(grid, scale=grid.scales[part], zero_point=grid.zero_points[part])


def _summed(reference: Tensor, actual: Tensor, grid: QParams, actual_grid: QParams) -> Discrepancy:
    codes = regrid(actual, actual_grid, grid)
    lsb = (codes - reference.to(torch.int32)).abs()
    wanted, values = _real(reference, grid), _real(actual, actual_grid)
    error = wanted - values
    count = codes.numel()
    return Discrepancy(
        elements=count,
        differing=int((lsb != 0).sum()),
        max_lsb=int(lsb.max()) if count else 0,
        sum_lsb=int(lsb.sum(dtype=torch.int64)),
        out_of_range=int(((actual < grid.quant_min) | (actual > grid.quant_max)).sum()),
        saturated_low=int((actual <= grid.quant_min).sum()),
        saturated_high=int((actual >= grid.quant_max).sum()),
        max_abs=float(error.abs().max()) if count else 0.0,
        signal=float(wanted.square().sum()),
        noise=float(error.square().sum()),
        energy=float(values.square().sum()),
        product=float((wanted * values).sum()),
    )


def jointly(counts: Tensor, grid: QParams, actual_grid: QParams) -> Discrepancy:
    """Of 8-bit codes on two grids: how often each pair of codes occurs tells everything.

    Args:
        counts: `pairs` of the reference and the compared codes.
        grid: The reference's qparams.
        actual_grid: The compared stream's.
    """
    counts = counts.flatten().cpu()
    at = counts.nonzero().squeeze(1)
    times = counts[at]
    a, b = at.div(_CODES, rounding_mode="floor"), at % _CODES
    a, b = (t.to(torch.uint8).view(g.storage) for t, g in ((a, grid), (b, actual_grid)))
    lsb = (regrid(b, actual_grid, grid) - a.to(torch.int32)).abs()
    wanted, values = _real(a, grid), _real(b, actual_grid)
    error = wanted - values
    low, high = grid.quant_min, grid.quant_max

    def number(mask: Tensor) -> int:
        return int(times[mask].sum())

    def total(squares: Tensor) -> float:
        return float(squares.mul_(times).sum())

    return Discrepancy(
        elements=int(times.sum()),
        differing=number(lsb != 0),
        max_lsb=int(lsb.max()),
        sum_lsb=int((lsb * times).sum()),
        out_of_range=number((b < low) | (b > high)),
        saturated_low=number(b <= low),
        saturated_high=number(b >= high),
        max_abs=float(error.abs().max()),
        signal=total(wanted.square()),
        noise=total(error.square()),
        energy=total(values.square()),
        product=total(wanted * values),
    )


def differing(reference: Tensor, actual: Tensor) -> Tensor:
    """Mask of the values that are not equal; all of them where the dtypes differ.

    NaN is equal to NaN: a model that gives it where it is due is right.

    Args:
        reference: Any shape and dtype.
        actual: Of the same shape.

    Example:
        >>> differing(torch.tensor([1, 2]), torch.tensor([1, 3])).tolist()
        [False, True]
    """
    if reference.dtype != actual.dtype:
        return torch.ones_like(reference, dtype=torch.bool)
    return (reference != actual) & ~_both_nan(reference, actual)


def _both_nan(reference: Tensor, actual: Tensor) -> Tensor:
    return (reference != reference) & (actual != actual)  # of any dtype


def float_discrepancy(reference: Tensor, actual: Tensor) -> Discrepancy:
    """Compare values that are on no grid: `differing` counts those that are not equal.

    Args:
        reference: Any shape and dtype.
        actual: Of the same shape.

    Returns:
        The sums of this batch, in float64; no LSB, and nothing out of range.

    Example:
        >>> d = float_discrepancy(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
        >>> d.differing, d.max_abs
        (1, 0.5)
    """
    due = _both_nan(reference, actual)
    a, b = reference.double().masked_fill(due, 0.0), actual.double().masked_fill(due, 0.0)
    error = torch.where(a == b, 0.0, (a - b).abs())  # inf - inf is NaN
    return Discrepancy(
        elements=a.numel(),
        differing=int(differing(reference, actual).sum()),
        max_abs=float(error.max()) if error.numel() else 0.0,
        signal=float(a.square().sum()),
        noise=float(error.square().sum()),
        energy=float(b.square().sum()),
        product=float((a * b).sum()),
    )


def _real(codes: Tensor, grid: QParams) -> Tensor:
    """Real values in float64, with the scale as kernels have it, in float32."""
    scale, point = grid.tensors(codes)
    return (codes.double() - point.double()) * scale.double()

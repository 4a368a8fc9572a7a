"""How far apart two streams of integer codes are: plain sums that add up over batches.

A `Discrepancy` holds sums only, so two of them (two batches, two data shards) add up to the one of
the whole stream, and nothing but numbers outlives a batch. The ratios are properties.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fxqfix._notebook import Shown
from fxqfix.qparams import QParams, regrid

__all__ = ["Discrepancy", "decibels", "differing", "discrepancy", "float_discrepancy"]


@dataclass(frozen=True)
class Discrepancy(Shown):
    """Codes of one stream against a reference stream, on the reference's grid.

    Attributes:
        elements: Codes compared.
        differing: Codes that differ.
        max_lsb: Largest difference, in codes (LSB of the reference).
        sum_lsb: Sum of the absolute differences, in codes.
        out_of_range: Codes, as the compared model holds them, outside the reference's
            [quant_min, quant_max].
        saturated_low: Codes that sit at or below quant_min.
        saturated_high: Codes that sit at or above quant_max.
        max_abs: Largest absolute difference of the real values.
        signal: Sum of squares of the reference's real values.
        noise: Sum of squares of the difference of the real values.
        energy: Sum of squares of the compared real values.
        product: Sum of reference value times compared value.

    Example:
        >>> d = Discrepancy(elements=4, differing=1, max_lsb=2, sum_lsb=2, signal=100.0, noise=1.0)
        >>> d.mean_lsb, d.sqnr_db, (d + d).elements
        (0.5, 20.0, 8)
    """

    elements: int = 0
    differing: int = 0
    max_lsb: int = 0
    sum_lsb: int = 0
    out_of_range: int = 0
    saturated_low: int = 0
    saturated_high: int = 0
    max_abs: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    energy: float = 0.0
    product: float = 0.0

    @property
    def mean_lsb(self) -> float:
        """Mean absolute difference in codes; 0 where nothing was compared."""
        return self.sum_lsb / self.elements if self.elements else 0.0

    @property
    def sqnr_db(self) -> float:
        """Signal to noise ratio, ``10 log10(signal / noise)`` in dB; inf without noise."""
        if self.noise == 0.0:
            return math.inf
        ratio = self.signal / self.noise
        return 10.0 * math.log10(ratio) if ratio > 0.0 else -math.inf

    @property
    def cosine(self) -> float:
        """Cosine similarity of the real values; 1 where both are all zero."""
        if self.noise == 0.0:
            return 1.0
        norm = math.sqrt(self.signal) * math.sqrt(self.energy)
        return self.product / norm if norm else 0.0

    @property
    def exact(self) -> bool:
        """True where no code and no real value differs."""
        return self.differing == 0 and self.noise == 0.0

    def __add__(self, other: Discrepancy) -> Discrepancy:
        """The discrepancy of both streams together."""
        largest = {"max_lsb", "max_abs"}
        return Discrepancy(
            **{
                f.name: (max if f.name in largest else _add)(
                    getattr(self, f.name), getattr(other, f.name)
                )
                for f in fields(self)
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """All sums and the derived ratios, for JSON and data frames."""
        derived = {"mean_lsb": self.mean_lsb, "sqnr_db": self.sqnr_db, "cosine": self.cosine}
        return {**asdict(self), **derived}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Discrepancy:
        """The inverse of `to_dict`; derived ratios are computed anew."""
        return cls(**{f.name: data[f.name] for f in fields(cls)})


def decibels(value: float) -> str:
    """SQNR as every rendering shows it: no noise at all reads "exact".

    Example:
        >>> decibels(31.24), decibels(float("inf"))
        ('31.2', 'exact')
    """
    return "exact" if value == math.inf else f"{value:.1f}"


def _add(a: Any, b: Any) -> Any:
    return a + b


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
    if _countable(grid, actual_grid) and reference.numel():
        return _counted(reference, actual, grid)
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


def differing(reference: Tensor, actual: Tensor) -> Tensor:
    """Mask of the values that are not equal; all of them where the dtypes differ.

    Args:
        reference: Any shape and dtype.
        actual: Of the same shape.

    Example:
        >>> differing(torch.tensor([1, 2]), torch.tensor([1, 3])).tolist()
        [False, True]
    """
    if reference.dtype != actual.dtype:
        return torch.ones_like(reference, dtype=torch.bool)
    return reference != actual


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
    a, b = reference.double(), actual.double()
    error = torch.where(reference == actual, 0.0, (a - b).abs())  # inf - inf is NaN
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


def _countable(grid: QParams, actual_grid: QParams) -> bool:
    """Whether both are the same grid of 8 bits per tensor, so that integers tell everything."""
    whole = grid.axis is None and float(grid.zero_points[0]).is_integer()
    same = grid.storage == actual_grid.storage and grid.same_grid(actual_grid)
    return whole and same and grid.storage.itemsize == 1


def _counted(reference: Tensor, actual: Tensor, grid: QParams) -> Discrepancy:
    """The sums from three histograms, in integers: a fifth of the time that floats take."""
    lowest = torch.iinfo(grid.storage).min
    a, b = (t.to(torch.int32).flatten() - lowest for t in (reference, actual))
    limits = int(grid.zero_points[0]), grid.quant_min, grid.quant_max
    weights = _of_codes(lowest, *limits)
    counts = _histograms((a, _CODES), (b, _CODES), (b - a + (_CODES - 1), 2 * _CODES - 1))
    signal = int(counts[0] @ weights[:, 0])
    energy, outside, at_low, at_high = (counts[1] @ weights).tolist()
    noise, total, differing = (counts[2] @ _of_lsb()).tolist()
    most = int((counts[2].nonzero() - (_CODES - 1)).abs().max())
    scale = float(torch.tensor(grid.scales[0], dtype=torch.float32, device="cpu"))
    return Discrepancy(
        elements=a.numel(),
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


_CODES = 256


def _histograms(*given: tuple[Tensor, int]) -> Sequence[Tensor]:
    """How often each value occurs, on the CPU: CUDA has no products of integers."""
    if given[0][0].device.type == "cpu":
        return [torch.bincount(values, minlength=bins) for values, bins in given]
    sizes = [bins for _, bins in given]  # together: each count waits for the device
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    joined = torch.cat([v + start for (v, _), start in zip(given, starts, strict=True)])
    counts = torch.bincount(joined, minlength=sum(sizes)).cpu()
    return [counts[start : start + size] for start, size in zip(starts, sizes, strict=True)]


@functools.lru_cache(maxsize=4096)
def _of_codes(lowest: int, point: int, low: int, high: int) -> Tensor:
    """Per code: its square, whether it is out of range, at or below it, at or above it."""
    codes = torch.arange(lowest, lowest + _CODES, device="cpu")
    flags = ((codes < low) | (codes > high), codes <= low, codes >= high)
    return torch.stack([(codes - point).square(), *(f.to(torch.int64) for f in flags)], 1)


@functools.cache
def _of_lsb() -> Tensor:
    """Per difference of two codes: its square, its size, whether it is one."""
    lsb = torch.arange(1 - _CODES, _CODES, device="cpu")
    return torch.stack([lsb.square(), lsb.abs(), (lsb != 0).to(torch.int64)], 1)

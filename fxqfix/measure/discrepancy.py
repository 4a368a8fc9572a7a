"""How far apart two streams of integer codes are: plain sums that add up over batches.

A `Discrepancy` holds sums only, so two of them (two batches, two data shards) add up to the one of
the whole stream, and nothing but numbers outlives a batch. The ratios are properties.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from fxqfix._notebook import Shown

__all__ = ["Discrepancy", "decibels"]


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

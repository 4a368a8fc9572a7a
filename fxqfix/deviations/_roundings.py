"""Roundings and fixed-point multipliers that engines have, in exact arithmetic.

Sources: gemmlowp's SaturatingRoundingDoublingHighMul and RoundingDivideByPOT, TFLite's
MultiplyByQuantizedMultiplier (double and single rounding), CMSIS-NN's 15-bit multiplier.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxqfix.export.requantize import fixed_point

__all__ = ["FIXED", "ROUNDINGS", "fixed", "rounded"]


def _up(v: Tensor) -> Tensor:
    return torch.floor(v + 0.5)


def _away(v: Tensor) -> Tensor:
    return torch.sign(v) * torch.floor(v.abs() + 0.5)


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "even": torch.round,
    "up": _up,
    "away": _away,
    "zero": torch.trunc,
    "floor": torch.floor,
    "ceil": torch.ceil,
}


def rounded(v: Tensor, how: str) -> Tensor:
    """Whole numbers in float64; half a step is added in float64, where it is exact.

    Args:
        v: Values in steps.
        how: A key of `ROUNDINGS`.
    """
    return ROUNDINGS[how](v.double())


FIXED = ("q31", "q31-double", "q15", "q15-double", "power-of-two")


def fixed(sums: Tensor, real: Tensor, kind: str, how: str, shift: int = 0) -> Tensor:
    """Sums times a fixed-point multiplier, rounded as integers are.

    Args:
        sums: Whole numbers, (rows, channels).
        real: The real multipliers, one or one per channel.
        kind: One of `FIXED`: bits of the multiplier, and whether it rounds twice (half away each
            time behind the first), as gemmlowp does.
        how: Where halves go: "up" is what adding half a step before a right shift does; "away",
            "even", "zero", "floor" too.
        shift: Bits by which the right shift is too small.
    """
    pairs = [fixed_point(float(m)) for m in real.flatten().tolist()]
    multiplier = torch.tensor([m for m, _ in pairs], dtype=torch.int64)
    right = torch.tensor([s for _, s in pairs], dtype=torch.int64) - shift
    x = sums.round().to(torch.int64)
    if kind == "power-of-two":
        exponent = torch.round(torch.log2(real.double())).flatten() + shift
        return rounded(sums.double() * torch.exp2(exponent), how)
    bits = 31
    if kind.startswith("q15"):
        bits, right = 15, right - 16
        multiplier = ((multiplier + (1 << 15)) >> 16).clamp(max=0x7FFF)
    product = x * multiplier
    if not kind.endswith("double"):
        return _shifted(product, right, how).double()
    nudge = torch.where(product >= 0, 1 << (bits - 1), 1 - (1 << (bits - 1)))
    high = torch.div(product + nudge, 1 << bits, rounding_mode="trunc")
    left = (bits - right).clamp(min=0)
    return _shifted(high << left, (right - bits).clamp(min=0), "away").double()


def _shifted(x: Tensor, right: Tensor, how: str) -> Tensor:
    """A rounding right shift of int64; a negative one is to the left."""
    x, right = x << (-right).clamp(min=0), right.clamp(min=0)
    half = (torch.ones_like(right) << right) >> 1
    low = x >> right  # floor
    rest = x - (low << right)
    above, tie = rest > half, (rest == half) & (right > 0)
    if how == "floor":
        return low
    if how == "zero":
        return low + ((rest > 0) & (x < 0))
    if how == "ceil":
        return low + (rest > 0)
    if how == "up":
        return low + (above | tie)
    if how == "away":
        return low + (above | (tie & (x >= 0)))
    return low + (above | (tie & (low % 2 == 1)))

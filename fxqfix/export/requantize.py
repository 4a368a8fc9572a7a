"""Integer bias, real multiplier, and the multiplier as an integer and a right shift.

``f`` rounds to float32, ``rne`` rounds half to even; ``xs, ws, os`` are the scales of input,
weight and output, per output channel where the weight's are.

The fixed-point pair follows gemmlowp and TFLite: an int32 in [2^30, 2^31) and a shift, with
``multiplier * 2^-shift`` closest to the real multiplier. The shift is of the whole 64-bit product,
``(acc * multiplier) >> shift``; TFLite's own exponent is ``31 - shift``. A float32 has 24
significant bits, so that the pair equals the float32 multiplier.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["fixed_point", "int32_bias", "multipliers"]


def multipliers(source: float, weights: Tensor, target: float) -> Tensor:
    """Real multipliers ``f(f(xs * ws) / os)``, float32, one per scale of the weight."""
    return _steps(source, weights) / torch.tensor(
        target, dtype=torch.float32, device=weights.device
    )


def int32_bias(bias: Tensor, source: float, weights: Tensor) -> Tensor:
    """The bias in units of the accumulator, ``rne(b * f(1 / f(xs * ws)))``, clamped to int32."""
    found = torch.round(bias.detach().float() * (1.0 / _steps(source, weights)))
    return found.double().clamp(-(2**31), 2**31 - 1).to(torch.int32)


def _steps(source: float, weights: Tensor) -> Tensor:
    return torch.tensor(source, dtype=torch.float32, device=weights.device) * weights.float()


def fixed_point(value: float) -> tuple[int, int]:
    """The closest (int32 multiplier, right shift) of a positive number; (0, 0) of zero.

    Example:
        >>> fixed_point(0.75), fixed_point(1 / 1024)
        ((1610612736, 31), (1073741824, 40))
    """
    if value == 0:  # the scales' product underflowed
        return 0, 0
    fraction, exponent = math.frexp(value)
    multiplier = round(fraction * 2**31)  # the product is exact, so that there is one rounding
    if multiplier == 2**31:
        multiplier, exponent = 2**30, exponent + 1
    return multiplier, 31 - exponent

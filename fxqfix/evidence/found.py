"""The codes of one site on one batch, and which codes round a value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxqfix._regrid import differ
from fxqfix.qparams import QParams

__all__ = ["BEYOND", "MOST", "Found", "roundings"]

# Float32 roundings that a quantized kernel may spend on one value (scale product, bias, zero
# point, the product with the requantization multiplier): each is half a unit of 2**-23.
_ROUNDINGS = 4
_HALF_UNIT = 2.0**-24
# The shadow's own float32 error counts up to this many codes; one that is further from float64 is
# not rounding but another computation (BatchNorm or dropout in train mode, say).
MOST = 2.0**-6
# Of normal errors, the largest of 2^28 over that of a sample of 2^16: 6.2 over 4.3 deviations.
BEYOND = 1.5


@dataclass(frozen=True)
class Found:
    """The codes of one site on one batch, as a probe has them.

    Attributes:
        grid: The prepared qparams.
        target: The converted qparams.
        value: The value before quantization that the prepared op gives, float32.
        expected: The prepared op's codes, on `grid`.
        raw: The converted model's codes on its own grid.
        own: The prepared model's own codes on `grid`.
    """

    grid: QParams
    target: QParams
    value: Tensor
    expected: Tensor
    raw: Tensor
    own: Tensor

    def masks(self) -> tuple[Tensor, Tensor]:
        """Masks of the codes that differ on the same inputs, and from the model's own."""
        others = self.expected, self.own
        here, there = differ(self.raw, self.target, self.grid, others)
        return here, there


def roundings(
    scaled: Tensor, point: Tensor, error: Tensor, bias: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The lowest and the highest code that round a value, within float32 arithmetic.

    Args:
        scaled: The value in codes, float64, without the zero point; it is changed.
        point: The zero point.
        error: What else the value may be off by, in codes.
        bias: The largest bias that is added on the way, in codes.

    Example:
        >>> value = torch.tensor([2.25, 2.5 - 1e-9], dtype=torch.float64)
        >>> low, high = roundings(value, torch.tensor(3.0), torch.tensor(0.0), 0.0)
        >>> low.tolist(), high.tolist()
        ([5.0, 5.0], [5.0, 6.0])
    """
    terms = scaled.abs() + (point.abs() + 2.0 * bias + 1.0)
    width = terms.mul_(_ROUNDINGS * _HALF_UNIT).add_(error)
    # A whole zero point is added to the rounded steps, a fraction is rounded with them.
    whole = torch.floor(point)
    scaled.add_(point - whole)
    low = (scaled - width).round_().add_(whole)
    return low, scaled.add_(width).round_().add_(whole)

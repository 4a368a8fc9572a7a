"""Why codes differ: one cause per file, asked in this order; a new cause is a line here."""

from __future__ import annotations

from fxqfix.causes import (
    bias_int32,
    bn_folding,
    bn_training,
    dropout_training,
    int16_saturation,
    kernel_defect,
    range_lost,
    requantization,
    rounding,
    scale_formula,
    unexplained,
    upstream,
)
from fxqfix.causes._base import Attribution, Cause, attribute
from fxqfix.causes._emulated import Emulated
from fxqfix.causes._recompute import Recompute
from fxqfix.causes._view import View

__all__ = ["Attribution", "Cause", "Emulated", "Recompute", "View", "attribute", "registry"]

_ORDER = (
    range_lost,
    bn_training,
    dropout_training,
    bn_folding,
    rounding,
    scale_formula,
    bias_int32,
    int16_saturation,
    kernel_defect,
    requantization,
    upstream,
    unexplained,
)


def registry() -> tuple[Cause, ...]:
    """All causes in the order in which they are asked.

    Example:
        >>> from fxqfix.causes import registry
        >>> [cause.name for cause in registry()][-2:]
        ['upstream', 'unexplained']
    """
    return tuple(module.CAUSE for module in _ORDER)

"""Why codes differ: one cause per file, asked in this order; a new cause is a line here.

The order matters, because a code counts for the first cause that explains it:

1. what touches few codes and says most: codes out of range, overwritten values, train mode,
   folding, an op that stays in float, the fractions of zero points, a bias that the kernel rounds,
   ties;
2. other qparams: no rule at all (`uncalibrated`), another site's or the kernel's own, an older
   range's, another rule's for the same range, what an observer moved from there, none that the
   prepared model gives; and last, on all
   of these qparams, other values of weights and biases. These add up: each corrects what those
   before it do too (`not-lowered` included), and what two of them need together goes to the later
   one;
3. the engine's own arithmetic, judged with all of these corrected;
4. codes that agree on the same inputs: those that the prepared model has from computing in float
   right here, and then `upstream`, which is the rest of them;
5. `unexplained`: everything that is left.
"""

from __future__ import annotations

from fxqfix.causes import (
    bias_int32,
    bn_folding,
    bn_training,
    degenerate_scale,
    dropout_training,
    fake_quant_off,
    half_dequantize,
    inplace_lost,
    int16_saturation,
    kernel_defect,
    moving_observer,
    not_lowered,
    observer_only,
    other_qparams,
    other_weights,
    range_lost,
    requantization,
    rounding,
    scale_formula,
    shared_qparams,
    stale_qparams,
    uncalibrated,
    unexplained,
    upstream,
    zero_point_cut,
)
from fxqfix.causes._base import NOT_ATTRIBUTED, Attribution, Cause, attribute
from fxqfix.evidence.emulated import Emulated
from fxqfix.evidence.found import Found
from fxqfix.evidence.recompute import Recompute
from fxqfix.evidence.steps import Held
from fxqfix.evidence.view import View
from fxqfix.evidence.weights import WeightPair

__all__ = [
    "NOT_ATTRIBUTED",
    "Attribution",
    "Cause",
    "Emulated",
    "Found",
    "Held",
    "Recompute",
    "View",
    "WeightPair",
    "attribute",
    "registry",
]

_ORDER = (
    range_lost,
    inplace_lost,
    bn_training,
    dropout_training,
    bn_folding,
    not_lowered,
    half_dequantize,
    zero_point_cut,
    bias_int32,
    rounding,
    uncalibrated,
    shared_qparams,
    stale_qparams,
    scale_formula,
    moving_observer,
    other_qparams,
    other_weights,
    int16_saturation,
    kernel_defect,
    requantization,
    degenerate_scale,
    fake_quant_off,
    observer_only,
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

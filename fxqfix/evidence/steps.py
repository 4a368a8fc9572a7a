"""From the qparams that the forward uses to those that the conversion holds, cause by cause.

Where both differ, what a prepared quantizer holds tells why: its buffers, what its observer would
give, whether that observer still moves, whose grid the conversion took instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fxqfix.qparams import QParams

__all__ = ["Held", "Step", "alike", "explain", "relabelled"]

# Scales that went through float32, or through a product of two of them, on the way.
_CLOSE = 2.0**-22


@dataclass(frozen=True)
class Held:
    """What a prepared quantizer holds when it is compared.

    Attributes:
        used: What its forward uses.
        given: What its observer's `calculate_qparams` gives now.
        moved: What conversion bakes: `given`, or what the observer gives once it has been shown the
            weight again, where it is on.
        buffers: What its scale and zero_point buffers say; None without any.
        source: Where `used` was read.
        observing: Whether its observer still moves.
        calibrated: Whether it ever saw data.
        observed: Whether there is an observer to follow at all; fixed qparams have none.
        picked: Why this quantizer has no say in the converted grid (a kernel works it out of its
            input's, two calls of a module have one); "" where it has.
        seen: The lowest and highest value that its observer saw, where its range only grows.
        still: Whether most of the model's observers that are on still give what was converted: no
            batch came since, so this one did not move either.
    """

    used: QParams
    given: QParams | None
    moved: QParams | None
    buffers: QParams | None
    source: str
    observing: bool
    calibrated: bool
    observed: bool
    picked: str = ""
    seen: tuple[float, float] | None = None
    still: bool = False


@dataclass(frozen=True)
class Step:
    """One step on the way from the prepared to the converted qparams.

    Attributes:
        cause: Name of the cause that makes it.
        reached: The qparams after it.
        why: What tells so, as the end of a sentence.
    """

    cause: str
    reached: QParams
    why: str


def explain(held: Held, target: QParams, inputs: Sequence[QParams] = ()) -> tuple[Step, ...]:
    """The steps from the prepared qparams to the converted ones; none where they are equal.

    Args:
        held: The prepared quantizer.
        target: What the converted model holds.
        inputs: The converted qparams of the values that the site is computed from.

    Example:
        >>> import torch
        >>> used, baked = (QParams(s, 0, 0, 255, torch.quint8) for s in (0.5, 0.25))
        >>> held = Held(used, baked, baked, None, "fused kernel", False, True, True)
        >>> [step.cause for step in explain(held, baked)]
        ['scale-formula']
        >>> explain(held, used)
        ()
    """
    if held.used.same_grid(target):
        return ()
    if not held.calibrated:
        return (Step("uncalibrated", target, "its observer never saw data (min=inf, max=-inf)"),)
    if held.picked and not alike(target, held.given):
        return (Step("shared-qparams", target, held.picked),)
    if held.source.startswith("buffers") and alike(target, held.given):
        return (Step("stale-qparams", target, f"{held.source} don't follow its min/max any more"),)
    if alike(target, held.given):
        return (Step("scale-formula", target, f"{held.source} against its observer's formula"),)
    if alike(target, held.moved) and held.given is not None:
        first = () if held.used.same_grid(held.given) else explain(held, held.given)
        return (*first, Step("moving-observer", target, "conversion moves an observer that is on"))
    return (_otherwise(held, target, inputs),)


def _otherwise(held: Held, target: QParams, inputs: Sequence[QParams]) -> Step:
    """A grid that the prepared quantizer's observer gives neither now nor when it moves."""
    if any(target.same_grid(other) for other in inputs):
        return Step("shared-qparams", target, "the grid of one of its inputs")
    if alike(target, held.buffers):
        return Step("stale-qparams", target, "its buffers, which its min/max left behind")
    if held.seen is not None and _beyond(target, held.used, held.seen):
        low, high = held.seen
        why = f"its observer has seen values from {low:.6g} to {high:.6g} only"
        return Step("other-qparams", target, why)
    if held.observing:
        why = f"its observer is on and gives {held.given} by now"
        if held.still:
            said = "and most others that are on still give what was converted"
            return Step("other-qparams", target, f"{why}, {said}")
        if target.scales == held.used.scales:
            return Step("other-qparams", target, f"{why}, and a range that moves changes its scale")
        return Step("moving-observer", target, why)
    if held.observed:
        why = f"its observer gives {held.given} by now"
        return Step("stale-qparams", target, why)
    return Step("other-qparams", target, f"{held.source} is fixed")


def _beyond(target: QParams, used: QParams, seen: tuple[float, float]) -> bool:
    """Whether a grid reaches further than values did, give or take a code; all grids hold zero."""
    if target.axis is not None or target.storage != used.storage or math.inf in map(abs, seen):
        return False
    scale, point = target.scales[0], target.zero_points[0]
    low, high = (scale * (q - point) for q in (used.quant_min, used.quant_max))
    apart = max(map(abs, seen))
    symmetric = abs(low + high) <= 2 * scale  # reaches as far on both sides
    reach = (-apart, apart) if symmetric else (min(seen[0], 0.0), max(seen[1], 0.0))
    return low < reach[0] - scale or high > reach[1] + scale


def alike(a: QParams, b: QParams | None) -> bool:
    """Whether two grids are one, give or take float32 rounding of the scale.

    Args:
        a: A grid.
        b: Another, or None, which is none.
    """
    if b is None or a.zero_points != b.zero_points or len(a.scales) != len(b.scales):
        return False
    pairs = zip(a.scales, b.scales, strict=True)
    return all(math.isclose(x, y, rel_tol=_CLOSE) for x, y in pairs)


def relabelled(target: QParams) -> tuple[Step, ...]:
    """The step of a weight whose prepared codes stand under other scales.

    Args:
        target: What the converted model holds.
    """
    return (Step("other-qparams", target, "the prepared codes stand on another grid"),)

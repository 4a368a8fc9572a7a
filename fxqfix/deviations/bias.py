"""The bias: how it is rounded, at which scale, and when it is added."""

from __future__ import annotations

from collections.abc import Iterator

from fxqfix.deviations._base import Change, Deviation
from fxqfix.deviations._subject import Subject
from fxqfix.deviations._weighted import WeightedSubject

__all__ = ["DEVIATIONS"]


def _each(*names: str) -> tuple[Change, ...]:
    """By the reference's multiplier, or by fixed point."""
    return tuple({"bias": name} for name in names)


def _cut(subject: Subject) -> Iterator[Change]:
    """Only where the bias has more bits: else it is not cut."""
    largest = subject.int32_bias.abs().max() if isinstance(subject, WeightedSubject) else 0
    for bits in (16, 8):
        if float(largest) > (1 << (bits - 1)) - 1:
            yield from ({"bias": f"clamp-{bits}"}, {"bias": f"wrap-{bits}"})


PLACE = 30
DEVIATIONS = (
    Deviation(
        "bias-missing",
        "leaves out the bias",
        "add the bias to the sums",
        _each("none"),
    ),
    Deviation(
        "bias-int32",
        "rounds the bias to an int32 in units of the sums",
        "nothing, where integers are wanted: the reference has a float bias",
        _each("int32"),
        "a sum whose product lies within a rounding of the middle of two codes",
    ),
    Deviation(
        "bias-truncated",
        "cuts the fraction of the bias off instead of rounding it",
        "round the bias: rne(b / (xs * ws))",
        _each("truncated", "floor"),
        "a sum whose product lies within a rounding of the middle of two codes",
    ),
    Deviation(
        "bias-at-another-scale",
        "rounds the bias at another scale than that of the sums",
        "quantize the bias with scale xs * ws of its channel",
        _each("largest-scale", "first-scale", "output-scale", "weight-scale", "input-scale"),
    ),
    Deviation(
        "bias-after-requantization",
        "adds the bias behind the requantization, rounded to codes",
        "add the bias to the sums, before they are scaled",
        _each("after"),
    ),
    Deviation(
        "bias-cut-to-fewer-bits",
        "holds the bias in 16 or 8 bits",
        "keep the bias in 32 bits",
        _cut,
        "biases beyond those bits",
    ),
    Deviation("bias-twice", "adds the bias twice", "add it once", _each("twice")),
    Deviation("bias-negative", "takes the bias off", "add it", _each("negative")),
)

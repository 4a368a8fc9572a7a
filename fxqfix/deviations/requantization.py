"""From sums to codes: rounding, the multiplier's form, whose scale it is, shifts."""

from __future__ import annotations

from collections.abc import Iterator

from fxqfix.deviations._base import Change, Deviation
from fxqfix.deviations._subject import Subject

__all__ = ["DEVIATIONS"]

_BIASES = ("due", "float", "truncated", "none")


def _with(**change: object) -> tuple[Change, ...]:
    return (change,)


def _fixed(kind: str) -> tuple[Change, ...]:
    return ({"multiplier": kind}, {"multiplier": kind, "rounding": "away"})


def _multipliers(kind: str) -> tuple[Change, ...]:
    return ({"multiplier": kind}, {"multiplier": kind, "bias": "float"})


def _engines(subject: Subject) -> Iterator[Change]:
    own = subject.reference.arithmetic.engine
    for engine in ("fbgemm", "onednn", "qnnpack"):
        if engine != own:
            yield {"engine": engine}


def _tensor(subject: Subject) -> Iterator[Change]:
    for which in ("first", "largest", "mean"):
        yield {"channels": which}
        yield {"channels": which, "multiplier": "q31"}
        yield {"channels": which, "multiplier": "f32-inverse"}


def _permuted(subject: Subject) -> Iterator[Change]:
    for which in ("rolled", "rolled-back", "reversed"):
        yield {"channels": which}
        yield {"channels": which, "multiplier": "q31"}
        yield {"channels": which, "multiplier": "f32-inverse"}


_TIES = "a value that lies exactly between two codes"

PLACE = 40
DEVIATIONS = (
    Deviation(
        "half-even",
        "rounds halves to even, where the reference does something else",
        "round as the reference does",
        _with(rounding="even"),
        _TIES,
    ),
    Deviation(
        "half-up",
        "rounds halves up, floor(v + 0.5)",
        "round halves to even (lrintf, vcvtnq, _mm_cvtps_epi32)",
        _with(rounding="up"),
        _TIES,
    ),
    Deviation(
        "half-away",
        "rounds halves away from zero, as C's round() does",
        "round halves to even (lrintf, not roundf)",
        _with(rounding="away"),
        _TIES,
    ),
    Deviation(
        "truncation",
        "cuts the fraction off instead of rounding, as a C cast to int does",
        "round to the nearest code before the cast",
        _with(rounding="zero"),
    ),
    Deviation(
        "rounds-down",
        "rounds towards minus infinity, as a plain right shift does",
        "add half a step before the shift, or round",
        _with(rounding="floor"),
    ),
    Deviation(
        "float32-multiplier",
        "multiplies in float32 with f(f(xs * ws) / os)",
        "compute the multiplier as the reference's arithmetic does",
        (*_multipliers("f32"), *_multipliers("f32-inverse")),
        "a sum whose product lies within a rounding of the middle of two codes",
    ),
    Deviation(
        "float64-multiplier",
        "multiplies in float64",
        "multiply in float32, as the reference does",
        _multipliers("f64"),
        "a sum whose product lies within a rounding of the middle of two codes",
    ),
    Deviation(
        "int32-multiplier",
        "multiplies with a 31-bit integer and shifts right, with one rounding",
        "multiply in float32, or extract parameters of the arithmetic that the device has",
        _fixed("q31"),
        "a sum whose product lies within a rounding of the middle of two codes",
    ),
    Deviation(
        "int32-multiplier-rounded-twice",
        "multiplies with a 31-bit integer and rounds twice, as gemmlowp and TFLite do",
        "round once: (sum * multiplier + (1 << (shift - 1))) >> shift",
        _with(multiplier="q31-double"),
        "a sum that the first rounding moves to the middle of two codes",
    ),
    Deviation(
        "int15-multiplier",
        "multiplies with a 15-bit integer",
        "keep 31 bits of the multiplier",
        _fixed("q15"),
        "large sums",
    ),
    Deviation(
        "int15-multiplier-rounded-twice",
        "multiplies with a 15-bit integer and rounds twice",
        "keep 31 bits of the multiplier, and round once",
        _with(multiplier="q15-double"),
        "large sums",
    ),
    Deviation(
        "power-of-two-multiplier",
        "requantizes by a shift only: its multiplier is the nearest power of two",
        "multiply as well, or train with scales that are powers of two",
        (
            {"multiplier": "power-of-two"},
            {"multiplier": "power-of-two", "rounding": "even"},
            {"multiplier": "power-of-two", "rounding": "floor"},
        ),
    ),
    Deviation(
        "per-tensor-multiplier",
        "requantizes all channels with one channel's multiplier",
        "take each output channel's own weight scale",
        _tensor,
        "codes in channels whose scales differ",
    ),
    Deviation(
        "permuted-multipliers",
        "takes the multipliers of other channels: they are permuted",
        "take multiplier c for output channel c",
        _permuted,
        "codes in channels whose scales differ",
    ),
    Deviation(
        "shift-by-one",
        "shifts by one bit too many or too few: results are half or twice as large",
        "take the shift as it is given: of the whole 64-bit product",
        tuple(
            {"shift": s, **more}
            for s in (1, -1)
            for more in ({}, {"multiplier": "q31"}, {"multiplier": "f32-inverse"})
        ),
    ),
    Deviation(
        "other-engine",
        "has the arithmetic of another engine of torch",
        "extract the parameters for that engine, or change the arithmetic",
        _engines,
        "a sum whose product lies within a rounding of the middle of two codes",
    ),
    Deviation(
        "float-order",
        "sums float32 in another order",
        "nothing: float32 sums allow it; integer sums would be exact",
        _with(order="any"),
        "a value within float32's error of the middle of two codes",
    ),
)

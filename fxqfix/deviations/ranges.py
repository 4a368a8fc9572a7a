"""Where results are clamped, and the relu."""

from __future__ import annotations

from fxqfix.deviations._base import Deviation

__all__ = ["DEVIATIONS"]

PLACE = 20
DEVIATIONS = (
    Deviation(
        "clamps-to-container",
        "clamps to what the dtype holds, and not to the declared range",
        "clamp to [quant_min, quant_max]",
        ({"clamp": "container"},),
        "values beyond the declared range",
    ),
    Deviation(
        "clamps-to-declared-range",
        "clamps to the declared range, where the reference clamps to what the dtype holds",
        "clamp to the dtype's own range, or hold the range in the model too (to_int8)",
        ({"clamp": "declared"},),
        "values beyond the declared range",
    ),
    Deviation(
        "clamps-to-int8",
        "clamps to [-128, 127]",
        "clamp to [0, 255], or move codes and zero point by 128 together",
        ({"clamp": "int8"},),
        "codes above 127",
    ),
    Deviation(
        "wraps-around",
        "does not saturate: codes beyond the dtype's range wrap around",
        "clamp before the cast",
        ({"clamp": "wrap"}, {"clamp": "wrap", "relu": "none"}),
        "values beyond the range",
    ),
    Deviation(
        "relu-missing",
        "leaves out the relu",
        "clamp from the output's zero point up",
        ({"relu": "none"},),
        "negative values",
    ),
    Deviation(
        "relu-at-zero",
        "has its relu at code 0 in place of the zero point",
        "clamp from the output's zero point up",
        ({"relu": "zero"},),
        "negative values",
    ),
    Deviation(
        "relu-added",
        "has a relu where there is none",
        "leave the relu out",
        ({"relu": "added"},),
        "negative values",
    ),
)

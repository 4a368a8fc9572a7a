"""What averages are divided by."""

from __future__ import annotations

from fxqfix.deviations._base import Deviation

__all__ = ["DEVIATIONS"]

PLACE = 90
DEVIATIONS = (
    Deviation(
        "other-divisor",
        "divides averages by another number of codes",
        "divide by the size of the window",
        ({"average": "one-more"}, {"average": "one-less"}, {"average": "power-of-two"}),
    ),
    Deviation(
        "padding-counted",
        "counts padding in averages, where it does not count, or the other way round",
        "follow count_include_pad",
        ({"average": "with-padding"}, {"average": "without-padding"}),
        "windows in the border",
    ),
)

"""What an engine of one's own may do otherwise: one row per deviation, tried and counted.

A new deviation is a row in one of the files that are listed here, or a file and its line.
"""

from __future__ import annotations

import functools

from fxqfix.deviations import (
    accumulation,
    averages,
    bias,
    boundaries,
    joins,
    layout,
    ranges,
    requantization,
    weights,
    zero_points,
)
from fxqfix.deviations._base import Deviation, Recipe, Registry
from fxqfix.deviations._search import Found, Hypothesis, explain
from fxqfix.deviations._subject import Context, Counts

__all__ = ["Context", "Counts", "Deviation", "Found", "Hypothesis", "Recipe", "explain", "registry"]

_FILES = (
    zero_points,
    ranges,
    bias,
    requantization,
    accumulation,
    layout,
    weights,
    boundaries,
    averages,
    joins,
)


@functools.cache
def _registry() -> Registry:
    found = Registry()
    for file in _FILES:
        found.add(*file.DEVIATIONS)
    return found


def registry() -> dict[str, Deviation]:
    """All deviations by name, in the order in which they are named.

    Example:
        >>> from fxqfix.deviations import registry
        >>> registry()["half-up"].summary
        'rounds halves up, floor(v + 0.5)'
    """
    return _registry().rows()

"""What an engine of one's own may do otherwise: one row per deviation, tried and counted.

A new deviation is a row in one of the files, or a file. They are named in the order of `PLACE`.
"""

from __future__ import annotations

from fxqfix.deviations._base import Deviation, Recipe, problem
from fxqfix.deviations._search import Found, Hypothesis, constant, explain
from fxqfix.deviations._subject import Context, Counts
from fxqfix.registry import Registry

__all__ = [
    "Context",
    "Counts",
    "Deviation",
    "Found",
    "Hypothesis",
    "Recipe",
    "constant",
    "explain",
    "registry",
]

DEVIATIONS: Registry[str, Deviation] = Registry(
    "deviation", parts=("summary", "remedy", "variants"), check=problem
)
DEVIATIONS.discover(__name__, "DEVIATION")


def registry() -> dict[str, Deviation]:
    """All deviations by name, in the order in which they are named.

    Example:
        >>> from fxqfix.deviations import registry
        >>> registry()["half-up"].summary
        'rounds halves up, floor(v + 0.5)'
    """
    return dict(DEVIATIONS)

"""What each engine covers, as rows of text: the command line and the docs print the same."""

from __future__ import annotations

from fxqfix.engines._base import OWN_KERNELS, table
from fxqfix.engines.defects import DEFECTS
from fxqfix.ops import TABLE

__all__ = ["coverage", "known_wrong"]


def coverage() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headers and a row per op: "exact", "exact, native level only", "moves codes", or "-".

    Example:
        >>> headers, rows = coverage()
        >>> headers
        ('op', 'fbgemm', 'onednn', 'qnnpack')
        >>> next(row for row in rows if row[0] == "linear")
        ('linear', 'exact', 'exact', 'exact')
    """
    keys = dict.fromkeys(key for row in TABLE for key in (row.key, f"{row.key}_dynamic"))
    rows = [(key, *(_cell(engine, key) for engine in OWN_KERNELS)) for key in keys]
    return ("op", *OWN_KERNELS), [row for row in rows if set(row[1:]) != {"-"}]


def _cell(engine: str, key: str) -> str:
    found = table().get((engine, key))
    if found is None:
        return "-"
    if found.build is None:
        return "moves codes"
    return "exact, native level only" if found.native else "exact"


def known_wrong(*, probe: bool = False) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headers and a row per kernel that is plainly wrong.

    Args:
        probe: Run the kernels, and say in a last column whether each is wrong here.
    """
    headers = ("kernel", "engines", "ops", "when", "effect", "way round")
    answers = {
        True: "wrong here",
        False: "right here",
        None: "no such engine, or level, here",
    }
    rows = [
        (d.name, ", ".join(d.engines), ", ".join(d.ops), d.condition, d.effect, d.way_round)
        + ((answers[d.present],) if probe else ())
        for d in DEFECTS
    ]
    return (headers + (("here",) if probe else ())), rows

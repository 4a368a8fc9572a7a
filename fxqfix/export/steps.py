"""The ops of an int8 or a decomposed model, in one form."""

from __future__ import annotations

from collections.abc import Mapping

from fxqfix.dialects import Reading
from fxqfix.export import steps_decomposed, steps_int8
from fxqfix.export.step import Program

__all__ = ["steps"]


def steps(reading: Reading, ranges: Mapping[str, tuple[int, int]] | None = None) -> Program:
    """The ops of an int8 or a decomposed model.

    Args:
        reading: What `dialects.read` returned.
        ranges: Site name -> (quant_min, quant_max), for an int8 model.

    Raises:
        UnsupportedError: An op chooses its qparams at run time, holds a network of its own, or is
            in no row of the op table.
    """
    if reading.has_kernels:
        return steps_int8.program(reading, ranges or {})
    return steps_decomposed.program(reading)

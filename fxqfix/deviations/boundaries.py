"""How floats become codes, and codes floats."""

from __future__ import annotations

from collections.abc import Iterator

from fxqfix.deviations._base import Change, Deviation
from fxqfix.deviations._subject import Subject

__all__ = ["DEVIATIONS"]


def _scales(subject: Subject) -> Iterator[Change]:
    if subject.reference.key not in ("quantize", "dequantize"):
        return
    grid = subject.op.output or subject.op.input_qparams[0]
    seen = {grid.scale} if grid is not None else set()
    for op in subject.context.parameters:
        if op.output is not None and op.output.scale not in seen:
            seen.add(op.output.scale)
            yield {"scale": f"of:{op.name}"}
    yield {"scale": "one" if subject.op.output is None else "power-of-two"}


PLACE = 80
DEVIATIONS = (
    Deviation(
        "divides-by-scale",
        "divides by the scale, where the reference multiplies with its inverse",
        "multiply with f(1 / scale)",
        ({"divide": "true"}, {"divide": "f64"}),
        "a value within a rounding of the middle of two codes",
    ),
    Deviation(
        "zero-point-before-rounding",
        "adds the zero point before the rounding",
        "round, then add the zero point",
        ({"divide": "point"}, {"divide": "true-point"}, {"divide": "f64-point"}),
        "a value exactly between two codes, at an odd zero point",
    ),
    Deviation(
        "quantizes-at-another-scale",
        "takes the scale of another site",
        "take this site's own scale",
        _scales,
    ),
)

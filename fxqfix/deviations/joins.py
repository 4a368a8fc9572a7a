"""Two inputs brought to one grid; tables of one."""

from __future__ import annotations

from fxqfix.deviations._base import Deviation

__all__ = ["DEVIATIONS"]

PLACE = 100
DEVIATIONS = (
    Deviation(
        "inputs-rounded-first",
        "rounds each input to the result's grid before it adds them",
        "add first, and round once",
        ({"mix": "rounded-first"},),
    ),
    Deviation(
        "fixed-point-join",
        "joins the inputs in fixed point, as TFLite does",
        "join them as the reference does, or extract parameters of that arithmetic",
        ({"mix": "left-20"}, {"mix": "q31"}, {"mix": "q31-double"}, {"mix": "q15"}),
        "a value within a rounding of the middle of two codes",
    ),
    Deviation(
        "joins-in-float64",
        "joins the inputs in float64",
        "join them in float32",
        ({"mix": "f64"},),
        "a value within a rounding of the middle of two codes",
    ),
    Deviation(
        "inputs-copied",
        "copies codes of other grids as they are",
        "bring each input to the result's grid",
        ({"mix": "copied"},),
    ),
    Deviation(
        "scales-exchanged",
        "takes one input's scale for the other",
        "take each input's own scale",
        ({"scale": "swapped"}, {"scale": "first"}),
        "inputs on different grids",
    ),
    Deviation(
        "table-off-by-one",
        "reads its table one entry off",
        "index the table with code - lowest code",
        ({"table": 1}, {"table": -1}),
    ),
)

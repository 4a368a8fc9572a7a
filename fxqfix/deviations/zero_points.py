"""Zero points that are left out, and containers taken for one another."""

from __future__ import annotations

from fxqfix.deviations._base import Deviation

__all__ = ["DEVIATIONS"]

PLACE = 10
DEVIATIONS = (
    Deviation(
        "input-zero-point-missing",
        "leaves out the input's zero point",
        "take the input's zero point off each code before the product",
        (
            {"x_point": "none"},
            {"x_point": "none", "pad": "point"},
            {"x_point": "none-0"},
            {"x_point": "none-1"},
        ),
        "inputs with another zero point than 0",
    ),
    Deviation(
        "weight-zero-point-missing",
        "leaves out the weight's zero point",
        "take the weight's zero point off each of its codes",
        ({"w_point": "none"},),
    ),
    Deviation(
        "output-zero-point-missing",
        "leaves out the output's zero point",
        "add the output's zero point behind the rounding, before the clamp",
        ({"y_point": "none"}, {"y_point": "none", "relu": "zero"}),
    ),
    Deviation(
        "padding-with-zero",
        "pads with code 0 in place of the input's zero point",
        "fill the padding with the zero point: it stands for 0.0",
        ({"pad": "zero"},),
        "images with a border",
    ),
    Deviation(
        "padding-with-zero-point",
        "pads with the zero point, where a maximum needs the lowest code",
        "leave padding out of a maximum",
        ({"pad": "point"},),
        "windows in the border whose codes are all below the zero point",
    ),
    Deviation(
        "input-off-by-128",
        "takes input codes of the other container: they are off by 128",
        "convert codes and zero point together between uint8 and int8",
        (
            {"x_shift": 128},
            {"x_shift": -128},
            {"cast": "int8"},
            {"cast": "uint8"},
        ),
    ),
    Deviation(
        "output-off-by-128",
        "gives codes of the other container: they are off by 128",
        "convert codes and zero point together between uint8 and int8, or say so in the manifest",
        ({"y_shift": 128}, {"y_shift": -128}),
    ),
    Deviation(
        "output-bytes-reread",
        "has a dump that was read as int8 where it is uint8, or the other way round",
        "name the dtype that the dump was written in",
        ({"y": "bytes"},),
        "codes with the highest bit set",
    ),
)

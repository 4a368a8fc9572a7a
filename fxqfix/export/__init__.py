"""What an engine of your own needs of a quantized model: its parameters and golden vectors."""

from fxqfix.export.arithmetic import Arithmetic
from fxqfix.export.c_header import c_header, c_names
from fxqfix.export.encodings import Encodings, encodings, read_encodings
from fxqfix.export.parameters import OpParameters, Parameters
from fxqfix.export.qdq import qdq_grids, qdq_model
from fxqfix.export.reference import Reference, Value
from fxqfix.export.step import Program, Step
from fxqfix.export.steps import steps
from fxqfix.export.vectors import GoldenVectors

__all__ = [
    "Arithmetic",
    "Encodings",
    "GoldenVectors",
    "OpParameters",
    "Parameters",
    "Program",
    "Reference",
    "Step",
    "Value",
    "c_header",
    "c_names",
    "encodings",
    "qdq_grids",
    "qdq_model",
    "read_encodings",
    "steps",
]

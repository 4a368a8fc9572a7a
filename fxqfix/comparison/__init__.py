"""Comparisons: the plan of two models, the run over data, and the report."""

from fxqfix.comparison.float_model import float_model_of, in_float
from fxqfix.comparison.floats import FloatBeside
from fxqfix.comparison.made import made_of, versions
from fxqfix.comparison.plan import Plan
from fxqfix.comparison.session import First, Session

__all__ = [
    "First",
    "FloatBeside",
    "Plan",
    "Session",
    "float_model_of",
    "in_float",
    "made_of",
    "versions",
]

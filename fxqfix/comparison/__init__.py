"""Comparisons: the plan of two models, the run over data, and the report."""

from fxqfix.comparison.floats import FloatBeside
from fxqfix.comparison.made import made_of, versions
from fxqfix.comparison.plan import Plan
from fxqfix.comparison.session import First, Session

__all__ = ["First", "FloatBeside", "Plan", "Session", "made_of", "versions"]

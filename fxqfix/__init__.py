"""fxqfix: the quantized model that you deploy computes what you trained, or you learn why not."""

from fxqfix.dialects import Inspection, Site, inspect, trace
from fxqfix.errors import FxqfixError
from fxqfix.flows import compare, emulate, freeze, to_decomposed
from fxqfix.measure import Discrepancy
from fxqfix.qparams import QParams
from fxqfix.report import Coverage, Report, Row, Uncovered

__version__ = "0.1.0"

__all__ = [
    "Coverage",
    "Discrepancy",
    "FxqfixError",
    "Inspection",
    "QParams",
    "Report",
    "Row",
    "Site",
    "Uncovered",
    "__version__",
    "compare",
    "emulate",
    "freeze",
    "inspect",
    "to_decomposed",
    "trace",
]

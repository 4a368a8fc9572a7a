"""fxqfix: the quantized model that you deploy computes what you trained, or you learn why not."""

from fxqfix.checks import Finding
from fxqfix.dialects import Inspection, Site, inspect, trace
from fxqfix.engines import Isa
from fxqfix.errors import FxqfixError
from fxqfix.export import GoldenVectors, OpParameters, Parameters
from fxqfix.flows import (
    Deployed,
    Monitor,
    Validation,
    as_deployed,
    certificate_of,
    compare,
    emulate,
    extract_parameters,
    freeze,
    golden_vectors,
    judge,
    lint,
    repair,
    to_decomposed,
    to_int8,
    validate,
)
from fxqfix.measure import Discrepancy
from fxqfix.qparams import QParams
from fxqfix.report import (
    Certificate,
    Certified,
    Coverage,
    Diff,
    Explanation,
    Int8Certificate,
    JudgedOp,
    Judgement,
    LintReport,
    Mend,
    Migration,
    Refusal,
    Repair,
    Report,
    Row,
    Uncovered,
)
from fxqfix.routes import certify, migrate

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "Certified",
    "Coverage",
    "Deployed",
    "Diff",
    "Discrepancy",
    "Explanation",
    "Finding",
    "FxqfixError",
    "GoldenVectors",
    "Inspection",
    "Int8Certificate",
    "Isa",
    "JudgedOp",
    "Judgement",
    "LintReport",
    "Mend",
    "Migration",
    "Monitor",
    "OpParameters",
    "Parameters",
    "QParams",
    "Refusal",
    "Repair",
    "Report",
    "Row",
    "Site",
    "Uncovered",
    "Validation",
    "__version__",
    "as_deployed",
    "certificate_of",
    "certify",
    "compare",
    "emulate",
    "extract_parameters",
    "freeze",
    "golden_vectors",
    "inspect",
    "judge",
    "lint",
    "migrate",
    "repair",
    "to_decomposed",
    "to_int8",
    "trace",
    "validate",
]

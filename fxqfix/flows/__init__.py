"""What users call: thin compositions of readers, passes, measurement and causes."""

from fxqfix.flows.as_deployed import Deployed, as_deployed
from fxqfix.flows.compare import compare
from fxqfix.flows.convert import convert_by_torch
from fxqfix.flows.decompose import to_decomposed
from fxqfix.flows.emulate import emulate
from fxqfix.flows.extract import extract_parameters, golden_vectors
from fxqfix.flows.freeze import freeze
from fxqfix.flows.judge import judge
from fxqfix.flows.lint import lint
from fxqfix.flows.monitor import Monitor
from fxqfix.flows.repair import repair
from fxqfix.flows.sensitivity import sensitivity
from fxqfix.flows.to_int8 import certificate_of, to_int8
from fxqfix.flows.validate import Validation, accuracy, validate

__all__ = [
    "Deployed",
    "Monitor",
    "Validation",
    "accuracy",
    "as_deployed",
    "certificate_of",
    "compare",
    "convert_by_torch",
    "emulate",
    "extract_parameters",
    "freeze",
    "golden_vectors",
    "judge",
    "lint",
    "repair",
    "sensitivity",
    "to_decomposed",
    "to_int8",
    "validate",
]

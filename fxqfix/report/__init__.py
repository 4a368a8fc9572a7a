"""The result of a comparison, and its renderings: one file per rendering."""

from fxqfix.report.certificate import (
    Certificate,
    CheckedRange,
    CheckedWeight,
    Routed,
    Saturating,
)
from fxqfix.report.data import Coverage, Report, Row, Uncovered
from fxqfix.report.lint import LintReport
from fxqfix.report.repair import Mend, Refusal, Repair

__all__ = [
    "Certificate",
    "CheckedRange",
    "CheckedWeight",
    "Coverage",
    "LintReport",
    "Mend",
    "Refusal",
    "Repair",
    "Report",
    "Routed",
    "Row",
    "Saturating",
    "Uncovered",
]

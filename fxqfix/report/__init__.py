"""The result of a comparison, and its renderings: one file per rendering."""

from fxqfix.report._files import save
from fxqfix.report.certificate import Certificate, Certified
from fxqfix.report.data import Report
from fxqfix.report.diff import Diff
from fxqfix.report.int8_certificate import (
    CheckedRange,
    CheckedWeight,
    Int8Certificate,
    Routed,
    Saturating,
)
from fxqfix.report.judgement import Explanation, JudgedOp, Judgement
from fxqfix.report.lint import LintReport
from fxqfix.report.migration import Migration
from fxqfix.report.renderings import FORMATS
from fxqfix.report.repair import Mend, Refusal, Repair
from fxqfix.report.rows import Coverage, Row, Uncovered
from fxqfix.report.sensitivity import LeftInFloat, Sensitivity
from fxqfix.report.verdict import ALLOWED, Judged, Verdict

__all__ = [
    "ALLOWED",
    "Certificate",
    "Certified",
    "CheckedRange",
    "CheckedWeight",
    "Coverage",
    "Diff",
    "Explanation",
    "Int8Certificate",
    "Judged",
    "JudgedOp",
    "Judgement",
    "LeftInFloat",
    "LintReport",
    "Mend",
    "Migration",
    "Refusal",
    "Repair",
    "Report",
    "Routed",
    "Row",
    "Saturating",
    "Sensitivity",
    "Uncovered",
    "Verdict",
    "save",
]

FORMATS.discover(__name__, "RENDERING", but=None)

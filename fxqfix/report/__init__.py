"""The result of a comparison, and its renderings: one file per rendering."""

from fxqfix.report.data import Coverage, Report, Row, Uncovered
from fxqfix.report.lint import LintReport

__all__ = ["Coverage", "LintReport", "Report", "Row", "Uncovered"]

"""The result of a comparison, and its renderings: one file per rendering."""

from fxqfix.report.data import Coverage, Report, Row, Uncovered

__all__ = ["Coverage", "Report", "Row", "Uncovered"]

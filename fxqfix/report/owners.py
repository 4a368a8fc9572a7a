"""Which op a weight belongs to."""

from __future__ import annotations

from fxqfix.report.data import Report
from fxqfix.report.rows import Row

__all__ = ["owner"]


def owner(row: Row, report: Report) -> str:
    """The row of the op that a weight belongs to; "" where it has none.

    Example:
        >>> import torch
        >>> from fxqfix import Discrepancy, QParams
        >>> q = QParams(1.0, 0, -128, 127, torch.qint8)
        >>> w = Row("fc.weight", "weight", "fc", "linear", "", q, q, None, Discrepancy())
        >>> owner(w, Report(rows=(w,)))
        ''
    """
    rows = [other for other in report.rows if other.kind == "activation"]
    for other in rows:
        if row.name in other.inputs or other.name == row.name.removesuffix(".weight"):
            return other.name
    same = [other.name for other in rows if row.module and other.module == row.module]
    return same[0] if same else ""

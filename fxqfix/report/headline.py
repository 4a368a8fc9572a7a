"""One sentence that says where, how much, why and what to do."""

from __future__ import annotations

from fxqfix.measure import decibels
from fxqfix.report.data import Report
from fxqfix.report.findings import counted
from fxqfix.report.remedies import code
from fxqfix.report.rows import Row

__all__ = ["headline", "percent"]


def headline(report: Report) -> str:
    """What a report says, in one sentence.

    Example:
        >>> headline(Report(rows=()))
        'Nothing was compared, so that nothing is judged.'
    """
    if not any(row.cumulative.elements for row in report.rows):
        return "Nothing was compared, so that nothing is judged."
    gone = len(report.left_out)
    but = f"; {counted(gone, 'thing')} could not be judged" if gone else ""
    if all(row.exact for row in report.rows):
        return f"Every code and every output bit that was compared is equal{but}."
    return f"{_how_much(report)}{_where(report)}{_what_to_do(report)}{but}."


def _how_much(report: Report) -> str:
    outputs = [row for row in report.rows if row.kind == "output"]
    if not outputs:
        worst = max(report.rows, key=lambda row: row.cumulative_share)
        return f"{percent(worst.cumulative_share)} of the codes of {worst.name} differ"
    worst = min(outputs, key=_sqnr)
    if worst.cumulative.exact:
        return "The outputs are equal, but values inside of the model differ"
    share = percent(worst.cumulative_share)
    name = "the output" if len(outputs) == 1 else worst.name
    return f"{share} of the values of {name} differ (SQNR {decibels(_sqnr(worst))} dB)"


def _sqnr(row: Row) -> float:
    return row.cumulative.sqnr_db


def _where(report: Report) -> str:
    """The row that adds most, and its largest own cause."""
    rows = [row for row in report.rows if row.kind != "output" and row.local_share]
    if not rows:
        return ""
    worst = max(rows, key=lambda row: (row.kind == "activation", row.local_share))
    own = {name: n for name, n in worst.causes.items() if name != "upstream"}
    why = f", by {max(own, key=lambda name: own[name])}" if own else ""
    return f"; most is added at {worst.name}, {percent(worst.local_share)} of its codes{why}"


def _what_to_do(report: Report) -> str:
    own = [name for name in report.causes if name != "upstream"]
    said = code(own)
    if "to_int8" in said:
        return "; convert with fxqfix.to_int8, or repair with fxqfix.repair"
    if "to_decomposed" in said:
        return "; convert with fxqfix.to_decomposed"
    return ""


def percent(share: float) -> str:
    """A share that is not 0 never reads 0%, and one that is not 1 never 100%.

    Example:
        >>> percent(0.00001), percent(0.5), percent(0.99999)
        ('0.001%', '50%', '99.9%')
    """
    percent = 100.0 * share
    if percent >= 99.95 and share < 1.0:
        return "99.9%"
    return f"{percent:.1f}%".replace(".0%", "%") if percent >= 1 else f"{percent:.1g}%"

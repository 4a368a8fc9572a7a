"""Scalars for TensorBoard, or for any other writer that has `add_scalar`."""

from __future__ import annotations

from typing import Protocol

from fxqfix import causes
from fxqfix.report.data import Report
from fxqfix.report.rows import Row

__all__ = ["CAP_DB", "ScalarWriter", "log"]


class ScalarWriter(Protocol):
    """What `log` needs of a writer; `torch.utils.tensorboard.SummaryWriter` has it.

    Example:
        >>> class Printer:
        ...     def add_scalar(self, tag, value, step):
        ...         print(tag, value, step)
        >>> writer: ScalarWriter = Printer()
    """

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> object:
        """Take one figure."""


# What stands for an SQNR without noise, and bounds all others; dB.
CAP_DB = 200.0


def log(
    report: Report, writer: ScalarWriter, step: int, *, prefix: str = "fxqfix", sites: bool = True
) -> None:
    """Log the sums of the report, and the figures of every row.

    A chart keeps the last value that it was given. So what is well again is written too: every
    cause is logged at every step, 0 where it has no code, and an SQNR that is infinite, because
    the values are equal to the bit, is logged as `CAP_DB`, 200 dB.

    Args:
        report: Where the figures are.
        writer: Takes (tag, value, step).
        step: Training step, the x axis of the charts.
        prefix: What tags begin with, "<prefix>/<figure>" for the report, "<prefix>_causes/<cause>",
            and "<prefix>_<figure>/<site>" for the rows, so that TensorBoard makes a section of each
            figure.
        sites: Whether to log the rows one by one: up to five tags each.

    Example:
        >>> class Printer:
        ...     def add_scalar(self, tag, value, step):
        ...         if "causes" not in tag:
        ...             print(tag, value, step)
        >>> log(Report(rows=()), Printer(), step=7, prefix="run1")
        run1/exact 0.0 7
        run1/unexplained 0 7
        run1/worst_local_share 0.0 7
        run1/worst_cumulative_share 0.0 7
    """
    local = [row.local_share for row in report.rows if row.local is not None]
    outputs = [row.cumulative.sqnr_db for row in report.rows if row.kind == "output"]
    sums: dict[str, float] = {
        "exact": float(report.exact),
        "unexplained": report.unexplained,
        "worst_local_share": max(local, default=0.0),
        "worst_cumulative_share": max((row.cumulative_share for row in report.rows), default=0.0),
    }
    if outputs:
        sums["output_sqnr_db"] = _bounded(min(outputs))
    for figure, value in sums.items():
        writer.add_scalar(f"{prefix}/{figure}", value, step)
    found = report.causes
    for cause in dict.fromkeys([*(cause.name for cause in causes.registry()), *found]):
        writer.add_scalar(f"{prefix}_causes/{cause}", found.get(cause, 0), step)
    for row in report.rows if sites else ():
        for figure, value in _figures(row).items():
            writer.add_scalar(f"{prefix}_{figure}/{row.name}", value, step)


def _figures(row: Row) -> dict[str, float]:
    found: dict[str, float] = {
        "cumulative_share": row.cumulative_share,
        "sqnr_db": _bounded(row.cumulative.sqnr_db),
    }
    if row.noise_floor is not None:
        found["noise_floor_db"] = _bounded(row.noise_floor_db)
    if row.quantization is not None:
        found["quantization_db"] = _bounded(row.quantization.sqnr_db)
    if row.local is not None:
        found |= {"local_share": row.local_share, "local_max_lsb": row.local.max_lsb}
    return found


def _bounded(decibels: float) -> float:
    return max(-CAP_DB, min(CAP_DB, decibels))

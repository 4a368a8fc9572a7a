"""Scalars for TensorBoard, or for any other writer that has `add_scalar`."""

from __future__ import annotations

import math
from typing import Protocol

from fxqfix.report.data import Report

__all__ = ["ScalarWriter", "log"]


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


def log(report: Report, writer: ScalarWriter, step: int) -> None:
    """Log the figures of every row, and the sums of the report.

    A chart has no place for infinite values: sites that are equal to the bit log no SQNR.

    Args:
        report: Where the figures are.
        writer: Takes (tag, value, step); tags are "fxqfix_<figure>/<site>", so that TensorBoard
            makes a section of each figure.
        step: Training step, the x axis of the charts.

    Example:
        >>> class Printer:
        ...     def add_scalar(self, tag, value, step):
        ...         print(tag, value, step)
        >>> log(Report(rows=()), Printer(), step=7)
        fxqfix/exact 0.0 7
        fxqfix/unexplained 0 7
    """
    writer.add_scalar("fxqfix/exact", float(report.exact), step)
    writer.add_scalar("fxqfix/unexplained", report.unexplained, step)
    for cause, count in report.causes.items():
        writer.add_scalar(f"fxqfix_causes/{cause}", count, step)
    for row in report.rows:
        figures = {
            "cumulative_share": row.cumulative_share,
            "sqnr_db": row.cumulative.sqnr_db,
            "noise_floor_db": row.noise_floor_db,
        }
        if row.local is not None:
            figures["local_share"] = row.local_share
            figures["local_max_lsb"] = row.local.max_lsb
        for figure, value in figures.items():
            if math.isfinite(value):
                writer.add_scalar(f"fxqfix_{figure}/{row.name}", value, step)

"""Where a monitor writes to: TensorBoard and its like, Python's logging, a CSV file."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxqfix import causes
from fxqfix.errors import OptionError, WriteError
from fxqfix.report import Report
from fxqfix.report.history import Check, flat

__all__ = ["Write", "writing"]

Write = Callable[[Check, Report | None], None]


def writing(writer: Any, prefix: str) -> Write:
    """What hands a check to a writer.

    Args:
        writer: Something with `add_scalar` (`add_text` is used where it has it), a
            `logging.Logger`, the path of a .csv file, or None for the logger "fxqfix".
        prefix: What the tags of `add_scalar` begin with.

    Raises:
        OptionError: It is nothing of these.
        WriteError: The file can't be written.

    Example:
        >>> writing(3, "fxqfix")
        Traceback (most recent call last):
        fxqfix.errors.OptionError: Monitor: the writer has no add_scalar. Found: int. ...
    """
    if writer is None or isinstance(writer, logging.Logger):
        return _to_logger(writer or logging.getLogger("fxqfix"))
    if isinstance(writer, str | os.PathLike):
        return _to_csv(Path(writer))
    if callable(getattr(writer, "add_scalar", None)):
        return _to_scalars(writer, prefix)
    raise OptionError(
        "the writer has no add_scalar",
        where="Monitor",
        found=type(writer).__name__,
        expected="a SummaryWriter or its like, a logging.Logger, or the path of a .csv file",
    )


def _to_logger(logger: logging.Logger) -> Write:
    def write(check: Check, report: Report | None) -> None:
        level = logging.WARNING if check.problem or check.stop else logging.INFO
        logger.log(level, "fxqfix %s", check)

    return write


def _to_scalars(writer: Any, prefix: str) -> Write:
    def write(check: Check, report: Report | None) -> None:
        writer.add_scalar(f"{prefix}/check_ms", check.milliseconds, check.step)
        if report is not None:
            report.log(writer, check.step, prefix=prefix)
        if callable(getattr(writer, "add_text", None)):
            said = report.summary() if report is not None else check.problem
            writer.add_text(f"{prefix}/summary", f"```\n{check}\n{said}\n```", check.step)

    return write


def _to_csv(path: Path) -> Write:
    """Appends, so that a resumed run goes on in its file."""
    names = [cause.name for cause in causes.registry()]
    columns = list(flat(Check(0, 0.0), names))

    def append(check: Check | None) -> None:
        try:
            new = not path.exists() or not path.stat().st_size
            with path.open("a", newline="", encoding="utf-8") as file:
                lines = csv.DictWriter(file, columns, lineterminator="\n")
                if new:
                    lines.writeheader()
                if check is not None:
                    lines.writerow(flat(check, names))
        except OSError as error:
            raise WriteError(
                "the file can't be written", where="Monitor", found=f"{path}: {error.strerror}"
            ) from error

    if path.suffix.lower() != ".csv":
        raise OptionError(
            "the writer is a path of no known kind", where="Monitor", found=str(path),
            expected="a path that ends in .csv",
        )  # fmt: skip
    append(None)  # a path that can't be written is found now, and not hours later
    return lambda check, report: append(check)

"""Files that commands write, by their suffix."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fxqfix.cli._target import UsageError
from fxqfix.report import save

__all__ = ["Writers", "add_format", "add_output", "check", "write"]

Writers = Mapping[str, Callable[[Any], str]]


def add_format(parser: argparse.ArgumentParser) -> None:
    """Add --format."""
    parser.add_argument("--format", metavar="FMT", help="print only the table, in this format")


def add_output(parser: argparse.ArgumentParser, writers: Writers) -> None:
    """Add --output."""
    known = ", ".join(writers)
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"also write FILE ({known})")


def check(path: Path | None, writers: Writers) -> None:
    """Refuse a file that can't be written, before anything slow runs."""
    if path is None:
        return
    if path.suffix.lower() not in writers:
        raise UsageError(
            f"--output {path}: the suffix names no format",
            found=path.suffix or "no suffix",
            expected=f"one of {', '.join(writers)}",
        )
    if not path.parent.is_dir():
        raise UsageError(f"--output {path}: there is no folder {path.parent}")


def write(path: Path | None, result: Any, writers: Writers) -> None:
    """Write the file, if one is asked for."""
    if path is None:
        return
    save(writers[path.suffix.lower()](result), path, "--output")
    print(f"fxqfix: wrote {path}", file=sys.stderr)

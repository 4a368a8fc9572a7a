"""The table of a report, in every tabulate format; text and HTML show the same cells."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate, tabulate_formats

from fxqfix.dialects.site import closest, digits_apart, grid_text
from fxqfix.errors import UnknownNameError, counting
from fxqfix.measure import decibels
from fxqfix.report.data import Report
from fxqfix.report.rows import Row

__all__ = [
    "COLUMNS",
    "LEGEND",
    "Column",
    "cause_text",
    "check",
    "columns_of",
    "grid_cell",
    "legend",
    "listing",
    "range_cell",
    "table",
]

LEGEND = (
    "a -> b: prepared -> converted, one value where equal",
    'kernel "=": the standard kernel, quantized.OP; quantize_per_tensor for an input',
    "local, LSB: codes that differ given the same inputs, and by how much at most",
    "cumul., SQNR, out: against the prepared model's own values; out: codes outside its range",
    "floor: SQNR of the prepared model against itself, with all values multiplied by 1.000001",
)

_QUANTIZATION = "quant. dB: SQNR of the prepared model against the float one"


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        key: What `sort=` takes.
        header: What stands above it.
        cell: Text of a row's cell.
        rank: Sort key of a row, smallest first: text from A to Z, figures from the worst.
        right: Whether cells are aligned to the right.

    Example:
        >>> [column.key for column in COLUMNS][:3]
        ['name', 'op', 'kernel']
    """

    key: str
    header: str
    cell: Callable[[Row], str]
    rank: Callable[[Row], Any]
    right: bool = False


def _text(key: str, header: str, cell: Callable[[Row], str]) -> Column:
    return Column(key, header, cell, cell)


def _count(key: str, header: str, count: Callable[[Row], int | None]) -> Column:
    def cell(row: Row) -> str:
        return "-" if (found := count(row)) is None else str(found)

    def rank(row: Row) -> float:
        return math.inf if (found := count(row)) is None else -found

    return Column(key, header, cell, rank, right=True)


def _sqnr(row: Row) -> str:
    floor = "" if row.noise_floor is None else f" (floor {decibels(row.noise_floor_db)})"
    return decibels(row.cumulative.sqnr_db) + floor


def _sqnr_rank(row: Row) -> float:
    # nan is worst; as a sort key of its own it would leave the rows in no order at all.
    value = row.cumulative.sqnr_db
    return -math.inf if math.isnan(value) else value


def _quantization(row: Row) -> str:
    return "-" if row.quantization is None else decibels(row.quantization.sqnr_db)


def _quantization_rank(row: Row) -> float:
    return math.inf if row.quantization is None else row.quantization.sqnr_db


def _kernel(row: Row) -> str:
    usual = "quantize_per_tensor" if row.op == "input" else f"quantized.{row.op}"
    return "=" if row.kernel == usual else row.kernel or "-"


def range_cell(row: Row) -> str:
    """Range of a row's codes, "prepared -> converted" where they differ."""
    if row.prepared is None or row.converted is None:
        return "float"
    grids = row.prepared, row.converted
    pair = [q.range_text for q in grids]
    if row.prepared.storage != row.converted.storage:
        kinds = (str(q.dtype).removeprefix("torch.") for q in grids)
        pair = [f"{text} {kind}" for text, kind in zip(pair, kinds, strict=True)]
    return " -> ".join(dict.fromkeys(pair))


def grid_cell(row: Row) -> str:
    """Scale and zero point of a row, "prepared -> converted" where they differ."""
    if row.prepared is None or row.converted is None:
        return "-"
    if row.prepared.same_grid(row.converted):
        return grid_text(row.prepared)
    digits = digits_apart(row.prepared, row.converted)
    pair = grid_text(row.prepared, digits), grid_text(row.converted, digits)
    if pair[0] != pair[1]:
        return " -> ".join(pair)
    return f"{grid_text(row.prepared)} -> other channels"


def cause_text(row: Row) -> str:
    """The causes of a row with their codes, most first."""
    return ", ".join(f"{name} {count}" for name, count in Counter(row.causes).most_common())


COLUMNS = (
    _text("name", "site", lambda row: row.name),
    _text("op", "op", lambda row: row.op),
    _text("kernel", "kernel", _kernel),
    _text("range", "range", range_cell),
    _text("qparams", "scale/zp", grid_cell),
    _count("elements", "elements", lambda row: row.cumulative.elements),
    _count("local", "local", lambda row: row.local.differing if row.local else None),
    _count("max_lsb", "LSB", lambda row: row.local.max_lsb if row.local else None),
    _count("cumulative", "cumul.", lambda row: row.cumulative.differing),
    Column("sqnr", "SQNR dB", _sqnr, _sqnr_rank),
    Column("quantization", "quant. dB", _quantization, _quantization_rank),
    _count("out_of_range", "out", lambda row: row.cumulative.out_of_range),
    Column("causes", "causes", cause_text, lambda row: -row.differing),
)


def columns_of(report: Report) -> list[Column]:
    """The columns that a report fills: those of the float model only where there was one."""
    beside = any(row.quantization is not None for row in report.rows)
    return [column for column in COLUMNS if beside or column.key != "quantization"]


def legend(report: Report) -> list[str]:
    """What the columns of a report mean."""
    beside = any(row.quantization is not None for row in report.rows)
    return [*LEGEND, *([_QUANTIZATION] if beside else ())]


def check(fmt: str = "simple", sort: str | None = None) -> None:
    """Refuse a table format or a sort key that does not exist.

    Args:
        fmt: A format of tabulate.
        sort: Key of a column, or None.

    Raises:
        UnknownNameError: There is none of that name; the message lists those that exist.

    Example:
        >>> check("github", sort="local")
    """
    _one_of("table format", fmt, list(tabulate_formats))
    if sort is not None:
        _one_of("sort key", _key(sort), [column.key for column in COLUMNS])


def _key(sort: str) -> str:
    """The key of a column that is named by its key or by what stands above it."""
    named = {column.header.lower(): column.key for column in COLUMNS}
    return named.get(sort.lower(), sort)


def _one_of(what: str, name: str, valid: list[str]) -> None:
    if name in valid:
        return
    nearest = closest(name, valid, count=1)[0]
    raise UnknownNameError(
        f"no {what} is named {name!r}",
        where="table",
        expected=f"one of {', '.join(valid)}",
        remedy=f"use {nearest!r} or another of these",
    )


def listing(headers: Sequence[str], lines: Iterable[Sequence[str]], fmt: str = "simple") -> str:
    """Render lines of text in a tabulate format, every cell as it is.

    Example:
        >>> print(listing(("name", "zp"), [("conv", "007")], "github"))
        | name   | zp   |
        |--------|------|
        | conv   | 007  |
    """
    check(fmt)
    return tabulate(list(lines), headers=list(headers), tablefmt=fmt, disable_numparse=True)


def table(
    report: Report, fmt: str = "simple", sort: str | None = None, limit: int | None = None
) -> str:
    """Render the rows of a report.

    Args:
        report: What to render.
        fmt: Any format of tabulate.
        sort: Key of a column, or its header: text sorts from A to Z, figures from the worst; None
            keeps the order of the graph, as do rows that are equal.
        limit: Rows to show, after sorting; None shows all.

    Returns:
        The table.

    Raises:
        UnknownNameError: There is no such format or key; the message lists those that exist.
        OptionError: The limit is negative, or no whole number.

    Example:
        >>> print(table(Report(rows=()), fmt="tsv").split()[:3])
        ['site', 'op', 'kernel']
    """
    check(fmt, sort)
    if limit is not None:
        counting(limit, "Report.table", "limit counts rows")
    rows = list(report.rows)
    if sort is not None:
        rows.sort(key=next(column.rank for column in COLUMNS if column.key == _key(sort)))
    shown = columns_of(report)
    return tabulate(
        [[column.cell(row) for column in shown] for row in rows[:limit]],
        headers=[column.header for column in shown],
        tablefmt=fmt,
        disable_numparse=True,
        colalign=["right" if column.right else "left" for column in shown],
    )

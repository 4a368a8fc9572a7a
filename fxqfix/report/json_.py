"""JSON that reads back without loss, and that strict parsers take.

Numbers that JSON lacks (inf, -inf, nan) are the strings "inf", "-inf" and "nan".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from fxqfix.dialects.site import Inspection, Site
from fxqfix.errors import DataError
from fxqfix.measure.culprits import Culprit
from fxqfix.measure.discrepancy import Discrepancy
from fxqfix.measure.histogram import Histogram
from fxqfix.qparams import QParams
from fxqfix.report.data import Report
from fxqfix.report.renderings import Rendering
from fxqfix.report.rows import Coverage, Row, Uncovered

__all__ = ["FORMAT", "dumps", "from_json", "inspection_to_json", "packed", "record", "to_json"]

FORMAT = "fxqfix.report/1"
INSPECTION_FORMAT = "fxqfix.inspection/1"

_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def to_json(report: Report) -> str:
    """Write a report.

    Args:
        report: What to write.

    Returns:
        JSON text; its "format" names the version of the layout.

    Example:
        >>> from_json(to_json(Report(rows=(), engine="x86"))).engine
        'x86'
    """
    said = _fields(report, "verdict", "ok", "exact", "reasons")
    own = _fields(report, "engine", "isa", "threads", "made", "batches", "notes")
    data = {"format": FORMAT, **said, **own}
    data["coverage"] = asdict(report.coverage)
    data["rows"] = [_row(row) for row in report.rows]
    if report.corrected is not None:
        data["culprits"] = [
            {"name": c.name, "before": c.before.to_dict(), "after": c.after.to_dict()}
            for c in report.corrected
        ]
    return dumps(data)


def inspection_to_json(inspection: Inspection) -> str:
    """Write an inspection: what other tools need to take the parameters over.

    Args:
        inspection: What to write.

    Returns:
        JSON text; its "format" names the version of the layout.

    Example:
        >>> json.loads(inspection_to_json(Inspection("fx-prepared", ())))["dialect"]
        'fx-prepared'
    """
    sites = [{**vars(site), **_grids(site, "used", "baked")} for site in inspection]
    data = {"format": INSPECTION_FORMAT, **_fields(inspection, "dialect", "unsupported")}
    return dumps({**data, "sites": sites})


def record(kind: str, data: Mapping[str, Any]) -> str:
    """Write a record: its "format" names what it is and the version of its layout.

    Args:
        kind: What it is.
        data: Its plain values.

    Example:
        >>> json.loads(record("certificate", {"ok": True}))["format"]
        'fxqfix.certificate/1'
    """
    return dumps({"format": f"fxqfix.{kind}/1", **data})


def dumps(data: Mapping[str, Any]) -> str:
    """Write plain values as JSON that strict parsers take.

    Args:
        data: Mappings, sequences, numbers and text.

    Example:
        >>> dumps({"sqnr_db": math.inf}).split()
        ['{', '"sqnr_db":', '"inf"', '}']
    """
    return json.dumps(_strict(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


def _fields(record: object, *names: str) -> dict[str, Any]:
    return {name: getattr(record, name) for name in names}


def _row(row: Row) -> dict[str, Any]:
    streams = _fields(row, "local", "cumulative", "noise_floor", "quantization")
    return {
        **vars(row),
        **_grids(row, "prepared", "converted"),
        "histogram": row.histogram and _packed(row.histogram),
        **{name: found and found.to_dict() for name, found in streams.items()},
    }


def _packed(counts: Histogram) -> dict[str, Any]:
    """Runs of empty bins as one word, so that 256 bins are a line and not 256."""
    return {
        "first": counts.first,
        **{side: packed(getattr(counts, side)) for side in ("prepared", "converted")},
    }


def packed(counts: Iterable[int]) -> str:
    """Counts separated by spaces; a run of n zeros is "*n".

    Example:
        >>> packed((0, 0, 0, 5, 0, 1))
        '*3 5 *1 1'
    """
    runs = ((empty, list(run)) for empty, run in groupby(counts, lambda count: count == 0))
    return " ".join(f"*{len(run)}" if empty else " ".join(map(str, run)) for empty, run in runs)


def _unpacked(text: str) -> tuple[int, ...]:
    counts: list[int] = []
    for word in text.split():
        counts += [0] * int(word[1:]) if word.startswith("*") else [int(word)]
    return tuple(counts)


def _grids(record: Row | Site, *names: str) -> dict[str, dict[str, Any] | None]:
    grids = {name: getattr(record, name) for name in names}
    return {
        name: grid and {**vars(grid), "dtype": str(grid.dtype).removeprefix("torch.")}
        for name, grid in grids.items()
    }


def from_json(text_or_path: str | os.PathLike[str]) -> Report:
    """Read what `to_json` wrote.

    Args:
        text_or_path: The text itself (it starts with a brace), or the path of a file.

    Returns:
        The report, equal to the one that was written.

    Raises:
        DataError: It is no file, no JSON, or no report of this format.

    Example:
        >>> from_json('{"format": "other"}')
        Traceback (most recent call last):
        fxqfix.errors.DataError: from_json: the format is not known. Found: other. ...
    """
    try:
        data = json.loads(_read(text_or_path))
    except DataError:
        raise
    except ValueError as error:  # broken JSON, or a file that isn't text
        raise _broken("the input is not JSON", error) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise DataError(
            "the format is not known",
            where="from_json",
            found=data.get("format", "none") if isinstance(data, dict) else type(data).__name__,
            expected=FORMAT,
            remedy="read it with the version of fxqfix that wrote it",
        )
    try:
        return _report(data)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _broken("a part of the report is missing or broken", error) from error


def _read(text_or_path: str | os.PathLike[str]) -> str:
    if isinstance(text_or_path, str) and text_or_path.lstrip().startswith(("{", "[")):
        return text_or_path
    try:
        return Path(text_or_path).read_text(encoding="utf-8")
    except OSError as error:
        raise _broken(
            "the input is neither JSON text nor a file that can be read", error
        ) from error


def _broken(what: str, error: Exception) -> DataError:
    return DataError(
        what,
        where="from_json",
        found=f"{type(error).__name__}: {error}",
        expected="what Report.to_json writes",
        remedy="write the report again",
    )


def _report(data: dict[str, Any]) -> Report:
    coverage = data["coverage"]
    return Report(
        rows=tuple(map(_read_row, data["rows"])),
        coverage=Coverage(
            paired=tuple((str(a), str(b), str(way)) for a, b, way in coverage["paired"]),
            unpaired=tuple(Uncovered(**site) for site in coverage["unpaired"]),
            unsupported=tuple(Uncovered(**site) for site in coverage["unsupported"]),
            lacking=tuple(Uncovered(**site) for site in coverage.get("lacking", ())),
        ),
        engine=data["engine"],
        isa=str(data.get("isa", "")),
        threads=int(data.get("threads", 0)),
        made={str(key): str(said) for key, said in data.get("made", {}).items()},
        batches=int(data["batches"]),
        notes=tuple(data["notes"]),
        corrected=tuple(map(_read_culprit, data["culprits"])) if "culprits" in data else None,
    )


def _read_culprit(data: dict[str, Any]) -> Culprit:
    before, after = (_read_discrepancy(data[name]) for name in ("before", "after"))
    return Culprit(str(data["name"]), before, after)


def _read_row(data: dict[str, Any]) -> Row:
    given = ("local", "noise_floor", "quantization")
    streams = [name for name in given if data.get(name) is not None]
    return Row(
        **{
            **data,
            **{name: _read_discrepancy(data[name]) for name in (*streams, "cumulative")},
            **{
                name: data[name] and _read_qparams(data[name]) for name in ("prepared", "converted")
            },
            "causes": {cause: int(count) for cause, count in data["causes"].items()},
            "inputs": tuple(data["inputs"]),
            "problems": tuple(data.get("problems", ())),
            "histogram": _read_histogram(data.get("histogram")),
        }
    )


def _read_histogram(data: dict[str, Any] | None) -> Histogram | None:
    if data is None:
        return None
    return Histogram(int(data["first"]), *(_unpacked(data[s]) for s in ("prepared", "converted")))


def _read_discrepancy(data: dict[str, Any]) -> Discrepancy:
    return Discrepancy.from_dict({name: _number(value) for name, value in data.items()})


def _read_qparams(data: dict[str, Any]) -> QParams:
    dtype = getattr(torch, data["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{data['dtype']} is no dtype")
    both = {name: _numbers(data[name]) for name in ("scale", "zero_point")}
    return QParams(**{**data, **both, "dtype": dtype})


def _numbers(value: Any) -> Any:
    return tuple(map(_number, value)) if isinstance(value, list) else _number(value)


def _number(value: Any) -> float:
    if isinstance(value, str):
        return _NOT_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return value


RENDERING = Rendering(".json", to_json, inspection_to_json)

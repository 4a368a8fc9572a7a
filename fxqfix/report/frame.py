"""Flat records: one per row, for pandas and for comma-separated values."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from fxqfix._extras import require
from fxqfix.dialects.site import Inspection, Site
from fxqfix.measure.discrepancy import Discrepancy
from fxqfix.qparams import QParams
from fxqfix.report.data import Report
from fxqfix.report.renderings import Rendering
from fxqfix.report.rows import Row

if TYPE_CHECKING:
    import pandas

__all__ = ["columns", "inspection_to_csv", "records", "to_csv", "to_pandas"]

_QPARAMS = tuple(f.name for f in fields(QParams))
_KERNEL = ("engine", "accumulator", "saturation")
_DISCREPANCY = tuple(Discrepancy().to_dict())


def columns(report: Report) -> list[str]:
    """Names of the flat columns; the causes that the report has make the last ones.

    Args:
        report: What to flatten.

    Returns:
        Names such as "prepared_scale", "local_differing" and "cause_range_lost".

    Example:
        >>> columns(Report(rows=()))[:6]
        ['name', 'kind', 'module', 'op', 'kernel', 'engine']
    """
    return [
        *("name", "kind", "module", "op", "kernel", *_KERNEL, "inputs", "note", "source"),
        *("exact", "differing"),
        *(f"{side}_{name}" for side in ("prepared", "converted") for name in _QPARAMS),
        *(f"{side}_{name}" for side in ("local", "cumulative") for name in _DISCREPANCY),
        "noise_floor_db",
        "quantization_db",
        *map(_cause, report.causes),
    ]


def _cause(name: str) -> str:
    return f"cause_{name.replace('-', '_')}"


def records(report: Report) -> list[dict[str, Any]]:
    """One flat record per row.

    Args:
        report: What to flatten.

    Returns:
        Dicts with the keys of `columns`, in that order; None where there is nothing, per-channel
        scales and zero points as tuples.

    Example:
        >>> records(Report(rows=()))
        []
    """
    names = columns(report)
    causes = dict.fromkeys(map(_cause, report.causes), 0)
    flat = [{**causes, **_record(row)} for row in report.rows]
    return [{name: record[name] for name in names} for record in flat]


def _record(row: Row) -> dict[str, Any]:
    return {
        **{name: getattr(row, name) for name in ("name", "kind", "module", "op", "kernel", "note")},
        "source": row.source,
        **{name: getattr(row, name) for name in (*_KERNEL, "exact", "differing")},
        "inputs": " ".join(row.inputs),
        **_qparams("prepared", row.prepared),
        **_qparams("converted", row.converted),
        **_discrepancy("local", row.local),
        **_discrepancy("cumulative", row.cumulative),
        "noise_floor_db": None if row.noise_floor is None else row.noise_floor_db,
        "quantization_db": None if row.quantization is None else row.quantization.sqnr_db,
        **{_cause(name): count for name, count in row.causes.items()},
    }


def _qparams(side: str, qparams: QParams | None) -> dict[str, Any]:
    if qparams is None:
        return {f"{side}_{name}": None for name in _QPARAMS}
    flat = {f"{side}_{name}": getattr(qparams, name) for name in _QPARAMS}
    return {**flat, f"{side}_dtype": str(qparams.dtype).removeprefix("torch.")}


def _discrepancy(side: str, found: Discrepancy | None) -> dict[str, Any]:
    flat = dict.fromkeys(_DISCREPANCY) if found is None else found.to_dict()
    return {f"{side}_{name}": value for name, value in flat.items()}


def to_csv(report: Report) -> str:
    """Comma-separated values, one line per row; needs no pandas.

    Args:
        report: What to write.

    Returns:
        The text; empty cells where there is nothing, per-channel values separated by spaces.

    Example:
        >>> to_csv(Report(rows=())).split(",")[:3]
        ['name', 'kind', 'module']
    """
    return _csv(columns(report), records(report))


def inspection_to_csv(inspection: Inspection) -> str:
    """Comma-separated values, one line per site.

    Args:
        inspection: What to write.

    Returns:
        The text, in the manner of `to_csv`.

    Example:
        >>> inspection_to_csv(Inspection("fx-prepared", ())).split(",")[:4]
        ['name', 'kind', 'module', 'op']
    """
    plain = [f.name for f in fields(Site) if f.name not in ("used", "baked")]
    grids = [f"{side}_{name}" for side in ("used", "baked") for name in _QPARAMS]
    lines = (
        {
            **{name: getattr(site, name) for name in plain},
            **_qparams("used", site.used),
            **_qparams("baked", site.baked),
        }
        for site in inspection
    )
    return _csv([*plain, *grids], lines)


def _csv(header: list[str], lines: Iterable[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, header, lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({name: _joined(value) for name, value in line.items()})
    return file.getvalue()


def _joined(value: Any) -> Any:
    return " ".join(map(repr, value)) if isinstance(value, tuple) else value


def to_pandas(report: Report) -> pandas.DataFrame:
    """One data frame row per site, with the columns of `to_csv`.

    Args:
        report: What to put into the frame.

    Returns:
        The frame; per-channel scales and zero points are tuples.

    Raises:
        MissingDependencyError: pandas is not installed.

    Example:
        >>> len(to_pandas(Report(rows=())))
        0
    """
    frame = require("pandas", "pandas", "Report.to_pandas").DataFrame
    return frame(records(report), columns=columns(report))


RENDERING = Rendering(".csv", to_csv, inspection_to_csv)

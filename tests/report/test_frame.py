from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import pytest

from fxqfix.report import Report, frame
from tests.report import samples

SAMPLE = samples.sample()


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("report", [SAMPLE, samples.exact_sample(), samples.hostile()])
def test_csv_has_the_columns_and_a_line_per_row(report: Report) -> None:
    lines = read(report.to_csv())
    assert [line["name"] for line in lines] == [row.name for row in report.rows]
    assert all(list(line) == frame.columns(report) for line in lines)


def test_csv_holds_the_figures() -> None:
    x, weight, conv, channels, fc = read(SAMPLE.to_csv())
    row = SAMPLE.row("conv1")
    assert row.local is not None
    assert int(conv["local_differing"]) == row.local.differing
    assert float(conv["cumulative_sqnr_db"]) == row.cumulative.sqnr_db
    assert float(conv["noise_floor_db"]) == row.noise_floor_db
    assert (conv["inputs"], conv["cause_range_lost"], conv["cause_stale_qparams"]) == (
        "x conv1.weight",
        "56",
        "0",
    )
    assert (x["prepared_quant_max"], x["converted_quant_max"]) == ("127", "255")
    assert (weight["local_differing"], weight["noise_floor_db"]) == ("", "")
    assert channels["prepared_scale"].split() == [repr(s) for s in samples.CHANNELS.scales]
    assert (fc["local_sqnr_db"], fc["note"], fc["prepared_dtype"]) == (
        "inf",
        "the output",
        "quint8",
    )


def test_csv_without_rows_is_a_header(tmp_path: Path) -> None:
    text = Report(rows=()).to_csv(tmp_path / "r.csv")
    assert text.count("\n") == 1
    assert (tmp_path / "r.csv").read_text(encoding="utf-8") == text


def test_pandas_has_the_same_columns() -> None:
    found = SAMPLE.to_pandas()
    assert list(found.columns) == frame.columns(SAMPLE)
    assert found["cumulative_differing"].sum() == sum(r.cumulative.differing for r in SAMPLE.rows)
    assert found.set_index("name").loc["fc.weight", "prepared_scale"] == samples.CHANNELS.scale
    assert math.isnan(found.set_index("name").loc["fc.weight", "local_differing"])
    assert list(Report(rows=()).to_pandas().columns) == frame.columns(Report(rows=()))


def test_inspection_is_a_line_per_site() -> None:
    x, weight, *_, last = read(frame.inspection_to_csv(samples.inspection()))
    assert (x["used_quant_max"], x["baked_quant_max"]) == ("127", "255")
    assert (weight["shape"], weight["used_zero_point"]) == ("3 3 1 1", "-128")
    assert (last["baked_scale"], last["calibrated"]) == ("", "False")

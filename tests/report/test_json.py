from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxqfix.errors import DataError
from fxqfix.measure.discrepancy import Discrepancy
from fxqfix.qparams import QParams
from fxqfix.report import Coverage, Report, Row, Uncovered, json_
from tests.report import samples

DTYPES = (torch.quint8, torch.qint8, torch.qint32, torch.uint8, torch.int8, torch.int16)
COUNTS = st.integers(0, 2**62)
SCALES = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)
POINTS = st.integers(-(2**31), 2**31 - 1) | st.floats(allow_nan=False, allow_infinity=False)
# Sums of squares. nan is left out only because it is not equal to itself; it has its own test.
FINITE = st.just(0.0) | st.floats(1e-100, 1e100)
SQUARES = FINITE | st.just(math.inf)


@st.composite
def qparams(draw: st.DrawFn) -> QParams:
    limits = (draw(COUNTS), draw(COUNTS), draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):
        return QParams(draw(SCALES), draw(POINTS), *limits)
    channels = draw(st.lists(st.tuples(SCALES, POINTS), min_size=1, max_size=4))
    scales, points = zip(*channels, strict=True)
    return QParams(scales, points, *limits, axis=draw(st.integers(0, 3)))


DISCREPANCIES = st.builds(
    Discrepancy,
    **dict.fromkeys(("elements", "differing", "max_lsb", "sum_lsb", "out_of_range"), COUNTS),
    **dict.fromkeys(("saturated_low", "saturated_high"), COUNTS),
    **dict.fromkeys(("max_abs", "signal", "energy"), SQUARES),
    noise=FINITE,
    product=st.floats(allow_nan=False),
)
ROWS = st.builds(
    Row,
    **dict.fromkeys(("name", "kind", "module", "op", "kernel", "note"), st.text()),
    **dict.fromkeys(("prepared", "converted"), qparams()),
    **dict.fromkeys(("local", "noise_floor"), st.none() | DISCREPANCIES),
    cumulative=DISCREPANCIES,
    causes=st.dictionaries(st.text(), COUNTS, max_size=3),
    evidence=st.dictionaries(st.text(), st.text(), max_size=3),
    inputs=st.lists(st.text(), max_size=3).map(tuple),
)
LEFT_OUT = st.lists(st.builds(Uncovered, st.text(), st.text(), st.text()), max_size=2).map(tuple)
COVERAGES = st.builds(
    Coverage,
    st.lists(st.tuples(st.text(), st.text(), st.text()), max_size=2).map(tuple),
    LEFT_OUT,
    LEFT_OUT,
)
REPORTS = st.builds(
    Report,
    rows=st.lists(ROWS, max_size=3).map(tuple),
    coverage=COVERAGES,
    engine=st.text(),
    batches=COUNTS,
    notes=st.lists(st.text(), max_size=2).map(tuple),
)


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def text_of(report: Report) -> str:
    """JSON that was read by a strict parser."""
    written = report.to_json()
    json.loads(written, parse_constant=refuse)
    return written


@given(REPORTS)
def test_round_trip_is_exact(report: Report) -> None:
    read = Report.from_json(text_of(report))
    assert read == report
    assert read.to_json() == report.to_json()
    for mine, theirs in zip(report.rows, read.rows, strict=True):
        assert list(mine.causes) == list(theirs.causes)
        assert type(mine.prepared.zero_point) is type(theirs.prepared.zero_point)


@pytest.mark.parametrize("report", [samples.sample(), samples.hostile(), Report(rows=())])
def test_samples_come_back(report: Report) -> None:
    assert Report.from_json(text_of(report)) == report


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_figures_that_are_not_finite_come_back(value: float) -> None:
    found = Discrepancy(elements=1, product=value, noise=1.0)
    report = replace(samples.sample(), rows=(replace(samples.sample().rows[0], cumulative=found),))
    product = Report.from_json(text_of(report)).rows[0].cumulative.product
    assert str(product) == str(value)


def test_file_is_read_as_well(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    text = samples.sample().to_json(path)
    assert path.read_text(encoding="utf-8") == text
    assert Report.from_json(path) == Report.from_json(str(path)) == samples.sample()


def without(key: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(samples.sample().to_json())
    del data[key]
    return data


def with_row(**changed: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(samples.sample().to_json())
    data["rows"][0].update(changed)
    return data


GRID = json.loads(samples.sample().to_json())["rows"][0]["prepared"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no-such-file.json", "neither JSON text nor a file"),
        ("", "neither JSON text nor a file"),
        ("{", "not JSON"),
        ("[1]", "format is not known. Found: list"),
        ("{}", "format is not known. Found: none"),
        ('{"format": "fxqfix.report/99"}', "Expected: fxqfix.report/1"),
        (json.dumps(without("rows")), "KeyError: 'rows'"),
        (json.dumps(without("coverage")), "KeyError: 'coverage'"),
        (json.dumps({**without("rows"), "rows": "x"}), "missing or broken"),
        (json.dumps(with_row(surprise=1)), "surprise"),
        (json.dumps(with_row(cumulative=None)), "missing or broken"),
        (json.dumps(with_row(cumulative={})), "missing or broken"),
        (json.dumps(with_row(causes={"x": "many"})), "missing or broken"),
        (json.dumps(with_row(prepared={**GRID, "dtype": "nn"})), "nn is no dtype"),
        (json.dumps(with_row(prepared={**GRID, "dtype": "quint7"})), "quint7"),
        (json.dumps(with_row(prepared={**GRID, "scale": "inf"})), "finite"),
        (json.dumps(with_row(prepared={**GRID, "scale": "huge"})), "huge"),
        (json.dumps(with_row(prepared={**GRID, "scale": True})), "True is no number"),
        (json.dumps(with_row(prepared={**GRID, "scale": -1.0})), "finite and positive"),
    ],
)
def test_broken_input_is_refused(text: str, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        Report.from_json(text)
    assert expected in str(caught.value)
    assert str(caught.value).startswith("from_json: ")


def test_inspection_holds_every_qparams() -> None:
    data = json.loads(json_.inspection_to_json(samples.inspection()), parse_constant=refuse)
    assert data["format"] == "fxqfix.inspection/1"
    x, weight, *_, last = data["sites"]
    assert x["used"]["quant_max"] == 127
    assert x["baked"]["quant_max"] == 255
    assert (weight["shape"], weight["used"]["dtype"]) == ([3, 3, 1, 1], "qint8")
    assert (last["baked"], last["calibrated"]) == (None, False)

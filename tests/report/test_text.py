from __future__ import annotations

import html
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tabulate import tabulate_formats

from fxqfix.errors import FxqfixError, UnknownNameError
from fxqfix.measure.discrepancy import Discrepancy
from fxqfix.qparams import QParams
from fxqfix.report import Coverage, Report, Row, Uncovered, text
from tests.report import samples

SAMPLE = samples.sample()
NAMES = [row.name for row in SAMPLE.rows]
Golden = Callable[[str, str], None]


def shown(table: str) -> list[str]:
    """Names of the sites, in the order in which a tab-separated table has them."""
    return [line.split("\t")[0].strip() for line in table.splitlines()[1:]]


def cell(row: Row, key: str) -> str:
    return next(column for column in text.COLUMNS if column.key == key).cell(row)


@pytest.mark.parametrize(
    ("name", "report"),
    [
        ("report", SAMPLE),
        ("report_exact", samples.exact_sample()),
        ("report_empty", Report(rows=())),
    ],
)
def test_report_reads_as_golden(name: str, report: Report, golden: Golden) -> None:
    golden(name, str(report))


def test_report_as_markdown_reads_as_golden(golden: Golden) -> None:
    golden("report_markdown", text.render(SAMPLE, "github", sort="cumulative", limit=2))


def test_inspection_reads_as_golden(golden: Golden) -> None:
    golden("inspection", text.render_inspection(samples.inspection()))


def test_plain_inspection_reads_as_golden(golden: Golden) -> None:
    golden("inspection_plain", str(samples.inspection()))


@pytest.mark.parametrize("fmt", tabulate_formats)
def test_every_format_shows_every_row_in_graph_order(fmt: str) -> None:
    table = html.unescape(SAMPLE.table(fmt))
    places = [table.index(name) for name in ("site", "conv1.weight", "16384", "fc.weight")]
    assert places == sorted(places)
    assert table.count("(floor ") == 3
    for figure in ("41.1 (floor 71.0)", "0.00392157/-128", "[0,255]", "range-lost 56"):
        assert figure in table
    assert len(table.splitlines()) >= len(NAMES) + 1


@pytest.mark.parametrize("fmt", tabulate_formats)
def test_every_format_shows_a_report_without_rows(fmt: str) -> None:
    assert "kernel" in Report(rows=()).table(fmt)


@pytest.mark.parametrize(
    ("arguments", "valid"),
    [
        ({"fmt": "grit"}, tabulate_formats),
        ({"fmt": ""}, tabulate_formats),
        ({"sort": "locl"}, [column.key for column in text.COLUMNS]),
    ],
)
def test_unknown_name_lists_the_valid_ones(arguments: dict[str, Any], valid: list[str]) -> None:
    with pytest.raises(UnknownNameError, match="named") as caught:
        SAMPLE.table(**arguments)
    assert isinstance(caught.value, FxqfixError)
    assert all(name in str(caught.value) for name in valid)


@pytest.mark.parametrize("key", [column.key for column in text.COLUMNS])
def test_every_sort_key_keeps_every_row(key: str) -> None:
    assert sorted(shown(SAMPLE.table("tsv", sort=key))) == sorted(NAMES)


@pytest.mark.parametrize(
    ("key", "order"),
    [
        (None, ["x", "conv1.weight", "conv1", "fc.weight", "fc"]),
        ("name", ["conv1", "conv1.weight", "fc", "fc.weight", "x"]),
        # A weight has no local figure: it comes last, in graph order.
        ("local", ["conv1", "x", "fc", "conv1.weight", "fc.weight"]),
        ("max_lsb", ["x", "conv1", "fc", "conv1.weight", "fc.weight"]),
        ("cumulative", ["conv1", "conv1.weight", "x", "fc", "fc.weight"]),
        ("sqnr", ["conv1.weight", "x", "fc", "conv1", "fc.weight"]),
        ("out_of_range", ["x", "conv1", "conv1.weight", "fc.weight", "fc"]),
        ("elements", ["conv1", "x", "fc.weight", "conv1.weight", "fc"]),
        ("causes", ["conv1", "conv1.weight", "x", "fc", "fc.weight"]),
    ],
)
def test_figures_sort_from_the_worst(key: str | None, order: list[str]) -> None:
    assert shown(SAMPLE.table("tsv", sort=key)) == order


def test_nan_sorts_as_the_worst() -> None:
    broken = Discrepancy(elements=1, differing=1, signal=math.nan, noise=math.nan)
    report = replace(
        SAMPLE, rows=(*SAMPLE.rows, replace(SAMPLE.rows[0], name="n", cumulative=broken))
    )
    assert shown(report.table("tsv", sort="sqnr"))[0] == "n"


def test_limit_applies_after_sorting() -> None:
    assert shown(SAMPLE.table("tsv", sort="local", limit=2)) == ["conv1", "x"]
    assert "2 of 5 rows shown" in text.render(SAMPLE, limit=2)
    assert "shown" not in text.render(SAMPLE, limit=5)


def test_columns_before_the_causes_fit() -> None:
    header = SAMPLE.table().splitlines()[0]
    assert header.index("causes") <= 160


@pytest.mark.parametrize(
    ("converted", "grid", "span"),
    [
        (samples.NARROW, "0.0078125/3", "[0,127]"),
        (samples.WIDE, "0.0078125/3", "[0,127] -> [0,255]"),
        (replace(samples.NARROW, zero_point=4), "0.0078125/3 -> 0.0078125/4", "[0,127]"),
        # Where six digits look alike, more are shown.
        (replace(samples.NARROW, scale=0.00781250047), "0.0078125/3 -> 0.00781250047/3", "[0,127]"),
        (
            replace(samples.NARROW, dtype=torch.qint8),
            "0.0078125/3",
            "[0,127] quint8 -> [0,127] qint8",
        ),
    ],
)
def test_qparams_show_once_where_equal(converted: QParams, grid: str, span: str) -> None:
    row = replace(SAMPLE.rows[0], converted=converted)
    assert (cell(row, "qparams"), cell(row, "range")) == (grid, span)


@pytest.mark.parametrize(
    ("scale", "grid"),
    [
        ((0.1, 0.3), "0.1..0.2/0 -> 0.1..0.3/0"),
        ((0.1, 0.15, 0.2), "0.1..0.2/0 -> other channels"),
    ],
)
def test_channels_show_as_a_span(scale: tuple[float, ...], grid: str) -> None:
    before = QParams((0.1, 0.2), (0, 0), -128, 127, torch.qint8, axis=0)
    after = replace(before, scale=scale, zero_point=(0,) * len(scale))
    assert cell(replace(SAMPLE.rows[0], prepared=before, converted=after), "qparams") == grid


@pytest.mark.parametrize(
    ("op", "kernel", "expected"),
    [
        ("conv2d", "quantized.conv2d", "="),
        ("input", "quantize_per_tensor", "="),
        ("conv2d", "quantized.conv2d_relu", "quantized.conv2d_relu"),
        ("conv2d", "", "-"),
    ],
)
def test_kernel_shows_where_it_is_not_the_usual_one(op: str, kernel: str, expected: str) -> None:
    assert cell(replace(SAMPLE.rows[0], op=op, kernel=kernel), "kernel") == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(math.inf, "exact"), (-math.inf, "-inf"), (math.nan, "nan"), (0.04, "0.0"), (52.06, "52.1")],
)
def test_decibels(value: float, expected: str) -> None:
    assert text.decibels(value) == expected


GONE = (Uncovered("a", "prepared", "why"),)
EXACT = samples.exact_sample()


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (Report(rows=()), "not judged, nothing was compared"),
        (EXACT, "exact"),
        (
            replace(EXACT, coverage=Coverage(unpaired=GONE)),
            "not judged, exact where compared, 1 site left out",
        ),
        (
            replace(EXACT, coverage=Coverage((), GONE, GONE)),
            "not judged, exact where compared, 2 sites left out",
        ),
        (replace(EXACT, rows=EXACT.rows[:2]), "not judged, exact where compared"),
        (SAMPLE, "not ok, differs in 4 of 5 rows, 2 sites left out"),
    ],
)
def test_verdict(report: Report, expected: str) -> None:
    assert text.verdict(report) == expected


def test_evidence_is_that_of_the_worst_row_which_has_some() -> None:
    first, _, conv, *_ = SAMPLE.rows
    found = {cause: (codes, rows, why) for cause, codes, rows, why in text.evidence(SAMPLE)}
    assert list(found) == list(SAMPLE.causes)
    assert found["range-lost"] == (68, 2, f"x: {first.evidence['range-lost']}")
    assert found["upstream"] == (40, 2, "most in conv1")
    told = replace(SAMPLE, rows=(first, replace(conv, evidence={"range-lost": "57 of them"})))
    assert next(text.evidence(told))[3] == "conv1: 57 of them"


def test_summary() -> None:
    lines = text.summary(SAMPLE, most=2).splitlines()
    assert lines[0] == text.title(SAMPLE) == str(SAMPLE).splitlines()[0]
    assert lines[1:3] == ["- range-lost: 68 codes", "- stale-qparams: 13 codes"]
    assert lines[3].startswith("- range-lost: 68 codes in 2 rows")
    assert lines[5].startswith("worst: conv1.weight (conv2d_relu): 13 of 27 codes differ")
    assert len(lines) == 7
    exact = EXACT.summary().splitlines()
    assert exact == [
        text.title(EXACT),
        "output 0: 0 of 64 values differ, 0 on the same inputs, SQNR exact",
    ]


def test_a_report_has_a_short_repr() -> None:
    assert repr(SAMPLE) == "<Report: fbgemm, 5 rows, not ok>"
    assert repr(EXACT) == "<Report: x86, 3 rows, exact>"
    assert repr(Report(rows=EXACT.rows[:1])) == "<Report: unknown engine, 1 row, not judged>"

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from fxqfix.causes import registry
from fxqfix.report import Report
from fxqfix.report.tensorboard import CAP_DB
from tests.report import samples


class Writer:
    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}
        self.steps: set[int] = set()

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert tag not in self.scalars
        self.scalars[tag] = value
        self.steps.add(step)


def test_every_figure_is_logged_once() -> None:
    writer, report = Writer(), samples.sample()
    report.log(writer, step=7)
    assert writer.steps == {7}
    assert writer.scalars["fxqfix/exact"] == 0.0
    assert writer.scalars["fxqfix_causes/range-lost"] == 68
    assert writer.scalars["fxqfix_local_share/conv1"] == 57 / 16384
    assert writer.scalars["fxqfix_sqnr_db/conv1"] == report.row("conv1").cumulative.sqnr_db
    assert writer.scalars["fxqfix_sqnr_db/fc.weight"] == CAP_DB == 200.0
    assert writer.scalars["fxqfix/worst_local_share"] == max(
        row.local_share for row in report.rows if row.local is not None
    )
    assert "fxqfix_local_share/conv1.weight" not in writer.scalars
    assert all(map(math.isfinite, writer.scalars.values()))


def test_what_is_well_again_is_logged_too() -> None:
    before, after = Writer(), Writer()
    report = samples.sample()
    report.log(before, 0)
    exact = replace(report, rows=tuple(replace(r, causes={}) for r in report.rows))
    exact.log(after, 1)
    assert before.scalars.keys() == after.scalars.keys()
    assert after.scalars["fxqfix_causes/range-lost"] == 0
    known = {f"fxqfix_causes/{cause.name}" for cause in registry()}
    assert known == {tag for tag in after.scalars if "_causes/" in tag}


def test_prefix_and_sums_alone() -> None:
    writer, report = Writer(), samples.sample()
    report.log(writer, 3, prefix="int8/a", sites=False)
    assert all(tag.startswith(("int8/a/", "int8/a_causes/")) for tag in writer.scalars)
    assert writer.scalars["int8/a/exact"] == 0.0


def test_the_worst_output_is_logged() -> None:
    writer, row = Writer(), samples.sample().rows[2]
    half = replace(row.cumulative, noise=row.cumulative.signal)
    outputs = (replace(row, kind="output", name="output 0", cumulative=half),)
    Report(rows=outputs).log(writer, 0)
    assert writer.scalars["fxqfix/output_sqnr_db"] == 0.0


def test_real_summary_writer_takes_it(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(tmp_path) as writer:
        samples.sample().log(writer, 1)
    assert [path.stat().st_size > 500 for path in tmp_path.iterdir()] == [True]

from __future__ import annotations

import math
from pathlib import Path

import pytest

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
    assert "fxqfix_sqnr_db/fc.weight" not in writer.scalars
    assert "fxqfix_local_share/conv1.weight" not in writer.scalars
    assert all(map(math.isfinite, writer.scalars.values()))


def test_real_summary_writer_takes_it(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(tmp_path) as writer:
        samples.sample().log(writer, 1)
    assert [path.stat().st_size > 500 for path in tmp_path.iterdir()] == [True]

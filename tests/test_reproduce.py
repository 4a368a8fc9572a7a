"""A script of one op's discrepancy: torch alone runs it, and it shows what the report counted."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

from fxqfix import Report, compare
from fxqfix.errors import DataError, UnknownNameError, UnsupportedError, WriteError
from fxqfix.flows.reproduce import Source


class Net(nn.Module):
    """An op of each form."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.line = nn.Conv1d(4, 4, 3)
        self.swish = nn.Hardswish()
        self.pool = nn.AdaptiveAvgPool1d(4)
        self.fc = nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = torch.cat([y, y + x.mean()], 1)[:, :4].flatten(2)
        y = self.pool(self.swish(self.line(y)) * 2.0)
        return self.norm(torch.relu(self.fc(y.flatten(1))))


def models() -> tuple[fx.GraphModule, fx.GraphModule, list[Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 6, 6)
    mapping = get_default_qat_qconfig_mapping("fbgemm")
    prepared = prepare_qat_fx(Net().train(), mapping, (x,))
    for _ in range(3):
        prepared(torch.randn(4, 2, 6, 6))
    return prepared.eval(), convert_fx(copy.deepcopy(prepared).eval()), [0.5 * x, 2 * x]


@pytest.fixture(scope="module")
def made() -> tuple[Report, tuple[Any, ...]]:
    kept = models()
    return compare(*kept, engine="fbgemm", progress=False), kept


SITES = ("x", "conv_0", "line", "fc")


@pytest.mark.parametrize("site", SITES)
def test_torch_alone_shows_it(
    made: tuple[Report, tuple[Any, ...]], site: str, tmp_path: Path
) -> None:
    report, _ = made
    assert report.row(site).local_share > 0
    path = tmp_path / "bug.py"
    text = report.reproduce(site, path)
    assert path.read_text(encoding="utf-8") == text
    assert "fxqfix" not in re.sub(r'""".*?"""', "", text, count=1, flags=re.DOTALL)
    # -S: no site-packages, so that nothing but the torch that is named can be imported.
    folder = Path(torch.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    count = int(done.stdout.split(", ")[1].split()[0])
    assert 0 < count <= report.row(site).local.differing  # type: ignore[union-attr]
    assert "note:" not in done.stdout  # the kernel gives what the report saw
    assert done.stdout.count("expected") == min(count, 10)


def test_a_weight_stands_for_its_op(made: tuple[Report, tuple[Any, ...]], tmp_path: Path) -> None:
    report, _ = made
    one = report.reproduce("fc.weight", tmp_path / "a.py")
    assert one == report.reproduce("fc", tmp_path / "b.py")


def test_what_has_no_script_is_named(made: tuple[Report, tuple[Any, ...]], tmp_path: Path) -> None:
    report, (_, _, data) = made
    path = tmp_path / "bug.py"
    with pytest.raises(UnknownNameError, match="no row is named"):
        report.reproduce("nonsense", path)
    with pytest.raises(UnsupportedError, match="Report\\.reproduce: there is no script for layer_"):
        report.reproduce("norm", path)
    with pytest.raises(DataError, match="no code differs there"):
        report.reproduce("fc", path, data=[0 * data[0]])
    with pytest.raises(WriteError, match="Report\\.reproduce"):
        report.reproduce("fc", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_kept_alive(tmp_path: Path) -> None:
    prepared, converted, data = models()
    report = compare(prepared, converted, data, engine="fbgemm", progress=False)
    for other in (pickle.loads(pickle.dumps(report)), copy.deepcopy(report), report.merge(report)):
        with pytest.raises(DataError, match="does not know its models"):
            other.reproduce("fc", tmp_path / "bug.py")
    assert replace(report, source=None) == report
    one_shot = compare(prepared, converted, iter(data), engine="fbgemm", progress=False)
    with pytest.raises(DataError, match="data can't be reached"):
        one_shot.reproduce("fc", tmp_path / "bug.py")
    assert one_shot.reproduce("fc", tmp_path / "bug.py", data=data)
    del data
    gc.collect()  # the errors above hold frames
    with pytest.raises(DataError, match="data can't be reached"):
        report.reproduce("fc", tmp_path / "bug.py")
    gone = Source(nn.Linear(1, 1), None, torch.ones(1))
    with pytest.raises(DataError, match="prepared and data can't be reached"):
        gone.reproduce(report, "fc", tmp_path / "bug.py")

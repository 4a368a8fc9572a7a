"""Routes onnxruntime: ranges, kernels and causes at every level of optimization."""

from __future__ import annotations

import logging
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="the routes need onnx")
pytest.importorskip("onnxscript", reason="the routes need onnxscript")
pytest.importorskip("onnxruntime", reason="the routes need onnxruntime")

import torch

from fxqfix import certify, to_decomposed
from fxqfix._torch import cpu_level
from fxqfix.errors import MissingDependencyError, RouteError
from tests.builds import lacks_integer_max
from tests.routes import nets, small

clamps_codes = pytest.mark.skipif(bool(lacks_integer_max()), reason=lacks_integer_max() or "none")
INPUTS = [gain * small.rows(seed=i) for i, gain in enumerate(nets.GAINS)]


def test_cis_onnxruntime_has_the_kernel() -> None:
    if version("onnxruntime") != "1.31.1":
        pytest.skip("another onnxruntime than CI's")
    assert lacks_integer_max() == ""


@clamps_codes
@pytest.mark.parametrize("level", ["", ":disable_all", ":basic", ":extended"])
def test_ranges_hold_at_every_level(level: str) -> None:
    pinned = certify(small.linears(), f"onnxruntime{level}", INPUTS)
    assert pinned.ok, str(pinned)
    assert pinned.out_of_range == 0
    assert pinned.pinned == pinned.narrow == 3
    integers = level in ("", ":extended")
    assert dict(pinned.kernels) == ({"QGemm": 2} if integers else {})
    assert any("runs in float" in note for note in pinned.notes) != integers


@pytest.mark.parametrize("level", ["", ":disable_all"])
def test_the_loss_is_seen(level: str) -> None:
    model = to_decomposed(small.linears(), pin_ranges=False)
    plain = certify(model, f"onnxruntime{level}", INPUTS)
    assert not plain.ok
    assert plain.out_of_range > 0
    assert plain.causes["range-lost"] > 0
    assert plain.pinned == 0
    assert dict(plain.kernels) == ({} if level else {"QGemm": 2})


def test_clamps_on_values_keep_the_range_and_lose_the_kernels() -> None:
    found = certify(to_decomposed(small.linears()), "onnxruntime", INPUTS)
    assert found.ok
    assert found.out_of_range == 0
    assert found.kernels == ()


@clamps_codes
def test_an_architecture() -> None:
    found = certify(nets.prepared("residual"), "onnxruntime", nets.batches())
    assert found.ok, str(found)
    assert found.max_lsb <= 1
    assert set(found.causes) <= {"rounding", "bias-int32"}
    assert dict(found.kernels) == {"QLinearConv": 3, "QLinearAdd": 1, "QGemm": 1}


@clamps_codes
def test_any_batch_size() -> None:
    data = [small.rows(count) for count in (4, 1, 7)]
    found = certify(small.linears(), "onnxruntime", data, dynamic_batch=True)
    assert found.ok, str(found)
    assert not any("several sizes" in note for note in found.notes)


@pytest.mark.skipif(cpu_level() == "vnni", reason="sums of products are exact on this CPU")
@pytest.mark.parametrize("layer", ["conv", "linear"])
def test_pairs_of_products_saturate(layer: str) -> None:
    """Activations in [0,255] on CPUs without VNNI: every code is off, and the cause is named."""
    found = certify(small.heavy(layer), "onnxruntime", [small.bright(layer)])
    assert not found.ok
    assert found.max_lsb > 1
    wrong = [s for s in found.sites if s.found.differing]
    assert [set(s.causes) for s in wrong] == [{"int16-saturation"}]


# ------------------------------------------------------------------------ what is left behind


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@clamps_codes
def test_nothing_is_printed_and_no_file_is_left(
    folders: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    level = logging.getLogger("torch.onnx").level
    certify(small.linears(), "onnxruntime", INPUTS[:1])
    assert not list(folders.iterdir())
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""
    assert logging.getLogger("torch.onnx").level == level


# ------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("package", ["onnxruntime", "onnx", "onnxscript"])
def test_a_missing_package(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(MissingDependencyError, match=r"fxqfix\[onnx\]"):
        certify(small.linears(), "onnxruntime", INPUTS[:1])


def test_an_op_without_an_onnx_form() -> None:
    model = to_decomposed(small.linears())
    last = next(n for n in model.graph.nodes if n.op == "output")
    with model.graph.inserting_before(last):
        odd = model.graph.call_function(torch.special.bessel_j0, (last.args[0],))
    last.args = (odd,)
    model.recompile()
    with pytest.raises(RouteError, match="can't lower this graph"):
        certify(model, "onnxruntime", INPUTS[:1])


@pytest.mark.parametrize("asked", [1, 9, 99])
def test_an_opset_that_the_exporter_does_not_write_is_refused(
    asked: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It logs that the conversion failed, and goes on with the opset that it had."""
    with pytest.raises(RouteError, match=f"can't write this graph in opset {asked}") as info:
        certify(small.linears(), "onnxruntime", INPUTS[:1], opset=asked)
    assert "it wrote opset" in str(info.value)
    written = int(str(info.value).partition("it wrote opset ")[2].partition(".")[0])
    assert certify(small.linears(), "onnxruntime", INPUTS[:1], opset=written).ok
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]

"""Values and grids are two corrections, and a grid that a kernel picks is nobody's formula."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.quantization import (
    DeQuantStub,
    QuantStub,
    disable_observer,
    get_default_qat_qconfig_mapping,
    get_default_qconfig,
    get_default_qconfig_mapping,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import fxqfix
from fxqfix._torch import quantized_engine, quiet

QPARAMS = {"scale-formula", "stale-qparams", "moving-observer"}


def prepared(net: nn.Module, x: Tensor, engine: str, flow: str) -> Any:
    """An FX model: calibrated, trained, or trained and frozen."""
    trains = flow != "calibrated"
    mapping = get_default_qat_qconfig_mapping if trains else get_default_qconfig_mapping
    make = prepare_qat_fx if trains else prepare_fx
    with quiet():
        model = make(net.train(trains), mapping("qnnpack" if engine == "onednn" else engine), (x,))
        for _ in range(3):
            model(x)
        model.eval().apply(disable_observer)
        return fxqfix.freeze(model) if flow == "frozen" else model


def converted(model: Any, engine: str) -> Any:
    with quantized_engine(engine), quiet():
        return convert_fx(copy.deepcopy(model))


class Around(nn.Module):
    """Layers with an op between them that has no scale of its own to be given."""

    def __init__(self, op: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.op = nn.Linear(5, 8), nn.Linear(8, 5), op

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.op(self.first(x)))


SCALARS: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda x: x + 5,
    "mul": lambda x: x * 3,
    "add_relu": lambda x: F.relu(x + 0.7),
    "mul_negative": lambda x: -0.5 * x,
}


@pytest.mark.parametrize("flow", ["calibrated", "trained", "frozen"])
@pytest.mark.parametrize("name", SCALARS)
def test_the_grid_that_a_kernel_works_out(name: str, flow: str) -> None:
    engine = {"add": "fbgemm", "mul": "qnnpack", "add_relu": "onednn"}.get(name, "x86")
    torch.manual_seed(0)
    x = torch.rand(64, 5)
    model = prepared(Around(SCALARS[name]), x, engine, flow)
    report = fxqfix.compare(model, converted(model, engine), [x], engine=engine)
    row = next(r for r in report.rows if r.op.startswith(("add", "mul")))
    assert row.causes["shared-qparams"] > 0
    assert "works it out of its input's grid" in row.evidence["shared-qparams"]
    assert not QPARAMS & set(row.causes)
    assert report.unexplained == 0


def test_an_eager_kernel_s_grid_that_nobody_observes() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.dequant = QuantStub(), DeQuantStub()
            self.plus, self.fc = torch.ao.nn.quantized.FloatFunctional(), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.dequant(self.fc(self.plus.add_scalar(self.quant(x), 2.5)))

    torch.manual_seed(0)
    x, net = torch.randn(64, 5), Shifted().eval()
    net.qconfig = get_default_qconfig("fbgemm")
    with quantized_engine("fbgemm"), quiet():
        model = torch.ao.quantization.prepare(net)
        model(x)
        frozen = fxqfix.freeze(model)
        report = fxqfix.compare(
            frozen, torch.ao.quantization.convert(copy.deepcopy(frozen)), [x], engine="fbgemm"
        )
    assert not QPARAMS & set(report.causes)  # eager mode doesn't observe it: no site, no grid
    assert report.unexplained == 0


class Called(nn.Module):
    """One layer, called again on what it gave."""

    def __init__(self, layer: nn.Module, times: int = 2) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.layer(x)
        return x


@pytest.mark.parametrize("flow", ["calibrated", "trained"])
@pytest.mark.parametrize(
    ("layer", "shape", "engine"),
    [
        (lambda: nn.Linear(5, 5), (64, 5), "fbgemm"),
        (lambda: nn.Conv2d(3, 3, 3, padding=1), (4, 3, 6, 6), "qnnpack"),
        (lambda: nn.Sequential(nn.Conv1d(3, 3, 3, padding=1), nn.ReLU()), (4, 3, 9), "x86"),
    ],
)
def test_the_grid_of_a_module_that_is_called_twice(
    layer: Callable[[], nn.Module], shape: tuple[int, ...], engine: str, flow: str
) -> None:
    torch.manual_seed(0)
    x = torch.rand(shape)
    model = prepared(Called(layer(), 3 if flow == "trained" else 2), x, engine, flow)
    report = fxqfix.compare(model, converted(model, engine), [x], engine=engine)
    calls = [r for r in report.rows if r.kind == "activation" and r.op != "input"]
    for row in calls[:-1]:
        assert "times and has one output grid" in row.evidence["shared-qparams"]
        assert not {"stale-qparams", "moving-observer"} & set(row.causes)
    assert "shared-qparams" not in calls[-1].causes
    assert report.unexplained == 0


class Both(nn.Module):
    """A convolution and a functional linear, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3)
        self.weight, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.conv(x), self.weight, self.bias)


def _moved(model: Any) -> None:
    model.conv.bias.add_(0.3)
    model.bias.add_(0.3)


def _lost(model: Any) -> None:
    model.conv.bias.zero_()
    model.bias.zero_()


def _zeroed(model: Any) -> None:
    model.conv.weight[1] = 0
    model.weight[2] = 0


def _trained_on(model: Any) -> None:
    for weight in (model.conv.weight, model.weight):
        weight.add_(torch.randn(weight.shape) * 0.05)


@pytest.mark.parametrize("change", [_moved, _lost, _zeroed, _trained_on])
@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack", None])
def test_other_values_on_the_same_grids(change: Callable[[Any], None], engine: str | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4, 8)
    model = prepared(Both(), x, engine or "fbgemm", "frozen")
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    theirs = converted(other, engine) if engine else fxqfix.to_decomposed(other)
    report = fxqfix.compare(model, theirs, [x], engine=engine)
    for name in ("conv", "linear"):
        row = report.row(name)
        assert row.causes["other-weights"] > 0.2 * row.local.differing
        assert "these may be two checkpoints" in row.evidence["other-weights"]
    own = {"bias-int32"} if engine == "qnnpack" else set()
    assert set(report.causes) <= {"other-weights", "upstream", "rounding", "range-lost"} | own
    assert any("two checkpoints" in note for note in report.notes)
    mended = fxqfix.repair(model, theirs, data=[x])
    assert "other-weights" not in mended.after.causes
    bias_only = change in (_moved, _lost)
    whats = {m.what for m in mended.applied if m.site.endswith("weight")}
    assert whats == {"bias"} if bias_only else all("codes, on" in what for what in whats)


@pytest.mark.parametrize("flow", ["trained", "calibrated"])
def test_grids_and_values_are_counted_apart(flow: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4, 8)
    model = prepared(Both(), x, "fbgemm", flow)
    clean = fxqfix.compare(model, converted(model, "fbgemm"), [x], engine="fbgemm")
    assert "other-weights" not in clean.causes
    other = copy.deepcopy(model)
    with torch.no_grad():
        _lost(other)
    report = fxqfix.compare(model, converted(other, "fbgemm"), [x], engine="fbgemm")
    for name in ("conv", "linear"):
        row = report.row(name)
        assert row.causes["other-weights"] > 0.8 * row.local.differing
        assert sum(row.causes.get(cause, 0) for cause in QPARAMS) < 0.2 * row.local.differing
    assert report.unexplained == 0


def test_a_module_s_own_bias_is_read_where_the_conversion_has_none() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    net: Any = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 2))
    model = prepared(net, x, "fbgemm", "frozen")
    theirs: fx.GraphModule = converted(model, "fbgemm")
    layer: Any = theirs.get_submodule("0")
    layer.set_weight_bias(layer.weight(), torch.full((8,), 0.5))
    row = fxqfix.compare(model, theirs, [x], engine="fbgemm").row("_0")
    assert row.causes["other-weights"] > 0
    assert row.evidence["other-weights"].startswith("bias of '0': off by up to 0.5 (")

"""lint: each state is found by its code, healthy models are let alone, nothing is perturbed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.quantization import (
    QConfig,
    QConfigMapping,
    QuantStub,
    default_weight_observer,
    disable_fake_quant,
    disable_observer,
    enable_observer,
    get_default_qat_qconfig_mapping,
    get_default_qconfig,
    get_default_qconfig_mapping,
)
from torch.ao.quantization.fake_quantize import FakeQuantize
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.observer import MinMaxObserver, MovingAverageMinMaxObserver
from torch.ao.quantization.quantize_fx import prepare_fx, prepare_qat_fx

import fxqfix
from fxqfix._torch import quantized_engine, quiet
from fxqfix.checks import registry
from fxqfix.errors import DialectError, UnknownNameError
from tests.engines.nets import NETS, SHAPES
from tests.faults.injectors import SHAPE, Clamped, Net, overwritten, trained
from tests.states import fingerprint

Model = tuple[nn.Module, str]


def calibrated(net: nn.Module, engine: str = "fbgemm", mapping: Any = None) -> fx.GraphModule:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    with quiet():
        prepared = prepare_fx(net.eval(), mapping or get_default_qconfig_mapping(engine), (x,))
    prepared(x)
    return prepared


def uncalibrated() -> Model:
    return prepare_fx(Net().eval(), get_default_qconfig_mapping("fbgemm"), (torch.ones(SHAPE),)), ""


def moving_observer() -> Model:
    return trained().apply(enable_observer), ""


def scale_formula() -> Model:
    return trained(), "stem.weight"


def stale_qparams() -> Model:
    """Buffers that were right, then an observer that saw more with the buffers held."""
    quantizer = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, quant_max=127)
    qconfig = QConfig(quantizer, get_default_qconfig("fbgemm").weight)
    prepared = calibrated(Net(), mapping=QConfigMapping().set_global(qconfig))
    prepared.apply(disable_observer)
    for module in prepared.modules():
        if isinstance(module, MovingAverageMinMaxObserver):
            module.max_val.mul_(2.0)
    return prepared, "x"


def fake_quant_off() -> Model:
    return trained().apply(disable_fake_quant), "x"


def observer_only() -> Model:
    return calibrated(Net()), "x"


def bn_training() -> Model:
    prepared: Any = trained()
    prepared.stem.bn.train()
    return prepared, "stem.bn"


def dropout_training() -> Model:
    prepared: Any = trained(drop=nn.Dropout(0.5))
    prepared.drop.train()
    return prepared, "drop"


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.conv(x), 0.5, training=True)


class Noisy(Dropping):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + torch.rand_like(x[:, :1, 1:-1, 1:-1])


def dropout_traced_in() -> Model:
    return calibrated(Dropping()), "dropout"


def nondeterministic() -> Model:
    return calibrated(Noisy()), "rand_like"


def range_lost() -> Model:
    return calibrated(Net()), "x"


def narrow_range() -> Model:
    weight = MinMaxObserver.with_args(quant_min=-8, quant_max=7, dtype=torch.qint8)
    qconfig = QConfig(get_default_qconfig("fbgemm").activation, weight)
    return calibrated(Net(), mapping=QConfigMapping().set_global(qconfig)), "stem.weight"


def shared_qparams() -> Model:
    """Dropout with an observer of its own: the int8 one keeps its input's grid."""
    prepared = fxqfix.freeze(trained(drop=nn.Dropout(0.5)))
    nodes = {n.name: n for n in prepared.graph.nodes}
    own: Any = prepared.get_submodule(str(next(iter(nodes["drop"].users)).target))
    own.scale.mul_(2.0)
    return prepared, "drop"


class Tied(nn.Module):
    """One convolution, called on two values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.sigmoid(self.conv(x)))


def test_a_shared_module_is_an_error_until_frozen() -> None:
    prepared = calibrated(Tied())
    found = [f for f in fxqfix.lint(prepared, engine="fbgemm").findings if f.severity == "error"]
    assert [(f.code, f.site) for f in found] == [("shared-qparams", "conv")]
    assert fxqfix.lint(fxqfix.freeze(prepared), engine="fbgemm").ok


def dead_channel() -> Model:
    net = Net()
    with torch.no_grad():
        net.body.weight[3] = 0.0
    return calibrated(net), "body.weight"


def degenerate_scale() -> Model:
    net = Net()
    nn.init.zeros_(net.body.weight)
    nn.init.zeros_(net.body.bias)
    net.relu = nn.Identity()
    prepared = prepare_fx(nn.Sequential(net.body).eval(), get_default_qconfig_mapping(), SHAPE)
    prepared(torch.zeros(1, 8, 4, 4))
    return prepared, "_0"


def int16_saturation() -> Model:
    return calibrated(Net()), "body.weight"


def inplace_lost() -> Model:
    return overwritten(), "act"


def kernel_defect() -> Model:
    mapping = QConfigMapping().set_global(get_default_qconfig("qnnpack"))
    return calibrated(Clamped(), mapping=mapping), "clip"


def not_lowered() -> Model:
    mapping = get_default_qconfig_mapping("fbgemm").set_module_name("body", None)
    return calibrated(Net(), mapping=mapping), "body"


def engine_mismatch() -> Model:
    observer = MinMaxObserver.with_args(dtype=torch.qint8, quant_min=-128, quant_max=127)
    net = nn.Sequential(QuantStub(), nn.Conv2d(3, 4, 1)).eval()
    net.qconfig = QConfig(observer, get_default_qconfig("fbgemm").weight)
    prepared = torch.ao.quantization.prepare(net)
    prepared(torch.randn(SHAPE))
    return prepared, "_1"


def non_finite() -> Model:
    prepared: Any = fxqfix.freeze(trained())
    with torch.no_grad():
        prepared.body.weight.view(-1)[3] = float("nan")
    return prepared, "body.weight"


def weight_saturated() -> Model:
    prepared: Any = fxqfix.freeze(trained())
    with torch.no_grad():
        prepared.body.weight.mul_(20)
    return prepared, "body.weight"


STATES: dict[str, Callable[[], Model]] = {
    f.__name__.replace("_", "-"): f
    for f in (
        *(uncalibrated, moving_observer, scale_formula, stale_qparams, fake_quant_off),
        *(observer_only, bn_training, dropout_training, nondeterministic, range_lost),
        *(narrow_range, shared_qparams, dead_channel, degenerate_scale, int16_saturation),
        *(non_finite, weight_saturated),
        *(inplace_lost, kernel_defect, not_lowered, engine_mismatch),
    )
}
ENGINE = {"kernel-defect": "qnnpack"}


def test_every_check_has_a_state() -> None:
    assert {check.code for check in registry()} == set(STATES)


@pytest.mark.parametrize("code", STATES)
def test_the_state_is_found_where_it_is(code: str) -> None:
    model, site = STATES[code]()
    engine = ENGINE.get(code, "fbgemm")
    with quantized_engine(engine):
        before, draws = fingerprint(model), torch.get_rng_state()
        report = fxqfix.lint(model, engine=engine)
        assert fingerprint(model) == before
        assert torch.equal(torch.get_rng_state(), draws)
    sites = {f.site for f in report.findings if f.code == code}
    assert site in sites if site else sites, report.table()
    for finding in report.findings:
        assert finding.evidence
        assert finding.remedy
    assert report.ok == (not any(f.severity == "error" for f in report.findings))
    assert code in str(report)


def test_dropout_that_a_trace_baked_in() -> None:
    model, site = dropout_traced_in()
    found = [f for f in fxqfix.lint(model, engine="fbgemm").findings if f.site == site]
    said = {f.code: f.evidence for f in found}
    assert "traced with training=True" in said["dropout-training"]
    assert "nondeterministic" not in said  # said once


@pytest.mark.parametrize("engine", ["fbgemm", "x86", "onednn", "qnnpack"])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("qat", [False, True], ids=["ptq", "qat"])
def test_healthy_frozen_models_have_no_errors(name: str, engine: str, qat: bool) -> None:
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this torch has no engine {engine}")
    torch.manual_seed(0)
    x = torch.randn(SHAPES.get(name, (4, 3, 16, 16)))
    make, mappings = prepare_fx, get_default_qconfig_mapping(engine)
    net = NETS[name]()
    per_tensor = mappings.global_qconfig._replace(weight=default_weight_observer)
    mappings.set_object_type(nn.ConvTranspose2d, per_tensor)  # all that onednn can be prepared for
    if qat:
        make, mappings = prepare_qat_fx, get_default_qat_qconfig_mapping(engine)
    with quantized_engine(engine), quiet():
        prepared = make(net.train() if qat else net.eval(), mappings, (x,))
        prepared(x)
        frozen = fxqfix.freeze(prepared.eval())
        errors = fxqfix.lint(frozen, engine=engine).of("error")
        if errors:  # then they are right: torch can't convert this
            with pytest.raises(fxqfix.FxqfixError):
                fxqfix.compare(frozen, None, [x], engine=engine)


def test_training_is_no_finding() -> None:
    prepared = trained().apply(enable_observer).train()
    codes = {f.code for f in fxqfix.lint(prepared, engine="fbgemm").findings}
    assert not codes & {"moving-observer", "bn-training", "dropout-training", "nondeterministic"}


def test_eager_models_are_read_too() -> None:
    net = nn.Sequential(QuantStub(), nn.Conv2d(3, 4, 1)).eval()
    net.qconfig = get_default_qconfig("fbgemm")
    prepared = torch.ao.quantization.prepare(net)
    report = fxqfix.lint(prepared, engine="fbgemm")
    assert {f.code for f in report.of("error")} == {"uncalibrated"}


def test_a_graph_inside_a_model_draws_nothing() -> None:
    """Its forward is generated code, which belongs to no module of Python."""
    inner = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    x = torch.ones(2, 4)
    custom = PrepareCustomConfig().set_standalone_module_name("0", None, (x,), None, None)
    with quiet():
        prepared = prepare_fx(
            nn.Sequential(inner, nn.Linear(4, 2)).eval(),
            get_default_qconfig_mapping("fbgemm"),
            (x,),
            prepare_custom_config=custom,
        )
        prepared(x)
    assert "nondeterministic" not in {
        f.code for f in fxqfix.lint(prepared, engine="fbgemm").findings
    }


def test_bad_input() -> None:
    prepared = trained()
    with pytest.raises(UnknownNameError, match="there is no engine 'tpu'"):
        fxqfix.lint(prepared, engine="tpu")
    for model in (nn.Linear(2, 2), fxqfix.to_decomposed(copy.deepcopy(prepared))):
        with pytest.raises(
            DialectError, match=r"only prepared models are checked|holds no observer"
        ):
            fxqfix.lint(model, engine="fbgemm")

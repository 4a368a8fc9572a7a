"""Weights that are NaN, zero or beyond their grid, from every call that takes a prepared model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization import (
    FakeQuantize,
    MovingAverageMinMaxObserver,
    QConfig,
    QConfigMapping,
    default_weight_fake_quant,
    disable_observer,
    get_default_qat_qconfig,
    get_default_qat_qconfig_mapping,
    prepare_qat,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import fxqfix
from fxqfix._torch import quantized_engine, quiet
from fxqfix.errors import NonFiniteError, UncalibratedError

X = torch.linspace(-2, 2, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)
    return nn.Sequential(*layers)


def plain() -> nn.Sequential:
    """Without BatchNorm, which moves weights behind their observers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))


def prepared(model: nn.Module, mapping: Any = None, runs: int = 200) -> Any:
    given = mapping or get_default_qat_qconfig_mapping("fbgemm")
    with quiet(), torch.no_grad():
        made = prepare_qat_fx(model.train(), given, (X,))
        for _ in range(runs):
            made(X)
    return made.eval()


ENTRIES: dict[str, Callable[[Any], Any]] = {
    "compare": lambda model: fxqfix.compare(model, None, [X], engine="fbgemm"),
    "to_decomposed": fxqfix.to_decomposed,
    "to_int8": lambda model: fxqfix.to_int8(model, engine="fbgemm"),
    "certify": lambda model: fxqfix.certify(model, "export", [X]),
    "certify-int8": lambda model: fxqfix.certify(model, "int8:fbgemm", [X]),
    "migrate": lambda model: fxqfix.migrate(model, [X], "nowhere.pt2"),
    "extract_parameters": fxqfix.extract_parameters,
    "golden_vectors": lambda model: fxqfix.golden_vectors(model, X),
    "repair": lambda model: fxqfix.repair(model, model),
}


def _weight(model: Any) -> None:
    model.get_submodule("3").weight.view(-1)[5] = float("nan")


def _bias(model: Any) -> None:
    model.get_submodule("3").bias[0] = float("inf")


def _statistics(model: Any) -> None:
    model.get_submodule("0").bn.running_mean[1] = float("nan")


@pytest.mark.parametrize(
    ("plant", "name"),
    [(_weight, "3.weight"), (_bias, "3.bias"), (_statistics, "0.bn.running_mean")],
)
@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_not_finite_is_named(
    entry: str, plant: Callable[[Any], None], name: str, tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    model = prepared(net(), runs=2)
    with torch.no_grad():
        plant(model)
    with pytest.raises(NonFiniteError, match=f"'{name}' holds NaN or inf"):
        ENTRIES[entry](model)
    assert not list(tmp_path.iterdir())


def test_lint_finds_what_is_not_finite() -> None:
    model = prepared(net(), runs=2)
    with torch.no_grad():
        _weight(model)
        _bias(model)
    for asked in (model, model.apply(disable_observer), fxqfix.freeze(model)):
        report = fxqfix.lint(asked)
        found = {f.site for f in report.of("error") if f.code == "non-finite"}
        assert found == {"3.weight", "3.bias"}
        assert not report.ok


@pytest.mark.parametrize("flow", ["fx", "eager"])
def test_observers_that_saw_it_are_found_too(flow: str) -> None:
    model: Any = prepared(net(), runs=1)
    if flow == "eager":
        eager = nn.Sequential(torch.ao.quantization.QuantStub(), nn.Conv2d(3, 2, 3)).train()
        eager.qconfig = get_default_qat_qconfig("fbgemm")
        model = prepare_qat(eager)
    with torch.no_grad(), quiet():
        model.train()(X)
        weight = next(p for n, p in model.named_parameters() if n.endswith("weight"))
        weight.view(-1)[0] = float("nan")
        with contextlib.suppress(RuntimeError):  # torch's own fake-quant may refuse it
            model(X)
    report = fxqfix.lint(model)
    assert report.findings[0].code == "non-finite"
    assert report.findings[0].site.endswith("weight")


def test_a_mask_of_minus_infinity_is_none() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.register_buffer("mask", torch.full((8, 8), -torch.inf).triu(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.fc(x) + self.mask, -1)

    x = torch.randn(8, 8)
    mapping = QConfigMapping().set_object_type(nn.Linear, get_default_qat_qconfig("fbgemm"))
    model = prepare_qat_fx(Masked().train(), mapping, (x,))
    model(x)
    assert not [f for f in fxqfix.lint(model.eval()).findings if f.code == "non-finite"]
    fxqfix.to_decomposed(model)


def _zero_layer(model: Any) -> None:
    model[3].weight.zero_()


def _zero_channel(model: Any) -> None:
    model[3].weight[1] = 0


@pytest.mark.parametrize(
    ("plant", "said"),
    [(_zero_layer, "all 2 channels have"), (_zero_channel, "1 of 2 channels have")],
)
@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])  # a scale per channel, one for all
def test_zero_channels_are_read_from_the_weights(
    engine: str, plant: Callable[[Any], None], said: str
) -> None:
    model = net()
    with torch.no_grad():
        plant(model)
    asked = prepared(model, get_default_qat_qconfig_mapping(engine))
    (found,) = (f for f in fxqfix.lint(asked, engine=engine).findings if f.code == "dead-channel")
    assert found.site == "_3.weight"
    assert found.evidence.startswith(said)
    healthy = fxqfix.lint(prepared(net(), get_default_qat_qconfig_mapping(engine)), engine=engine)
    assert not [f for f in healthy.findings if f.code == "dead-channel"]


def test_channels_of_a_transposed_convolution_stand_second() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2))
    with torch.no_grad():
        model[0].weight[:, 2] = 0
    asked = prepare_fx(model.eval(), QConfigMapping().set_global(QCONFIG), (X,))
    asked(X)
    (found,) = (f for f in fxqfix.lint(asked).findings if f.code == "dead-channel")
    assert found.evidence.startswith("1 of 4 channels have (next to) no weights, first 2")


QCONFIG = torch.ao.quantization.get_default_qconfig("qnnpack")


def test_weights_that_were_trained_on_behind_a_frozen_grid() -> None:
    frozen = fxqfix.freeze(prepared(plain()))
    assert "weight-saturated" not in {f.code for f in fxqfix.lint(frozen).findings}
    frozen.train()
    optimizer = torch.optim.SGD(frozen.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        (frozen(X) - 5).pow(2).mean().backward()
        optimizer.step()
    report = fxqfix.lint(frozen.eval())
    assert not report.ok
    (found,) = (f for f in report.findings if f.site == "_2.weight" and f.severity == "error")
    assert found.code == "weight-saturated"
    assert found.evidence.endswith("their codes saturate")
    assert int(found.evidence.partition(" ")[0]) > 60


def test_a_few_are_a_warning() -> None:
    frozen: Any = fxqfix.freeze(prepared(plain()))
    with torch.no_grad():
        frozen.get_submodule("2").weight.view(-1)[:8] = 9.0
    (found,) = (f for f in fxqfix.lint(frozen).findings if f.code == "weight-saturated")
    assert found.severity == "warning"
    assert found.evidence.startswith("8 of 72 values")
    with torch.no_grad():
        frozen.get_submodule("2").weight.view(-1)[:2] = 0.0
    assert "weight-saturated" not in {f.code for f in fxqfix.lint(frozen).findings}


@pytest.mark.parametrize("kind", ["fused", "plain", "weights only"])
def test_observers_that_were_off_before_any_data(kind: str, tmp_path: Any) -> None:
    plain = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
    mapping = None
    if kind == "plain":
        qconfig = QConfig(activation=plain, weight=default_weight_fake_quant)
        mapping = QConfigMapping().set_global(qconfig)
    model = prepared(net(), mapping, runs=0)
    for path, module in model.named_modules():
        if kind != "weights only" or path.endswith("weight_fake_quant"):
            disable_observer(module)
    with quiet():
        model.train()(X)
    model.eval()
    entries = {name: call for name, call in ENTRIES.items() if name != "migrate"}
    for name, call in {**entries, "freeze": fxqfix.freeze}.items():
        with pytest.raises(UncalibratedError):
            call(model)
        assert name
    found = {f.site for f in fxqfix.lint(model).findings if f.code == "uncalibrated"}
    assert {"_0.weight", "_3.weight"} <= found
    fxqfix.inspect(model)


def test_a_converted_model_is_left_alone() -> None:
    with quantized_engine("fbgemm"), quiet():
        converted = convert_fx(copy.deepcopy(prepared(net())))
    assert len(fxqfix.extract_parameters(converted).ops) == 4

"""Whole models: every code of every site, on every engine; and what emulate refuses."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.nn import quantizable as nnqa
from torch.ao.nn import quantized as nnq
from torch.ao.quantization import (
    default_weight_observer,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
)
from torch.ao.quantization.fx.custom_config import ConvertCustomConfig, PrepareCustomConfig
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import fxqfix
from fxqfix._torch import quantized_engine, quiet
from fxqfix.dialects.weights import WeightView
from fxqfix.engines import Call, row_of
from fxqfix.engines.dynamic import build_dynamic_linear
from fxqfix.errors import DialectError, UnknownNameError, UnsupportedError
from fxqfix.qparams import QParams
from tests.engines.harness import ENGINES
from tests.engines.nets import NETS, SHAPES


class Record(fx.Interpreter):
    """Keeps the codes of every node that carries them."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.codes: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n.op == "get_attr":
            return found
        if isinstance(found, Tensor) and not found.is_floating_point():
            codes = found.int_repr() if found.is_quantized else found
            self.codes[n.name.removeprefix("emulated_")] = codes.clone()
        return found


def _data(name: str, gain: float = 1.0, seed: int = 1) -> Tensor:
    shape = SHAPES.get(name, (4, 3, 16, 16))
    return gain * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def converted(name: str, engine: str) -> fx.GraphModule:
    """A calibrated model, its BatchNorms stirred, converted by torch."""
    torch.manual_seed(0)
    net = NETS[name]().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    with quantized_engine(engine), quiet():
        mapping = get_default_qconfig_mapping(engine)
        if name == "UNet":  # no engine but qnnpack packs per-channel transposed weights
            observer = default_weight_observer
            transposed = mapping.global_qconfig._replace(weight=observer)
            mapping.set_object_type(nn.ConvTranspose2d, transposed)
        observed, quantized = PrepareCustomConfig(), ConvertCustomConfig()
        observed.set_float_to_observed_mapping(nn.LSTM, nnqa.LSTM)
        quantized.set_observed_to_quantized_mapping(nnqa.LSTM, nnq.LSTM)
        prepared = prepare_fx(net, mapping, (_data(name),), prepare_custom_config=observed)
        prepared(_data(name))
        return convert_fx(prepared, convert_custom_config=quantized)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETS)
def test_every_code_of_every_site(name: str, engine: str) -> None:
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this torch has no engine {engine}")
    model = converted(name, engine)
    with quantized_engine(engine), torch.no_grad(), quiet():
        emulated = fxqfix.emulate(model)
        for gain in (1.0, 2.0):
            x = _data(name, gain)
            kernels, ours = Record(model), Record(emulated)
            assert torch.equal(kernels.run(x), ours.run(x))
            assert kernels.codes.keys() == ours.codes.keys()
            assert len(ours.codes) > 4
            for site, codes in kernels.codes.items():
                assert torch.equal(codes, ours.codes[site]), site


def test_nothing_is_perturbed() -> None:
    model, x = converted("Residual", "qnnpack"), _data("Residual")
    with quantized_engine("qnnpack"), torch.no_grad():  # add asks for the engine when it runs
        code, wanted = model.code, model(x)
        given, state = x.clone(), torch.get_rng_state()
        fxqfix.emulate(model)(x)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(x, given)
        assert model.code == code
        assert torch.equal(model(x), wanted)


def test_it_needs_no_engine() -> None:
    """No quantized tensor and no quantized op is left."""
    model, x = converted("Residual", "fbgemm"), _data("Residual")
    emulated = fxqfix.emulate(model, engine="fbgemm")
    wanted = emulated(x)
    assert "quantized." not in emulated.code
    with quantized_engine("qnnpack"):
        assert torch.equal(emulated(x), wanted)


@pytest.mark.parametrize("first", [True, False])
def test_ties_follow_the_rule_that_a_call_carries(first: bool) -> None:
    """Wherever the emulated model runs: that of the build that made it."""
    grid, ties = QParams(1.0, 1, 0, 255, torch.quint8), torch.tensor([0.5, 1.5, 2.5])
    call = Call("q", "onednn", "quantize", output=grid, point_first=first)
    build = row_of(call).build
    assert build is not None
    assert build(call)(ties).tolist() == ([2, 2, 4] if first else [1, 3, 3])
    weight = WeightView(
        torch.ones(1, 1, dtype=torch.int8), replace(grid, zero_point=0, dtype=torch.qint8)
    )
    call = Call("fc", "qnnpack", "linear_dynamic", weight=weight, point_first=first)
    found = build_dynamic_linear(call)(torch.tensor([[-1.0], [0.5], [1.5], [254.0]]))
    assert found.flatten().tolist() == ([-1, 1, 1, 254] if first else [-1, 0, 2, 254])


def test_unknown_names() -> None:
    model = converted("MLP", "fbgemm")
    with pytest.raises(UnknownNameError, match="there is no engine 'vnnpack'"):
        fxqfix.emulate(model, engine="vnnpack")
    with pytest.raises(UnknownNameError, match="there is no isa 'sse'"):
        fxqfix.emulate(model, engine="fbgemm", isa="sse")


def test_only_int8_models() -> None:
    with pytest.raises(DialectError, match="only int8 models"):
        fxqfix.emulate(fxqfix.to_decomposed(_prepared()), engine="fbgemm")


def test_a_model_is_copied_for_its_own_engine() -> None:
    """fbgemm, the engine in force, can't pack what qnnpack has packed here."""
    x = _data("Residual")
    with quantized_engine("qnnpack"), quiet():
        mapping = get_default_qat_qconfig_mapping("onednn")  # per channel
        net = nn.Sequential(nn.ConvTranspose2d(3, 3, 2)).train()
        prepared = prepare_qat_fx(net, mapping, (x,))
        prepared(x)
        model = convert_fx(prepared.eval())
        wanted = model(x)
    assert torch.equal(fxqfix.emulate(model, engine="qnnpack")(x), wanted)


def test_a_model_of_another_engine() -> None:
    with pytest.raises(UnsupportedError, match="packed for qnnpack"):
        fxqfix.emulate(converted("MLP", "qnnpack"), engine="fbgemm")


def _prepared() -> fx.GraphModule:
    x = _data("MLP")
    prepared = prepare_fx(NETS["MLP"]().eval(), get_default_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    return prepared

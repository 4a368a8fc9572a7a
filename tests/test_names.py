"""No crash without a name: a result, or an error that says what was met and what to do."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.ao import quantization as tq
from torch.ao.quantization.fx.custom_config import ConvertCustomConfig, PrepareCustomConfig
from torch.ao.quantization.quantize_fx import convert_fx

import fxqfix
from fxqfix.errors import (
    DialectError,
    FxqfixError,
    ModelRunError,
    PassError,
    UnsupportedError,
)
from fxqfix.flows.convert import convert_by_torch
from tests.odd_models import MODELS, Holder, Made, by_fx, perceptron, rows
from tests.states import fingerprint

pytestmark = pytest.mark.filterwarnings("ignore")


@functools.cache
def made(kind: str) -> Made:
    """A model of the table; tests leave it as it is."""
    if "pt2e" in kind or "torchao" in kind:
        pytest.importorskip("torchao")
    return MODELS[kind]()


def _repaired(prepared: nn.Module, data: list[Any]) -> Any:
    converted = convert_by_torch(prepared)
    return fxqfix.repair(prepared=prepared, converted=converted, data=data)


def _outcomes(kind: str, path: Path) -> dict[str, str]:
    """What each function says of a model: "" for a result."""
    model, data = made(kind)
    calls = {
        "inspect": lambda: str(fxqfix.inspect(model)),
        "lint": lambda: str(fxqfix.lint(model, engine="fbgemm")),
        "freeze": lambda: fxqfix.freeze(model),
        "to_decomposed": lambda: fxqfix.to_decomposed(model),
        "to_int8": lambda: fxqfix.to_int8(model, engine="fbgemm"),
        "compare": lambda: str(fxqfix.compare(model, None, data, engine="fbgemm")),
        "repair": lambda: _repaired(model, data),
        "certify": lambda: str(fxqfix.certify(model, "export", data)),
        "migrate": lambda: str(fxqfix.migrate(model, data, path / "model.pt2")),
        "extract_parameters": lambda: fxqfix.extract_parameters(model),
    }
    return {name: _said(call) for name, call in calls.items()}


def _said(call: Callable[[], Any]) -> str:
    """The message of an error that has a name; "" without one."""
    try:
        call()
    except FxqfixError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", MODELS)
def test_a_result_or_a_name(kind: str, tmp_path: Path) -> None:
    before = None if "torchao" in kind else fingerprint(made(kind)[0])  # its tensors give no bytes
    for name, said in _outcomes(kind, tmp_path).items():
        assert not said or "To do:" in said or "Expected:" in said, name
    assert before is None or fingerprint(made(kind)[0]) == before


@pytest.mark.parametrize("kind", ["compiled", "parallel", "averaged", "held", "held-compiled"])
def test_what_wraps_a_model_is_taken_off(kind: str, tmp_path: Path) -> None:
    assert not any(_outcomes(kind, tmp_path).values())
    (model, data), inner = made(kind), fxqfix.dialects.unwrapped(made(kind)[0])
    with torch.no_grad():
        wanted = fxqfix.freeze(model)(data[0])
        assert torch.equal(fxqfix.to_decomposed(model)(data[0]), wanted)
    if not kind.startswith("held"):
        report = fxqfix.compare(inner, None, data, engine="fbgemm")
        assert fxqfix.compare(model, None, data, engine="fbgemm").rows == report.rows


def test_graphs_of_pt2e_are_converted_where_they_are_held() -> None:
    model, data = made("int32-pt2e")
    held = Holder(copy.deepcopy(model))
    report = fxqfix.compare(held, None, data)
    assert {"relu_default", "linear_default"} <= {row.name for row in report.rows}
    assert type(fxqfix.freeze(held)) is Holder


@pytest.mark.parametrize(
    ("kind", "call", "said"),
    [
        ("channels-eager", "to_int8", "observed per channel"),
        ("weight-conv", "to_int8", "weight is no parameter"),
        ("placeholder", "to_int8", "placeholder for torch.quint8 (PlaceholderObserver)"),
        ("float16", "inspect", "torch prepared it: no op of it is observed"),
        ("noop-eager", "compare", "(NoopObserver)"),
        ("recorder", "to_int8", "(RecordingObserver)"),
        ("tells-none", "to_int8", "gives NoneType, no scale and zero point"),
        ("tells-nothing", "to_decomposed", "no scale and zero point"),
        ("raises", "to_decomposed", "calculate_qparams raises RuntimeError: boom"),
        ("float8-pt2e", "extract_parameters", "values of torch.float8_e4m3fn, which are no"),
        ("qint32-eager", "compare", "here the converted model raises"),
        ("equalized", "freeze", "prepared for equalization"),
        ("equalized", "compare", "prepare without _equalization_config"),
        ("dynamic-fx", "to_decomposed", "dynamic (PlaceholderObserver)"),
        ("dynamic-eager", "compare", "quantize_dynamic"),
        ("torchao-weights", "lint", "torchao's quantize_"),
        ("torchao-qat", "freeze", "FakeQuantizedLinear of torchao.quantization.qat"),
        ("channels-pt2e", "to_int8", "PT2E models have no conversion to torch's int8 kernels"),
    ],
)
def test_the_reason_is_named(kind: str, call: str, said: str, tmp_path: Path) -> None:
    assert said in _outcomes(kind, tmp_path)[call]


@pytest.mark.parametrize("kind", ["channels-fx", "channels-qat", "dynamic-fx", "bag", "bag-4bit"])
def test_what_is_converted_by_hand_is_compared(kind: str) -> None:
    prepared, data = made(kind)
    torch.backends.quantized.engine = "fbgemm"
    converted = convert_fx(copy.deepcopy(prepared))
    assert fxqfix.inspect(converted).sites
    report = fxqfix.compare(prepared, converted, data)
    assert report.rows
    assert not [
        row.name for row in report.rows if row.kind != "output" and row.causes.get("unexplained")
    ]
    said = [p for row in report.rows for p in row.problems]
    assert all("quantizes in its kernel" in problem for problem in said)  # what it does: not judged
    assert report.verdict == "not judged" or not said


def test_per_channel_activations_equal_their_conversion() -> None:
    prepared, data = made("channels-qat")
    model = fxqfix.to_int8(prepared, engine="fbgemm")
    with torch.no_grad():
        assert torch.equal(model(data[0]), fxqfix.freeze(prepared)(data[0]))
    sites = fxqfix.inspect(model).sites
    assert [s.used.axis for s in sites if s.kind == "activation" and s.used] == [1, 1, 1]


@pytest.mark.parametrize("kind", ["bag", "bag-4bit", "bag-eager"])
def test_bags_without_offsets_are_emulated(kind: str) -> None:
    prepared, (indices,) = made(kind)
    torch.backends.quantized.engine = "fbgemm"
    copied = copy.deepcopy(prepared)
    converted = convert_fx(copied) if isinstance(copied, fx.GraphModule) else tq.convert(copied)
    assert torch.equal(fxqfix.emulate(converted, engine="fbgemm")(indices), converted(indices))


def test_qint32_values_ask_for_no_table() -> None:
    model = fxqfix.to_int8(made("qint32-eager")[0], engine="fbgemm")
    assert fxqfix.inspect(model).sites


class _Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(8, 6), nn.Linear(6, 4)

    def forward(self, x: Any, h: Any, c: Any) -> Any:
        return self.fc(self.lstm(x, (h, c))[0])


def test_lstms_of_the_users_own_parts() -> None:
    from torch.ao.quantization.fx import lstm_utils

    x, h, c = torch.randn(3, 2, 8), torch.zeros(1, 2, 6), torch.zeros(1, 2, 6)

    class Observed(torch.ao.nn.quantizable.LSTM):
        @classmethod
        def from_float(cls, lstm: Any) -> Any:  # type: ignore[override]
            wide = tq.MinMaxObserver.with_args(dtype=torch.quint8)
            return lstm_utils._get_lstm_with_individually_observed_parts(
                float_lstm=lstm, example_inputs=(x, (h, c)), hidden_state_obs_ctr=wide
            )

    class Quantized(torch.ao.nn.quantized.LSTM):
        @classmethod
        def from_observed(cls, lstm: Any) -> Any:
            return lstm_utils._get_reference_quantized_lstm_module(lstm)

    custom = PrepareCustomConfig().set_float_to_observed_mapping(nn.LSTM, Observed)
    mapping = tq.get_default_qconfig_mapping("fbgemm")
    prepared, data = by_fx(_Cells(), mapping, x, h, c, prepare_custom_config=custom)
    name = torch.ao.nn.quantizable.LSTM
    config = ConvertCustomConfig().set_observed_to_quantized_mapping(name, Quantized)
    torch.backends.quantized.engine = "fbgemm"
    converted = convert_fx(copy.deepcopy(prepared), convert_custom_config=config)
    assert fxqfix.inspect(converted).site("getitem_1").used.axis is None
    report = fxqfix.compare(prepared, converted, data)
    assert "fc" in {row.name for row in report.rows}
    for call in (
        lambda: fxqfix.extract_parameters(converted),
        lambda: fxqfix.to_decomposed(converted, ranges_from=prepared),
        lambda: fxqfix.to_int8(prepared, engine="fbgemm"),
        lambda: fxqfix.repair(prepared=prepared, converted=converted, data=data),
    ):
        with pytest.raises((UnsupportedError, PassError), match="To do"):
            call()


def test_subclasses_of_lstm_convert_as_their_base() -> None:
    prepared, data = made("lstm-eager")
    report = fxqfix.compare(prepared, None, data, engine="fbgemm")
    assert report.coverage.unsupported
    assert fxqfix.to_int8(prepared, engine="fbgemm")(data[0]).shape == (3, 2, 6)


def test_an_observer_that_keeps_a_forward_is_named() -> None:
    torch.manual_seed(0)
    from torch.ao.quantization.quantize_fx import prepare_fx

    mapping = tq.QConfigMapping().set_global(tq.default_debug_qconfig)
    prepared = prepare_fx(perceptron(), mapping, (rows(),))
    prepared(rows())  # with gradients: the recorder keeps the values' history
    for call in (fxqfix.freeze, lambda m: fxqfix.compare(m, None, [rows()])):
        with pytest.raises(UnsupportedError, match=r"'tensor_val' of RecordingObserver.*no_grad"):
            call(prepared)
    assert fxqfix.inspect(prepared).sites


def test_who_raises_is_said() -> None:
    prepared, data = made("qint32-eager")
    with pytest.raises(ModelRunError, match="here the converted model raises"):
        fxqfix.compare(prepared, None, data, engine="fbgemm")
    usual, _ = made("averaged")
    with pytest.raises(ModelRunError, match="each batch has to be what the model's forward takes"):
        fxqfix.compare(usual, None, [torch.ones(4, 9)], engine="fbgemm")


def test_other_tools_are_named_by_their_package() -> None:
    from fxqfix.dialects import check_tool

    kind = type("QuantLinear", (nn.Linear,), {"__module__": "brevitas.nn.quant_linear"})
    with pytest.raises(DialectError, match=r"by brevitas.*QuantLinear of brevitas.nn"):
        check_tool(nn.Sequential(kind(2, 2)), "lint")


def test_a_computed_weight_is_no_other_checkpoint() -> None:
    """The parameter that it is computed from is not what the kernel was given."""
    prepared, data = made("weight-computed")
    for model in (prepared, fxqfix.freeze(prepared)):
        report = fxqfix.compare(model, None, data, engine="fbgemm")
        assert "other-weights" not in report.causes
        assert report.verdict != "ok"
        assert "linear.weight" in {left.name for left in report.coverage.unpaired}


@pytest.mark.parametrize("kind", ["chunk-eager", "split-eager", "unbind-eager"])
def test_ops_that_return_several_values_are_recomputed(kind: str) -> None:
    prepared, data = made(kind)
    report = fxqfix.compare(prepared, None, data, engine="fbgemm")
    assert not [problem for row in report.rows for problem in row.problems]
    assert not report.unexplained


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()

    def forward(self, x: Any) -> Any:
        return self.act(self.conv(x))


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = _Block(), nn.Conv2d(4, 2, 3)

    def forward(self, x: Any) -> Any:
        return self.head(self.stem(x))


def test_sites_of_a_loaded_program_keep_their_modules(tmp_path: Path) -> None:
    mapping = tq.get_default_qconfig_mapping("fbgemm")
    prepared, data = by_fx(_Blocks(), mapping, torch.randn(2, 3, 8, 8))
    assert fxqfix.migrate(prepared, data, tmp_path / "model.pt2").ok
    loaded = torch.export.load(tmp_path / "model.pt2")
    found = fxqfix.inspect(loaded)
    assert [s.module for s in found if s.kind == "activation"] == ["", "stem.conv", "head"]
    assert [s.module for s in found if s.kind == "weight"] == ["stem.conv", "head"]
    assert found.site("stem.conv").op == "conv2d_relu"

"""Bad input: one clear error that names what, where and what to do; and nothing is changed."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import (
    convert_fx,
    convert_to_reference_fx,
    prepare_fx,
    prepare_qat_fx,
)

import fxqfix
from fxqfix.errors import (
    DataError,
    DeviceError,
    DialectError,
    FxqfixError,
    MissingDependencyError,
    ModelRunError,
    NonFiniteError,
    OptionError,
    PairingError,
    RangeUnknownError,
    TraceError,
    UncalibratedError,
    UnknownNameError,
    UnsupportedError,
)
from fxqfix.report import Report
from tests.faults.injectors import SHAPE, data, trained
from tests.states import fingerprint


def _calibrated(net: nn.Module | None = None, *, run: bool = True) -> fx.GraphModule:
    x = torch.randn(4, 8)
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU()) if net is None else net
    prepared = prepare_fx(net.eval(), get_default_qconfig_mapping("fbgemm"), (x,))
    if run:
        prepared(x)
    return prepared


def _refused(
    kind: type[FxqfixError], builtin: type[Exception], act: Callable[[], Any], *models: nn.Module
) -> str:
    """Run something that must be refused; returns the message."""
    before = [fingerprint(model) for model in models]
    engine, state = torch.backends.quantized.engine, torch.get_rng_state()
    with pytest.raises(kind) as caught:
        act()
    assert isinstance(caught.value, builtin)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.quantized.engine == engine
    assert [fingerprint(model) for model in models] == before
    message = str(caught.value)
    assert "\n" not in message.strip()
    return message


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_not_traceable() -> None:
    model = Branching()
    message = _refused(TraceError, TypeError, lambda: fxqfix.trace(model), model)
    assert "trace: FX can't trace Branching" in message
    assert "To do:" in message


def test_not_a_module() -> None:
    model: Any = "resnet18"
    assert "Found: str" in _refused(TraceError, TypeError, lambda: fxqfix.inspect(model))


def test_a_float_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    for act in (fxqfix.inspect, fxqfix.freeze, fxqfix.to_decomposed):
        message = _refused(DialectError, TypeError, lambda act=act: act(model), model)
        assert "To do:" in message


def test_models_that_do_not_belong_together() -> None:
    prepared = trained()
    other = convert_fx(_calibrated())
    message = _refused(
        PairingError, ValueError, lambda: fxqfix.compare(prepared, other, data()), prepared, other
    )
    assert "next to no site in common" in message


def test_weights_of_another_shape() -> None:
    prepared = _calibrated()
    other = convert_fx(_calibrated(nn.Sequential(nn.Linear(8, 6), nn.ReLU())))
    batch = torch.randn(4, 8)
    message = _refused(
        PairingError,
        ValueError,
        lambda: fxqfix.compare(prepared, other, [batch]),
        prepared,
        other,
    )
    assert "site '_0.weight'" in message
    assert "(6, 8)" in message
    assert "(4, 8)" in message


def test_swapped_arguments() -> None:
    prepared = trained()
    converted = convert_fx(copy.deepcopy(prepared))
    message = _refused(
        PairingError,
        ValueError,
        lambda: fxqfix.compare(converted, prepared, data()),
        prepared,
        converted,
    )
    assert "swapped" in message
    assert "compare(prepared, converted, data)" in message


def test_data_on_another_device() -> None:
    prepared = trained()
    batch = torch.empty(SHAPE, device="meta")
    act = lambda: fxqfix.compare(prepared, fxqfix.to_decomposed(prepared), [batch])  # noqa: E731
    message = _refused(DeviceError, RuntimeError, act, prepared)
    assert "batch on meta" in message
    assert "cpu" in message


@pytest.mark.parametrize("empty", [[], iter(()), (b for b in ())])
def test_empty_data(empty: Any) -> None:
    prepared = trained()
    message = _refused(
        DataError, ValueError, lambda: fxqfix.compare(prepared, None, empty), prepared
    )
    assert "no batch" in message


def test_data_that_is_no_iterable() -> None:
    prepared = trained()
    number: Any = 3
    message = _refused(
        DataError, ValueError, lambda: fxqfix.compare(prepared, None, number), prepared
    )
    assert "Found: int" in message


def test_data_that_the_model_rejects(capfd: pytest.CaptureFixture[str]) -> None:
    prepared = trained()
    batches = [data()[0], torch.randn(2, 5)]
    message = _refused(
        ModelRunError, RuntimeError, lambda: fxqfix.compare(prepared, None, batches), prepared
    )
    assert "batch 1" in message
    assert "(2, 5)" in message
    assert capfd.readouterr().err == ""  # FX prints a trace of its own unless it is kept from it


def test_never_calibrated() -> None:
    prepared = _calibrated(run=False)
    x = torch.randn(4, 8)
    for act in (
        lambda: fxqfix.compare(prepared, None, [x]),
        lambda: fxqfix.freeze(prepared),
        lambda: fxqfix.to_decomposed(prepared),
    ):
        message = _refused(UncalibratedError, ValueError, act, prepared)
        assert "never saw data" in message
        assert "calibration" in message
    assert not fxqfix.inspect(prepared).site("input_1").calibrated


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_data(value: float) -> None:
    prepared = trained()
    batch = data()[0].clone()
    batch[0, 0, 0, 0] = value
    message = _refused(
        NonFiniteError,
        ValueError,
        lambda: fxqfix.compare(prepared, None, [data()[0], batch]),
        prepared,
    )
    assert "batch 1" in message
    assert "1 of 1536 values" in message


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_qparams(value: float) -> None:
    prepared: Any = fxqfix.freeze(trained())
    prepared.activation_post_process_0.scale.fill_(value)
    for act in (
        lambda: fxqfix.inspect(prepared),
        lambda: fxqfix.compare(prepared, None, data()),
        lambda: fxqfix.to_decomposed(prepared),
    ):
        message = _refused(NonFiniteError, ValueError, act, prepared)
        assert "activation_post_process_0" in message or "site 'x'" in message


def test_a_converted_model_without_ranges() -> None:
    converted = convert_fx(copy.deepcopy(trained()))
    message = _refused(
        RangeUnknownError, ValueError, lambda: fxqfix.to_decomposed(converted), converted
    )
    assert "ranges_from=" in message


def test_unknown_engine() -> None:
    prepared = trained()
    message = _refused(
        UnknownNameError,
        KeyError,
        lambda: fxqfix.compare(prepared, None, data(), engine="tpu"),
        prepared,
    )
    assert "'tpu'" in message
    assert "fbgemm" in message


def test_unknown_site_and_row() -> None:
    prepared = trained()
    report = fxqfix.compare(prepared, fxqfix.to_decomposed(prepared), data()[:1])
    for act in (lambda: report.row("steem"), lambda: fxqfix.inspect(prepared).site("steem")):
        assert "stem" in _refused(UnknownNameError, KeyError, act, prepared)


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    prepared = trained()
    report = fxqfix.compare(prepared, fxqfix.to_decomposed(prepared), data()[:1])
    monkeypatch.setitem(sys.modules, "pandas", None)
    message = _refused(MissingDependencyError, ImportError, report.to_pandas)
    assert "pandas" in message
    assert "pip install" in message


def test_every_error_is_a_builtin_too() -> None:
    import fxqfix.errors as errors

    for name in errors.__all__:
        kind = getattr(errors, name)
        others = [b for b in kind.__mro__ if b.__module__ == "builtins"]
        assert issubclass(kind, FxqfixError)
        assert name == "FxqfixError" or others[0] not in (Exception, BaseException), name


def test_batches_without_values_are_not_equal() -> None:
    prepared, nothing = _calibrated(), torch.empty(0, 8)
    for where, act in {
        "compare": lambda: fxqfix.compare(prepared, None, [nothing, nothing]),
        "certify, route export": lambda: fxqfix.certify(prepared, "export", [nothing]),
    }.items():
        message = _refused(DataError, ValueError, act, prepared)
        assert message.startswith(f"{where}: the batches hold no values")
    report = fxqfix.compare(prepared, None, [nothing, torch.randn(4, 8)])
    assert report.batches == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_golden_vectors_of_non_finite_inputs(value: float) -> None:
    prepared, x = _calibrated(), torch.full((1, 8), value)
    message = _refused(NonFiniteError, ValueError, lambda: fxqfix.golden_vectors(prepared, x))
    assert message.startswith("golden_vectors: the data holds NaN or inf")


def test_repair_and_data() -> None:
    prepared = _calibrated()
    converted = convert_fx(copy.deepcopy(prepared))
    for given, found in ((3, "int"), ("x.pt", "str")):
        message = _refused(DataError, ValueError, lambda d=given: _repair(converted, prepared, d))
        assert message.startswith("repair: data is not an iterable of batches")
        assert f"Found: {found}." in message
    message = _refused(
        ModelRunError, RuntimeError, lambda: _repair(converted, prepared, [torch.ones(4, 9)])
    )
    assert message.startswith("repair, batch 0: the models can't run this batch")


def _repair(converted: nn.Module, prepared: nn.Module, batches: Any) -> Any:
    return fxqfix.repair(prepared, converted, data=batches)


def test_batches_that_are_no_tensors_are_named_by_their_types() -> None:
    prepared = _calibrated()
    for act in (
        lambda: fxqfix.compare(prepared, None, ["x"]),
        lambda: fxqfix.certify(prepared, "export", ["x"]),
        lambda: fxqfix.golden_vectors(prepared, "x"),
    ):
        message = _refused(ModelRunError, RuntimeError, act, prepared)
        assert "Found: arguments of types str." in message


class _Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Any, unused: Any = None, y: Any = None) -> Any:
        return self.a(x) - self.b(y)


def test_keywords_around_an_input_with_a_default() -> None:
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    prepared = prepare_fx(_Optional().eval(), get_default_qconfig_mapping("fbgemm"), (x, None, y))
    prepared(x, None, y)
    certificate = fxqfix.certify(prepared, "export", [{"y": y, "x": x}])
    assert certificate.exact
    assert not certificate.unchecked
    golden = fxqfix.golden_vectors(prepared, {"y": y, "x": x})
    assert torch.equal(golden.output_of("y"), y)
    for batch, said in (({"x": x, "z": y}, "['z']"), ({"y": y}, "the inputs ['x'] are missing")):
        message = _refused(
            ModelRunError,
            RuntimeError,
            lambda b=batch: fxqfix.certify(prepared, "export", [b]),
            prepared,
        )
        assert said in message


class _Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Any) -> Any:
        return self.fc(x).chunk(2, 1)


def test_outputs_that_are_no_tensors_are_refused_by_certify() -> None:
    prepared = _calibrated(_Halves())
    message = _refused(
        UnsupportedError, TypeError, lambda: fxqfix.certify(prepared, "export", [torch.ones(4, 8)])
    )
    assert "Found: chunk, a tuple" in message


def _stranger(kind: str) -> tuple[Any, type[FxqfixError], type[Exception], str]:
    net = nn.Sequential(nn.Linear(8, 4))
    if kind == "lambda":
        return (lambda x: x), TraceError, TypeError, "not a module. Found: function"
    if kind == "class":
        return nn.Linear, TraceError, TypeError, "pass an instance, not the class Linear"
    if kind == "state dict":
        return net.state_dict(), TraceError, TypeError, "load the weights into a module"
    if kind == "scripted":
        return torch.jit.script(net), TraceError, TypeError, "that torch.jit.script"
    if kind == "path":
        return "model.pt2", TraceError, TypeError, "torch.export.load(path)"
    return _calibrated().to("meta"), DeviceError, RuntimeError, "model.to_empty(device='cpu')"


@pytest.mark.parametrize("kind", ["lambda", "class", "state dict", "scripted", "path", "meta"])
def test_models_of_no_kind(kind: str) -> None:
    with warnings.catch_warnings():  # TorchScript is deprecated; that it is still met is the point
        warnings.simplefilter("ignore", DeprecationWarning)
        model, error, builtin, said = _stranger(kind)
    for call in ("inspect", "lint", "freeze", "to_decomposed", "to_int8", "extract_parameters"):
        message = _refused(error, builtin, lambda c=call: getattr(fxqfix, c)(model))
        assert message.startswith(f"{call}: "), call
        assert said in message, call


def test_lint_counts_in_english_and_tells_scales_apart() -> None:
    torch.manual_seed(0)
    x, net = torch.rand(8, 8), nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    prepared = prepare_qat_fx(net.train(), get_default_qat_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    report = fxqfix.lint(prepared.eval(), engine="fbgemm")
    assert "3 sites: 1 error, 7 warnings, 0 info" in str(report)
    (finding,) = report.of("error")
    used, baked = (part.split("/")[0].split()[-1] for part in finding.evidence.split("/0 [")[:2])
    assert used != baked


def test_errors_name_the_call() -> None:
    prepared = _calibrated()
    message = _refused(UnknownNameError, KeyError, lambda: fxqfix.lint(prepared, engine="cuda"))
    assert message.startswith("lint: there is no engine 'cuda'")
    message = _refused(
        UnknownNameError,
        KeyError,
        lambda: fxqfix.migrate(prepared, [torch.ones(4, 8)], "m.pt2", route="tflite"),
    )
    assert message.startswith("migrate: there is no route 'tflite'")


def test_a_question_ends_a_sentence() -> None:
    error = FxqfixError("swapped?", found="one.", remedy="turn")
    assert str(error) == "swapped? Found: one. To do: turn."


def test_ranges_from_of_another_kind() -> None:
    converted = convert_fx(_calibrated())
    message = _refused(
        DialectError,
        TypeError,
        lambda: fxqfix.to_decomposed(converted, ranges_from="fbgemm"),
        converted,
    )
    assert message.startswith("to_decomposed: ranges_from declares no ranges. Found: str.")


def test_a_report_that_is_no_file() -> None:
    message = _refused(DataError, ValueError, lambda: fxqfix.Report.from_json("no_such.json"))
    assert message.count("from_json") == 1


@pytest.mark.parametrize("kind", ["int8", "reference"])
def test_ranges_from_a_converted_model(kind: str) -> None:
    """It holds none either: container ranges would be taken for declared ones."""
    model = _calibrated()
    converted = convert_fx(copy.deepcopy(model))
    other = converted if kind == "int8" else convert_to_reference_fx(copy.deepcopy(model))
    message = _refused(
        RangeUnknownError,
        ValueError,
        lambda: fxqfix.to_decomposed(converted, ranges_from=other),
        converted,
    )
    assert "does not hold quant_min / quant_max either" in message
    held = fxqfix.to_int8(model, engine="fbgemm")
    assert fxqfix.to_decomposed(converted, ranges_from=held) is not None


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "3"])
def test_counts(wrong: Any) -> None:
    model = _calibrated()
    report = fxqfix.compare(model, None, [torch.ones(4, 8)])
    asked = {
        "Report.worst": lambda: report.worst(wrong),
        "Report.table": lambda: report.table(limit=wrong),
        "LintReport.table": lambda: fxqfix.lint(model).table(limit=wrong),
        "compare": lambda: fxqfix.compare(model, None, [torch.ones(4, 8)], culprits=wrong),
    }
    for where, call in asked.items():
        message = _refused(OptionError, ValueError, call, model)
        assert message.startswith(f"{where}: ")
        assert repr(wrong) in message


@pytest.mark.parametrize("other", [None, 3, "report.json"])
def test_merge_with_what_is_no_report(other: Any) -> None:
    message = _refused(PairingError, ValueError, lambda: Report(rows=()).merge(other))
    assert message.startswith("Report.merge: only a report can be merged")

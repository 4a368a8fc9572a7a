"""Code that a trace does not show: hooks, forwards put on a model, parametrized weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import fxqfix
from fxqfix._torch import quantized_engine, quiet
from fxqfix.errors import UnsupportedError

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def prepared(net: nn.Module | None = None) -> Any:
    torch.manual_seed(0)
    with quiet():
        mapping = tq.get_default_qconfig_mapping("fbgemm")
        model = prepare_fx((net or Net()).eval(), mapping, (X,))
        model(X)
    return model


def _hook(model: Any) -> None:
    model.register_forward_hook(lambda module, inputs, output: output + 1)


def _pre_hook(model: Any) -> None:
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def _instance(model: Any) -> None:
    own = model.forward
    model.forward = lambda x: own(x) + 1


def _class(model: Any) -> None:
    own = type(model).forward
    type(model).forward = lambda self, x: own(self, x) + 1


PLANTS = (_hook, _pre_hook, _instance, _class)


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("convert", [convert_fx, fxqfix.to_decomposed])
def test_a_converted_model_with_code_around_it(
    plant: Callable[[Any], None], convert: Callable[[Any], Any]
) -> None:
    frozen = fxqfix.freeze(prepared())
    with quiet():
        converted = convert(copy.deepcopy(frozen))
    assert fxqfix.compare(frozen, converted, [X], engine="fbgemm").verdict == "ok"
    plant(converted)
    assert not torch.equal(frozen(X), converted(X))
    report = fxqfix.compare(frozen, converted, [X], engine="fbgemm")
    assert report.verdict != "ok"
    assert not report.exact
    assert any("no reader opens it" in reason for reason in report.left_out)


@pytest.mark.parametrize("path", ["", "b"])
def test_hooks_of_the_trained_model(path: str) -> None:
    model = prepared()
    _hook(model.get_submodule(path))
    for route in ("export", "int8:fbgemm"):
        assert fxqfix.certify(model, route, [X]).verdict != "ok"
    assert fxqfix.compare(model, None, [X], engine="fbgemm").verdict != "ok"
    if path:
        assert fxqfix.certificate_of(fxqfix.to_int8(model, engine="fbgemm")).verdict != "ok"


@pytest.mark.parametrize("plant", [_hook, _pre_hook])
@pytest.mark.parametrize("path", ["", "b"])
def test_what_is_made_of_the_graph_refuses_hooks(plant: Callable[[Any], None], path: str) -> None:
    trained = prepared()
    converted = fxqfix.to_int8(trained, engine="fbgemm")
    flows: tuple[tuple[Callable[[Any], Any], nn.Module], ...] = (
        (lambda m: fxqfix.emulate(m, engine="fbgemm"), converted),
        (fxqfix.extract_parameters, converted),
        (lambda m: fxqfix.golden_vectors(m, X), converted),
        (lambda m: fxqfix.as_deployed(m, engine="fbgemm"), trained),
    )
    for flow, model in flows:
        with quantized_engine("fbgemm"):
            flow(model)
            hooked = copy.deepcopy(model)
            plant(hooked.get_submodule(path))
            place = f", {path or 'the model'}: .*a forward hook"
            with pytest.raises(UnsupportedError, match=place):
                flow(hooked)


def test_hooks_of_torch_are_no_code_of_the_users() -> None:
    net = nn.Sequential(tq.QuantStub(), nn.Linear(4, 4), tq.DeQuantStub()).train()
    net.qconfig = tq.get_default_qat_qconfig("fbgemm")
    with quiet():
        model = tq.prepare_qat(net)
        model(X)
    model.eval().apply(tq.disable_observer)
    assert fxqfix.certify(model, "export", [X]).verdict == "ok"
    program = torch.export.export(fxqfix.to_decomposed(model), (X,))
    assert fxqfix.certify(program, "export", [X]).verdict == "ok"


def test_parametrized_weights_are_listed() -> None:
    net = Net()
    nn.utils.parametrizations.weight_norm(net.a)
    with torch.no_grad():
        model = prepared(net)
    assert any("parametrized weights" in reason for _, reason in fxqfix.inspect(model).unsupported)
    assert fxqfix.certificate_of(fxqfix.to_int8(model, engine="fbgemm")).verdict != "ok"


def test_a_scale_that_was_moved_is_another_grid() -> None:
    frozen = fxqfix.freeze(prepared())
    with quiet():
        converted = convert_fx(copy.deepcopy(frozen))
    converted.b.scale *= 1.0001
    report = fxqfix.compare(frozen, converted, [X, 3 * X], engine="fbgemm")
    assert report.verdict == "not ok"
    assert any(fault.startswith("values on another grid at b") for fault in report.faults)


@pytest.mark.parametrize("method", ["double", "half"])
def test_an_output_of_another_dtype_is_not_exact(method: str) -> None:
    frozen = fxqfix.freeze(prepared())
    deployed = fxqfix.to_decomposed(frozen)
    output = next(n for n in deployed.graph.nodes if n.op == "output")
    with deployed.graph.inserting_before(output):
        cast = deployed.graph.call_method(method, (output.args[0],))
    output.args = (cast,)
    deployed.recompile()
    report = fxqfix.compare(frozen, deployed, [X])
    assert not report.exact
    assert report.verdict == "not ok"
    assert "where torch.float32 is due" in report.row("output 0").evidence["unexplained"]


def test_a_scaled_activation_on_qnnpack_runs() -> None:
    """Two repairs of one op: a contiguous input, and the declared grid."""
    if "qnnpack" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no engine qnnpack")

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(nn.functional.relu6(self.a(x) * 10))

    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8)
    with quiet():
        mapping = tq.get_default_qconfig_mapping("qnnpack")
        model = prepare_fx(Scaled().eval(), mapping, (x,))
        model(x)
    deployed = fxqfix.to_int8(model, engine="qnnpack")
    report = fxqfix.compare(fxqfix.freeze(model), deployed, [x, 3 * x], engine="qnnpack")
    assert report.verdict == "ok", report.reasons

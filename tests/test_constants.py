"""Parameters and buffers as operands: read, paired, held and compared in every flow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    disable_observer,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
)
from torch.ao.quantization.quantize_fx import (
    convert_fx,
    convert_to_reference_fx,
    prepare_fx,
    prepare_qat_fx,
)

import fxqfix
from fxqfix._torch import quiet

Op = Callable[[Tensor, nn.Module], Tensor]


def _gain(y: Tensor, net: Any) -> Tensor:
    return y * net.gain


def _position(y: Tensor, net: Any) -> Tensor:
    return net.position + y


def _projection(y: Tensor, net: Any) -> Tensor:
    return torch.matmul(y, net.projection)


def _token(y: Tensor, net: Any) -> Tensor:
    return torch.cat([net.token.expand(y.shape[0], -1, -1, -1), y], 2)


def _normalized(y: Tensor, net: Any) -> Tensor:
    return (y + net.mean) * net.gain


OPS = (_gain, _position, _projection, _token, _normalized)


class Net(nn.Module):
    def __init__(self, op: Op) -> None:
        super().__init__()
        self.conv, self.op = nn.Conv2d(3, 4, 1), op
        self.gain = nn.Parameter(torch.rand(1, 4, 1, 1) + 0.5)
        self.position = nn.Parameter(torch.randn(1, 4, 6, 6))
        self.projection = nn.Parameter(torch.randn(6, 6))
        self.token = nn.Parameter(torch.randn(1, 4, 1, 6))
        self.register_buffer("mean", torch.randn(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(self.conv(x), self)


def prepared(op: Op, engine: str = "fbgemm", *, qat: bool = True) -> tuple[Any, Tensor]:
    torch.manual_seed(3)
    x, net = torch.randn(4, 3, 6, 6), Net(op)
    with quiet():
        if qat:
            mapping = get_default_qat_qconfig_mapping(engine)
            model = prepare_qat_fx(net.train(), mapping, (x,))
        else:
            model = prepare_fx(net.eval(), get_default_qconfig_mapping(engine), (x,))
        model(x)
    return model.eval().apply(disable_observer), x


@pytest.mark.parametrize("qat", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_int8_pairs_all_and_equals_the_frozen_model(op: Op, qat: bool) -> None:
    model, x = prepared(op, qat=qat)
    frozen, deployed = fxqfix.freeze(model), fxqfix.to_int8(model, engine="fbgemm")
    certificate = fxqfix.certificate_of(deployed)
    assert certificate.ok, certificate.reasons
    report = fxqfix.compare(frozen, deployed, [x, 3 * x], engine="fbgemm")
    assert report.coverage.unpaired == report.coverage.unsupported == ()
    assert report.ok, report.reasons
    assert report.exact == torch.equal(frozen(3 * x), deployed(3 * x))
    kinds = [row.name for row in report.rows if row.kind == "weight" and row.op != "conv2d"]
    assert len(kinds) == {_token: 0, _normalized: 2}.get(op, 1)


@pytest.mark.parametrize("engine", ["x86", "onednn", "qnnpack"])
def test_other_engines(engine: str) -> None:
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this torch has no engine {engine}")
    model, x = prepared(_gain, engine)
    deployed = fxqfix.to_int8(model, engine=engine)
    report = fxqfix.compare(fxqfix.freeze(model), deployed, [x, 3 * x], engine=engine)
    assert report.ok, report.reasons
    assert report.row("mul.weight").converted is not None


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("convert", [convert_fx, convert_to_reference_fx])
def test_the_plain_conversion_is_paired_too(op: Op, convert: Callable[[Any], Any]) -> None:
    model, x = prepared(op)
    with quiet():
        converted = convert(copy.deepcopy(model))
    report = fxqfix.compare(model, converted, [x, 3 * x], engine="fbgemm")
    assert report.coverage.unpaired == ()
    assert report.unexplained == 0
    assert report.causes["range-lost"] > 0
    assert report.verdict == "not ok"


@pytest.mark.parametrize("op", OPS)
def test_decomposed_equals_frozen(op: Op) -> None:
    model, x = prepared(op)
    frozen, decomposed = fxqfix.freeze(model), fxqfix.to_decomposed(model)
    assert torch.equal(frozen(3 * x), decomposed(3 * x))
    assert fxqfix.compare(frozen, decomposed, [3 * x]).exact


def test_a_constant_on_ties_has_the_trained_codes() -> None:
    """The native quantize op may add the zero point first: an odd one sends a tie elsewhere."""
    model, x = prepared(_position)
    frozen = fxqfix.freeze(model)
    node = next(n for n in frozen.graph.nodes if n.op == "get_attr").users
    quantizer: Any = frozen.get_submodule(str(next(iter(node)).target))
    quantizer.scale.fill_(1.0)
    quantizer.zero_point.fill_(13)
    frozen.position.data = torch.arange(144.0).reshape(1, 4, 6, 6).fmod(40) - 12.5
    wanted = frozen(x)
    deployed = fxqfix.to_int8(frozen, engine="fbgemm")
    assert fxqfix.certificate_of(deployed).ok
    assert torch.equal(wanted, deployed(x))
    assert torch.equal(wanted, fxqfix.freeze(frozen)(x))  # no bit of the model changes

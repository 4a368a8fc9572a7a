"""Random ops that a trace baked in: every branch and every shadow draws what the converted drew."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.quantization import disable_observer, get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

import fxqfix
from fxqfix._torch import quantized_engine, quiet
from fxqfix.passes import InsertShadows

X = torch.linspace(-2, 2, 8 * 3 * 8 * 8).reshape(8, 3, 8, 8)


def stochastic_depth(x: Tensor, p: float, training: bool = True) -> Tensor:
    """As torchvision's, which is wrapped for torch.fx too."""
    if not training or p == 0.0:
        return x
    noise = torch.empty([x.shape[0], *[1] * (x.ndim - 1)], dtype=x.dtype, device=x.device)
    return x * noise.bernoulli_(1 - p).div_(1 - p)


fx.wrap("stochastic_depth")

OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "depth": lambda x: x + stochastic_depth(stochastic_depth(x, 0.3), 0.5),
    "noise": lambda x: x + torch.randn_like(x) * 0.1,
    "rrelu": lambda x: F.rrelu(x + torch.rand_like(x), training=True),
    "method": lambda x: x * torch.ones_like(x).bernoulli_(0.5),
    "dropout": lambda x: F.dropout(F.dropout(x, 0.2, True), 0.3, True),
}


class Around(nn.Module):
    """Convolutions around random ops: int8 kernels hand channels-last tensors on."""

    def __init__(self, op: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.op = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3), op

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.op(self.a(x)))


def prepared(op: str, engine: str = "fbgemm") -> Any:
    torch.manual_seed(0)
    mapping = get_default_qat_qconfig_mapping(engine)
    with quiet():
        model = prepare_qat_fx(Around(OPS[op]).train(), mapping, (X,))
        for _ in range(3):
            model(X)
    return model.eval().apply(disable_observer)


@pytest.mark.parametrize("op", OPS)
def test_a_decomposed_model_that_draws_is_exact(op: str) -> None:
    frozen = fxqfix.freeze(prepared(op))
    state = torch.get_rng_state()
    report = fxqfix.compare(frozen, fxqfix.to_decomposed(frozen), [X, X + 1])
    assert report.exact
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("flow", ["frozen", "trained"])
@pytest.mark.parametrize("op", [op for op in OPS if op != "dropout"])
def test_an_int8_model_that_draws_is_explained(op: str, flow: str) -> None:
    engine = "qnnpack" if op in ("noise", "rrelu") else "fbgemm"
    model = prepared(op, engine)
    model = fxqfix.freeze(model) if flow == "frozen" else model
    with quantized_engine(engine), quiet():
        converted = convert_fx(copy.deepcopy(model))
    state = torch.get_rng_state()
    report = fxqfix.compare(model, converted, [X, X + 1], engine=engine)
    assert report.unexplained == 0
    assert torch.equal(torch.get_rng_state(), state)
    known = {"range-lost", "upstream", "rounding", "shared-qparams", "bias-int32"}
    known |= {"requantization"} if flow == "frozen" else {"requantization", "scale-formula"}
    assert set(report.causes) <= known


@pytest.mark.parametrize("op", OPS)
def test_the_converted_model_draws_as_it_does_alone(op: str) -> None:
    frozen = fxqfix.freeze(prepared(op))
    for converted in (fxqfix.to_decomposed(frozen), convert_fx(copy.deepcopy(frozen))):
        twin = InsertShadows(frozen)(converted).graph_module
        for batch in (X, X + 1):
            state = torch.get_rng_state()
            wanted, after = converted(batch), torch.get_rng_state()
            torch.set_rng_state(state)
            assert torch.equal(twin(batch), wanted)
            assert torch.equal(torch.get_rng_state(), after)


def test_what_only_the_prepared_model_drops_is_dropout_training() -> None:
    frozen = fxqfix.freeze(prepared("dropout"))
    with quantized_engine("fbgemm"), quiet():
        converted = convert_fx(copy.deepcopy(frozen))
    report = fxqfix.compare(frozen, converted, [X], engine="fbgemm")
    assert report.causes["dropout-training"] > 1000
    assert report.unexplained == 0

"""Inspecting, comparing and shadowing leave everything bit-identical; batches too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

import fxqfix
from fxqfix.passes import InsertShadows
from tests.faults.injectors import trained
from tests.states import fingerprint

SHAPE = (4, 3, 8, 8)


class InPlace(nn.Module):
    """Everything that users do in place: inputs, activations, residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.act = nn.ReLU6(inplace=True)
        self.body = nn.Conv2d(6, 6, 1)
        self.drop = nn.Dropout(0.4)

    def forward(self, x):
        x.mul_(1.5)
        x += 0.25
        y = self.act(self.conv(x))
        z = self.body(y)
        z += y
        z = torch.relu_(z)
        return self.drop(z)


class Noisy(nn.Module):
    """A user's own leaf that draws random numbers, in eval mode too."""

    def forward(self, x):
        return x + 0.05 * torch.randn_like(x)


class WithNoise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(torch.dropout(self.conv(x), 0.3, True))


def _pair(net: nn.Module, train: bool, *, observing: bool = True) -> tuple[Any, Any]:
    torch.backends.quantized.engine = "fbgemm"
    x = torch.randn(SHAPE)
    mapping = get_default_qat_qconfig_mapping("fbgemm")
    prepared = prepare_qat_fx(net.train(), mapping, (x.clone(),))
    for _ in range(3):
        prepared(torch.randn(SHAPE))
    if not observing:
        prepared.apply(torch.ao.quantization.disable_observer)
    prepared.train(train)
    converted = convert_fx(copy.deepcopy(prepared))
    return prepared, converted.train(train)


@pytest.fixture(autouse=True)
def engine() -> Any:
    before = torch.backends.quantized.engine
    yield
    torch.backends.quantized.engine = before


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("net", [InPlace, WithNoise])
def test_models_batches_and_randomness_are_untouched(net: type[nn.Module], train: bool) -> None:
    prepared, converted = _pair(net(), train)
    batches = [torch.randn(SHAPE) for _ in range(2)]
    kept = [b.clone() for b in batches]
    before = fingerprint(prepared), fingerprint(converted)
    state = torch.get_rng_state()
    fxqfix.inspect(prepared)
    fxqfix.inspect(converted)
    fxqfix.freeze(prepared)
    fxqfix.to_decomposed(prepared)
    fxqfix.to_decomposed(converted, ranges_from=prepared)
    fxqfix.compare(prepared, converted, batches)
    fxqfix.compare(prepared, None, batches)
    InsertShadows(prepared)(converted)
    assert torch.equal(torch.get_rng_state(), state)
    assert (fingerprint(prepared), fingerprint(converted)) == before
    assert all(torch.equal(a, b) for a, b in zip(batches, kept, strict=True))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("net", [InPlace, WithNoise])
def test_outputs_are_the_same_with_and_without_shadows(net: type[nn.Module], train: bool) -> None:
    prepared, converted = _pair(net(), train)
    twin = InsertShadows(prepared)(converted).graph_module
    for _ in range(3):  # several batches: random streams go on where they left off
        x = torch.randn(SHAPE)
        state = torch.get_rng_state()
        wanted = converted(x.clone())
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        found = twin(x.clone())
        assert torch.equal(found, wanted)
        assert torch.equal(torch.get_rng_state(), after)


def test_random_numbers_are_drawn_alike_in_both_models() -> None:
    """Dropout that stays random draws the same mask in each branch: nothing differs."""
    prepared, _ = _pair(WithNoise(), False, observing=False)
    decomposed = fxqfix.to_decomposed(prepared)
    report = fxqfix.compare(fxqfix.freeze(prepared), decomposed, [torch.randn(SHAPE)])
    assert report.exact


def test_in_place_ops_cannot_corrupt_what_is_compared() -> None:
    """Rows against codes taken by hand, from models that had each tensor cloned."""
    prepared, _ = _pair(InPlace(), False, observing=False)
    frozen = fxqfix.freeze(prepared)
    converted = convert_fx(copy.deepcopy(frozen))
    x = torch.randn(SHAPE) * 1.5
    report = fxqfix.compare(frozen, converted, [x])
    taken: dict[str, dict[str, torch.Tensor]] = {"p": {}, "c": {}}

    class Taker(torch.fx.Interpreter):
        side = ""

        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                codes = value.int_repr() if value.is_quantized else value.clone()
                taken[self.side][n.name] = codes
            return value

    for side, model in (("p", frozen), ("c", converted)):
        taker = Taker(model)
        taker.side = side
        with torch.no_grad():
            taker.run(x.clone())
    checked = 0
    for own, other, _ in report.coverage.paired:
        row = report.row(own)
        if row.kind == "weight" or not row.prepared.same_grid(row.converted):
            continue  # codes of one grid against codes of another are no count of differences
        quantizer = next(
            n
            for n in frozen.graph.nodes
            if n.op == "call_module" and n.args and getattr(n.args[0], "name", "") == own
        )
        values = taken["p"][quantizer.name]
        assert isinstance(row.prepared.scale, float)
        codes = torch.round(values * (1.0 / torch.tensor(row.prepared.scale)))
        codes = (codes + row.prepared.zero_point).int()
        theirs = taken["c"].get(other)
        if theirs is None or theirs.is_floating_point():
            continue
        assert int((codes != theirs.int()).sum()) == row.cumulative.differing
        checked += 1
    assert checked >= 3


def test_the_engine_is_put_back() -> None:
    prepared = trained()
    torch.backends.quantized.engine = "fbgemm"
    fxqfix.compare(prepared, None, [torch.randn(8, 3, 8, 8)], engine="qnnpack")
    assert torch.backends.quantized.engine == "fbgemm"


def test_a_users_random_leaf_is_put_on_a_stream_of_its_own() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.noise, self.head = nn.Conv2d(3, 4, 1), Noisy(), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.head(self.noise(self.conv(x)))

    prepared, converted = _pair(Net(), False)
    twin = InsertShadows(prepared)(converted).graph_module
    x = torch.randn(SHAPE)
    state = torch.get_rng_state()
    wanted = converted(x)
    torch.set_rng_state(state)
    assert torch.equal(twin(x), wanted)

"""Inspecting, comparing and shadowing leave everything bit-identical; batches too."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx
from torch.utils.data import DataLoader

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


class Entry(nn.Module):
    """The first op writes into the input, or into a view of it."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.first = first
        self.relu6, self.conv = nn.ReLU6(inplace=True), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        if self.first == "mul_":
            x.mul_(2)
        elif self.first == "iadd":
            x += 1
        elif self.first == "relu6":
            x = self.relu6(x)
        elif self.first == "relu_":
            x = x.relu_()
        elif self.first == "clamp_":
            x.clamp_(-0.5, 0.5)
        else:
            x.flatten(1).add_(1)
        return self.conv(x) + x[:, :1]


@pytest.mark.parametrize("fake_quant", [True, False])
@pytest.mark.parametrize("first", ["mul_", "iadd", "relu6", "relu_", "clamp_", "view"])
def test_a_first_op_in_place(first: str, fake_quant: bool) -> None:
    """With fake-quants off nothing stands between the user's batch and the op that writes to it."""
    prepared, _ = _pair(Entry(first), False)
    if not fake_quant:
        prepared.apply(torch.ao.quantization.disable_fake_quant)
    converted = convert_fx(copy.deepcopy(prepared))
    batches = [torch.randn(SHAPE) for _ in range(2)]
    kept = [b.clone() for b in batches]
    before = fingerprint(prepared), fingerprint(converted)
    fxqfix.compare(prepared, converted, batches)
    fxqfix.compare(prepared, converted, batches[0])
    fxqfix.trace(prepared, batches[0])
    assert all(torch.equal(a, b) for a, b in zip(batches, kept, strict=True))
    assert (fingerprint(prepared), fingerprint(converted)) == before
    twin = InsertShadows(prepared)(converted).graph_module
    assert torch.equal(twin(batches[0].clone()), converted(batches[0].clone()))
    frozen = fxqfix.freeze(prepared)
    assert fxqfix.compare(frozen, fxqfix.to_decomposed(prepared), batches).exact
    assert all(torch.equal(a, b) for a, b in zip(batches, kept, strict=True))


class Residual(nn.Module):
    """A naive comparison that keeps references is wrong here: each value is overwritten later."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.body = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.conv(x)
        kept = y.flatten(1)
        z = self.act(y * 1)
        z.mul_(0.5)
        z += self.body(z)
        return z.flatten(1) + kept


def test_what_a_naive_comparison_would_see() -> None:
    """References kept from the converted model's forward differ from copies taken on the way."""
    prepared, _ = _pair(Residual(), False, observing=False)
    frozen = fxqfix.freeze(prepared)
    decomposed = fxqfix.to_decomposed(prepared)
    kept: dict[str, torch.Tensor] = {}
    copied: dict[str, torch.Tensor] = {}

    class Logger(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                kept[n.name], copied[n.name] = value.detach(), value.clone()
            return value

    x = torch.randn(SHAPE)
    with torch.no_grad():
        Logger(decomposed).run(x.clone())
    corrupted = [name for name in kept if not torch.equal(kept[name], copied[name])]
    assert corrupted
    assert fxqfix.compare(frozen, decomposed, [x]).exact


def test_nothing_global_is_touched() -> None:
    """Python's and NumPy's random state, grad mode, threads, default dtype, warning filters."""
    import random
    import warnings

    import numpy as np

    def everything() -> list[Any]:
        return [
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.quantized.engine,
            list(warnings.filters),
        ]

    prepared, converted = _pair(InPlace(), False)
    before = everything()
    fxqfix.inspect(prepared)
    report = fxqfix.compare(prepared, converted, [torch.zeros(SHAPE)])
    fxqfix.compare(prepared, None, [torch.zeros(SHAPE)], engine="qnnpack")
    with pytest.raises(fxqfix.FxqfixError):
        fxqfix.compare(prepared, None, [], engine="qnnpack")
    assert everything() == before
    assert report.rows


def test_gradients_and_parameters_are_untouched() -> None:
    """In the middle of a training step: .grad stays, and so does what requires it."""
    prepared, _ = _pair(InPlace(), True)
    prepared(torch.randn(SHAPE)).sum().backward()
    grads = {n: p.grad.clone() for n, p in prepared.named_parameters() if p.grad is not None}
    assert grads
    before = fingerprint(prepared)
    fxqfix.compare(prepared, fxqfix.to_decomposed(prepared), [torch.randn(SHAPE)])
    fxqfix.freeze(prepared)
    assert fingerprint(prepared) == before
    assert all(torch.equal(dict(prepared.named_parameters())[n].grad, g) for n, g in grads.items())


@pytest.mark.parametrize("name", ["ptq", "qat fused", "shared qat", "wrapper"])
def test_eager_models(name: str) -> None:
    """Their hooks, observers and modes; the user's own hooks run in nobody's model but theirs."""
    from tests.dialects.nets import EAGER, image, int8

    torch.backends.quantized.engine = "fbgemm"
    prepared = EAGER[name]()
    converted = int8(prepared)
    batches = [image(seed=3), image(seed=4)]
    kept = [b.clone() for b in batches]
    before = fingerprint(prepared), fingerprint(converted)
    fxqfix.inspect(prepared)
    fxqfix.inspect(converted)
    fxqfix.freeze(prepared)
    fxqfix.to_decomposed(prepared)
    fxqfix.compare(prepared, converted, batches)
    fxqfix.compare(prepared, None, batches)
    assert (fingerprint(prepared), fingerprint(converted)) == before
    assert all(torch.equal(a, b) for a, b in zip(batches, kept, strict=True))


@pytest.mark.parametrize("train", [False, True])
def test_every_kind_of_fake_quant_is_held_still(train: bool) -> None:
    """Observers on, in both modes: a comparison must not be a training step."""
    from torch.ao import quantization as tq

    for kind in (tq.FakeQuantize, tq.FusedMovingAvgObsFakeQuantize):
        act = kind.with_args(
            observer=tq.MovingAverageMinMaxObserver,
            quant_min=0,
            quant_max=127,
            dtype=torch.quint8,
        )
        mapping = tq.QConfigMapping().set_global(tq.QConfig(act, tq.default_fused_wt_fake_quant))
        prepared = prepare_qat_fx(InPlace().train(), mapping, (torch.randn(SHAPE),))
        prepared(torch.randn(SHAPE))
        prepared.train(train)
        before = fingerprint(prepared)
        data = [torch.randn(SHAPE) * 9 for _ in range(2)]
        first = fxqfix.compare(prepared, fxqfix.to_decomposed(prepared), data)
        assert fingerprint(prepared) == before
        assert first == fxqfix.compare(prepared, fxqfix.to_decomposed(prepared), data)


class Drawn(torch.utils.data.Dataset[torch.Tensor]):
    """Samples that are made of Python's and NumPy's random numbers."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.full(SHAPE[1:], random.random() + float(numpy.random.rand()) + i)


class Shuffled(torch.utils.data.Sampler[int]):
    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __iter__(self) -> Any:
        return iter(torch.randperm(8, generator=self.generator).tolist())

    def __len__(self) -> int:
        return 8


LOADERS: dict[str, Callable[[torch.Generator], Any]] = {
    "shuffled": lambda g: DataLoader(Drawn(), 4, shuffle=True, generator=g),
    "sampler": lambda g: DataLoader(Drawn(), 4, sampler=Shuffled(g)),
    "batch sampler": lambda g: DataLoader(
        Drawn(), batch_sampler=torch.utils.data.BatchSampler(Shuffled(g), 4, False)
    ),
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_generators_of_data_are_left_as_found(name: str) -> None:
    prepared, _ = _pair(InPlace(), True)
    decomposed = fxqfix.to_decomposed(prepared)
    generator = torch.Generator().manual_seed(7)
    data = LOADERS[name](generator)
    readers: dict[str, Callable[[], Any]] = {
        "compare": lambda: fxqfix.compare(prepared, decomposed, data),
        "repair": lambda: fxqfix.repair(prepared, decomposed, data=data),
        "certify": lambda: fxqfix.certify(decomposed, "float64", data),
    }
    for reader, read in readers.items():
        before = generator.get_state(), random.getstate(), numpy.random.get_state()[1].tolist()
        read()
        after = generator.get_state(), random.getstate(), numpy.random.get_state()[1].tolist()
        assert torch.equal(before[0], after[0]), reader
        assert before[1:] == after[1:], reader
    first, second = (fxqfix.compare(prepared, decomposed, data) for _ in range(2))
    assert first == second  # it reads the same again


def test_generators_are_put_back_where_the_data_raises() -> None:
    generator = torch.Generator().manual_seed(7)

    class Broken(Drawn):
        def __getitem__(self, i: int) -> torch.Tensor:
            raise KeyError("no such file")

    prepared, _ = _pair(InPlace(), True)
    before = generator.get_state()
    with pytest.raises(KeyError):
        fxqfix.compare(prepared, None, DataLoader(Broken(), 4, shuffle=True, generator=generator))
    assert torch.equal(before, generator.get_state())

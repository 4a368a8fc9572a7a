"""explicit-writes: what reads an overwritten value converts to what was trained."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import fxqfix
from fxqfix._torch import quantized_engine, quiet
from fxqfix.dialects._writes import twins
from fxqfix.errors import UnknownNameError
from fxqfix.passes import ExplicitWrites, FreezeQParams, RerouteReads
from tests.faults.injectors import data, overwritten
from tests.states import fingerprint, run, same


class Written(nn.Module):
    """Any way to write in place."""

    def __init__(self, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        return self.write(x)


LOST: dict[str, Callable[[], nn.Module]] = {
    "hardswish": lambda: nn.Hardswish(inplace=True),
    "elu": lambda: nn.ELU(inplace=True),
    "F.hardswish": lambda: Written(lambda x: F.hardswish(x, inplace=True)),
    "add_": lambda: Written(lambda x: x.add_(torch.sigmoid(x))),
    "add_ scalar": lambda: Written(lambda x: x.add_(0.5)),
}
# Their int8 forms write in place too.
KEPT: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "relu_": lambda: Written(lambda x: x.relu_()),
    "F.relu6": lambda: Written(lambda x: F.relu6(x, inplace=True)),
    "hardtanh": lambda: nn.Hardtanh(-0.4, 0.4, inplace=True),
    "hardsigmoid": lambda: nn.Hardsigmoid(inplace=True),
}


def converted(model: nn.Module, engine: str = "fbgemm") -> fx.GraphModule:
    with quantized_engine(engine), quiet():
        return convert_fx(copy.deepcopy(model))


@pytest.mark.parametrize("name", LOST)
def test_what_was_lost_is_read_again(name: str) -> None:
    prepared = overwritten(LOST[name]())
    before = fingerprint(prepared)
    (x, *_) = batches = data(0.5)
    plain = FreezeQParams()(prepared).graph_module
    report = fxqfix.compare(plain, converted(plain), batches, engine="fbgemm")
    assert report.causes["inplace-lost"] > 100
    assert report.unexplained == 0

    frozen = fxqfix.freeze(prepared)
    assert fingerprint(prepared) == before
    assert same(run(plain, x), run(frozen, x))
    assert same(run(plain, x), run(fxqfix.to_decomposed(prepared), x))
    assert not ExplicitWrites()(frozen).modified
    for model in (converted(frozen), fxqfix.to_int8(prepared, engine="fbgemm")):
        again = fxqfix.compare(plain, model, batches, engine="fbgemm")
        assert "inplace-lost" not in again.causes
        assert again.unexplained == 0
        assert again.coverage.unpaired == ()
    assert "inplace-lost" not in {f.code for f in fxqfix.lint(frozen, engine="fbgemm").findings}


class Sliced(nn.Module):
    """Half of the written value by its new name, half by its old one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        old = self.conv(x)
        new = F.hardswish(old, inplace=True)
        return torch.cat([new[:, :2], old[:, 2:]], 1)


def test_a_slice_reads_what_was_lost() -> None:
    """Before Python 3.12 a slice has no hash."""
    torch.manual_seed(0)
    batches = data(0.5)
    prepared = prepare_fx(Sliced().eval(), get_default_qconfig_mapping("fbgemm"), (batches[0],))
    prepared(batches[0])
    plain = FreezeQParams()(prepared).graph_module
    report = fxqfix.compare(plain, converted(plain), batches, engine="fbgemm")
    assert report.causes["inplace-lost"] > 100
    assert report.unexplained == 0
    assert not any(row.problems for row in report.rows)


@pytest.mark.parametrize("name", LOST)
def test_the_frozen_model_s_second_call_is_the_written_value(name: str) -> None:
    """Pairs and causes are those of the model before explicit-writes, whatever is read there."""
    prepared = overwritten(LOST[name]())
    plain, frozen = FreezeQParams()(prepared).graph_module, fxqfix.freeze(prepared)
    for model in (
        fxqfix.to_int8(prepared, engine="fbgemm"),  # it reads what was written, quantized
        converted(frozen),  # in float
        converted(plain),  # what was there before
    ):
        wanted, found = (
            fxqfix.compare(m, model, data(0.5), engine="fbgemm") for m in (plain, frozen)
        )
        assert found.coverage == wanted.coverage
        assert found.coverage.unpaired == ()
        assert found.causes == wanted.causes
        assert found.unexplained == 0
        assert [row.local for row in found.rows] == [row.local for row in wanted.rows]
    assert found.causes["inplace-lost"] > 100


def test_only_a_call_on_a_copy_is_a_second_call() -> None:
    class Net(nn.Module):
        def __init__(self, write: Callable[[Tensor, Tensor], Tensor]) -> None:
            super().__init__()
            self.write = write

        def forward(self, x: Tensor) -> Tensor:
            y = torch.neg(x)
            return self.write(y, y.clone()) + y

    def found(write: Callable[[Tensor, Tensor], Tensor]) -> list[tuple[str, str]]:
        graph = fx.symbolic_trace(Net(write)).graph
        return [(str(twin), str(use.reader)) for twin, use in twins(graph, {})]

    def act(x: Tensor, slope: float = 0.1) -> Tensor:
        return F.leaky_relu(x, slope, inplace=True)

    assert found(lambda y, copied: act(copied) * act(y)) == [("leaky_relu", "mul")]
    assert found(lambda y, copied: act(y) * act(copied)) == [("leaky_relu_1", "mul")]
    assert found(lambda y, _: act(y) * act(y.clone())) == []  # it copies what was written
    assert found(lambda y, copied: act(copied, 0.2) * act(y)) == []
    assert found(lambda y, copied: F.leaky_relu(copied, 0.1) * act(y)) == []
    assert found(lambda y, copied: act(copied) * F.leaky_relu(y, 0.1)) == []


# On qnnpack, relu6 is wrong for channels-last tensors (kernel-defect), in place or not.
@pytest.mark.parametrize(
    ("name", "engine"),
    [*((name, "fbgemm") for name in KEPT), ("relu_", "qnnpack"), ("hardsigmoid", "qnnpack")],
)
def test_in_place_kernels_lose_nothing(name: str, engine: str) -> None:
    prepared = overwritten(KEPT[name](), engine)
    found = fxqfix.lint(prepared, engine=engine).findings
    assert "inplace-lost" not in {f.code for f in found}
    plain = FreezeQParams()(prepared).graph_module
    report = fxqfix.compare(plain, converted(plain, engine), data(0.5), engine=engine)
    assert "inplace-lost" not in report.causes
    assert report.unexplained == 0
    frozen = fxqfix.freeze(prepared)
    assert same(run(plain, data(0.5)[0]), run(frozen, data(0.5)[0]))
    again = fxqfix.compare(plain, converted(frozen, engine), data(0.5), engine=engine)
    assert again.unexplained == 0


def test_a_relu_s_fake_quant_changes_nothing_so_that_all_stays_int8() -> None:
    frozen = fxqfix.freeze(overwritten(nn.ReLU(inplace=True)))
    add = next(n for n in frozen.graph.nodes if n.name == "add")
    assert add.args[0] is add.args[1]
    assert [n.name for n in frozen.graph.nodes if "copy" in n.name or "clone" in n.name] == []


def test_to_int8_says_what_it_rounds() -> None:
    model = fxqfix.to_int8(overwritten(), engine="fbgemm")
    found = dict(fxqfix.certificate_of(model).unchecked)
    assert found == {"add": "reads act, written in place, quantized; in training in float"}
    kept = fxqfix.to_int8(fxqfix.freeze(overwritten()), engine="fbgemm")
    assert fxqfix.certificate_of(kept).unchecked == ()


class Chained(nn.Module):
    """Writes on what was written, and reads each in between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = F.hardswish(x, inplace=True)
        first = x + 1.0
        x.add_(0.25)
        return torch.cat([first, y, x], 1)


@pytest.mark.parametrize("name", ["hardswish", "add_"])
def test_repair_reroutes_the_reader(name: str) -> None:
    prepared = overwritten(LOST[name]())
    plain = FreezeQParams()(prepared).graph_module
    with quantized_engine("fbgemm"), quiet():
        mended = fxqfix.repair(plain, converted(plain), data=data(0.5))
    assert ("reroute-reads", "add") in {(m.step, m.site) for m in mended.applied}
    assert mended.before is not None
    assert mended.after is not None
    assert mended.before.causes["inplace-lost"] > 100
    assert "inplace-lost" not in mended.after.causes
    assert mended.after.unexplained == 0


@pytest.mark.parametrize("quantized", [False, True])
def test_the_last_write_before_a_read_counts(quantized: bool) -> None:
    plain = fx.symbolic_trace(Chained().eval())
    result = ExplicitWrites(quantized=quantized)(plain)
    assert len(result.edits) == 4  # y is x
    assert same(run(plain, data()[0]), run(result.graph_module, data()[0]))


def test_reroute_reads_says_what_it_left_and_names_what_is_missing() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.neg(x) + x)

    net = fx.symbolic_trace(Net())
    late = RerouteReads({"add": ("x", "relu")})(net)
    assert (late.edits, late.remarks) == ((), ("add: relu comes behind it",))
    assert torch.equal(late.graph_module(torch.ones(1)), net(torch.ones(1)))
    with pytest.raises(UnknownNameError, match=r"reroute-reads.*'sub'.*add"):
        RerouteReads({"sub": ("x", "neg")})(net)

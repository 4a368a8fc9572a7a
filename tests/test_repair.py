"""repair: what it repairs, leaves and says so, what it rolls back, and that twice is once."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
from torch import Tensor, fx, nn
from torch.ao.quantization import (
    QuantStub,
    convert,
    disable_observer,
    get_default_qat_qconfig,
    get_default_qat_qconfig_mapping,
    prepare_qat,
)
from torch.ao.quantization.backend_config import get_tensorrt_backend_config
from torch.ao.quantization.quantize_fx import (
    convert_fx,
    convert_to_reference_fx,
    prepare_qat_fx,
)

import fxqfix
from fxqfix._torch import quantized_engine, quiet
from fxqfix.dialects._propagate import misplaced
from fxqfix.errors import DataError, PairingError, UncalibratedError
from fxqfix.passes import GraftIslands, RestoreQParams, RestoreRange, Rewriter
from fxqfix.passes.graft_islands import has_island
from tests.engines.nets import NETS, SHAPES
from tests.faults.injectors import data, trained
from tests.states import fingerprint

ENGINES = ("fbgemm", "x86", "onednn", "qnnpack")
NAMES = [name for name in NETS if name != "Recurrent"]  # an LSTM's inside can't be opened


def batches(name: str, gain: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randn(SHAPES.get(name, (4, 3, 16, 16)), generator=generator) * gain for _ in range(2)
    ]


@functools.cache
def prepared_net(name: str, engine: str) -> fx.GraphModule:
    """QAT with the engine's default qconfig; transposed convolutions get per-tensor weights.

    Shared by the tests, which leave it as it is.
    """
    torch.manual_seed(0)
    mapping = get_default_qat_qconfig_mapping(engine)
    per_tensor = get_default_qat_qconfig_mapping("qnnpack").global_qconfig.weight
    mapping.set_object_type(nn.ConvTranspose2d, mapping.global_qconfig._replace(weight=per_tensor))
    with quantized_engine(engine), quiet():
        model = prepare_qat_fx(NETS[name]().train(), mapping, (batches(name)[0],))
        for batch in batches(name):
            model(batch)
    model.eval().apply(torch.ao.quantization.disable_observer)
    return model


# x86 runs the kernels of fbgemm and onednn: two networks show that it is dispatched.
CASES = [(n, e) for n in NAMES for e in ENGINES if e != "x86" or n in ("Mobile", "UNet")]


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_int8_becomes_what_was_trained(name: str, engine: str) -> None:
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this torch has no engine {engine}")
    prepared = prepared_net(name, engine)
    with quantized_engine(engine), quiet():
        converted = convert_fx(copy.deepcopy(prepared))
        before = fingerprint(prepared), converted.code, torch.get_rng_state()
        mended = fxqfix.repair(prepared, converted, data=batches(name, 3.0), engine=engine)
        assert (fingerprint(prepared), converted.code) == before[:2]
        assert torch.equal(torch.get_rng_state(), before[2])
        again = fxqfix.repair(prepared, mended.graph_module, engine=engine)
    assert mended.modified
    assert not again.modified
    rows = [row for row in mended.after.rows if row.kind != "output"]
    assert mended.after.unexplained == 0
    assert sum(row.cumulative.out_of_range for row in rows) == 0
    for row in rows:
        assert row.prepared.same_grid(row.converted), row.name
        if row.kind == "weight":
            assert row.local.differing == 0, row.name
        elif "int16-saturation" not in row.causes:
            assert row.local is None or row.local.max_lsb <= 1, str(row)
    kept = {"upstream", "rounding", "bias-int32", "requantization", "int16-saturation"}
    kept.add("observer-only")  # QAT has no transposed convolution: it ran on its float weight
    assert set(mended.after.causes) <= kept


class Clipped(nn.Module):
    """A clamp that is no module: it gets a contiguous input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).clamp(-0.5, 0.5)


def test_a_contiguous_input_is_given_once() -> None:
    x = batches("")[0]
    with quantized_engine("qnnpack"), quiet():
        prepared = prepare_qat_fx(
            Clipped().train(), get_default_qat_qconfig_mapping("qnnpack"), (x,)
        )
        prepared(x)
        converted = convert_fx(copy.deepcopy(prepared.eval()))
        mended = fxqfix.repair(prepared, converted, data=[x], engine="qnnpack")
        again = fxqfix.repair(prepared, mended.graph_module, data=[x], engine="qnnpack")
    added = [n for n in again.graph_module.graph.nodes if n.target == "contiguous"]
    assert len(added) == 1
    assert mended.modified
    assert not again.modified


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flow", ["reference", "decomposed"])
def test_float_forms_become_exact(flow: str, name: str) -> None:
    prepared = prepared_net(name, "fbgemm")
    with quiet():
        if flow == "reference":
            converted = convert_to_reference_fx(copy.deepcopy(prepared))
        else:
            int8 = convert_fx(copy.deepcopy(prepared))
            converted = fxqfix.to_decomposed(int8, ranges_from=prepared)
        mended = fxqfix.repair(prepared, converted, data=batches(name, 3.0), engine="fbgemm")
        again = fxqfix.repair(prepared, mended.graph_module, data=batches(name), engine="fbgemm")
    assert mended.modified
    assert not again.modified
    assert sum(row.cumulative.out_of_range for row in mended.after.rows) == 0
    if flow == "decomposed":
        assert sum(row.local.differing for row in mended.after.rows) == 0
        frozen, x = fxqfix.freeze(prepared), batches(name, 3.0)[0]
        with torch.no_grad():
            assert torch.equal(mended.graph_module(x), frozen(x))
    else:  # torch.quantize_per_tensor adds the zero point before it rounds
        assert set(mended.after.causes) <= {"rounding", "upstream", "observer-only"}


def test_eager() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(QuantStub(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)).train()
    net.qconfig = get_default_qat_qconfig("fbgemm")
    prepared = prepare_qat(net)
    x = torch.randn(2, 3, 6, 6)
    prepared(x)
    prepared.eval()
    converted = convert(copy.deepcopy(prepared))
    mended = fxqfix.repair(prepared, converted, data=[3 * x], engine="fbgemm")
    assert {"restore-qparams", "restore-range"} <= {m.step for m in mended.applied}
    assert set(mended.after.causes) <= {"rounding", "upstream"}


def test_without_data_the_state_is_mended() -> None:
    prepared = trained()
    converted = convert_fx(copy.deepcopy(prepared))
    mended = fxqfix.repair(prepared, converted, engine="fbgemm")
    assert mended.before is None
    assert mended.after is None
    assert len(mended.applied) == len(
        fxqfix.repair(prepared, converted, data=data(), engine="fbgemm").applied
    )
    assert "repaired" in str(mended)


def test_what_the_engine_itself_does_is_left_and_named() -> None:
    prepared = trained("qnnpack")
    with quantized_engine("qnnpack"):
        converted = convert_fx(fxqfix.freeze(prepared))
        mended = fxqfix.repair(prepared, converted, data=data())
    left = {r.cause: r for r in mended.refused}
    assert "bias-int32" in left
    assert "nothing to repair" in left["bias-int32"].reason
    assert f"{mended.after.causes['bias-int32']} codes" in left["bias-int32"].reason


def test_a_site_that_is_spelled_otherwise_is_refused() -> None:
    prepared = trained()
    converted = convert_fx(copy.deepcopy(prepared))

    class Own(type(converted.head)):  # type: ignore[misc]  # the user's own kind of layer
        pass

    converted.head.__class__ = Own
    mended = fxqfix.repair(prepared, converted, data=data(), engine="fbgemm")
    refused = {r.site: r.reason for r in mended.refused if r.cause == "restore-qparams"}
    assert refused["head.weight"] == "Own stands where conversion puts Linear"
    assert type(mended.graph_module.head) is Own
    assert "stem.weight" in {m.site for m in mended.applied}


def test_what_makes_it_worse_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that spoils one layer: the others are repaired, that one is left as it came."""
    rewrite = RestoreQParams.rewrite

    def spoils(self: Any, rewriter: Rewriter) -> None:
        rewrite(self, rewriter)
        if "body.weight" in self.sites:
            body = rewriter.graph_module.get_submodule("body")
            body.set_weight_bias(body.weight(), body.bias() + 0.5)

    monkeypatch.setattr(RestoreQParams, "rewrite", spoils)
    monkeypatch.setattr(RestoreQParams, "check", lambda *_: None)
    prepared = trained()
    converted = convert_fx(copy.deepcopy(prepared))
    mended = fxqfix.repair(prepared, converted, data=data(), engine="fbgemm")
    reasons = {r.site: r.reason for r in mended.refused if r.cause == "restore-qparams"}
    assert {"body", "body.weight"} <= reasons.keys()
    assert reasons["body"].startswith("rolled back: body had ")
    done = {m.site for m in mended.applied}
    assert {"stem.weight", "head.weight"} <= done
    assert not done & {"body", "body.weight"}
    assert torch.equal(mended.graph_module.body.bias(), converted.body.bias())
    came, now = (mended.before.row("body"), mended.after.row("body"))
    assert came.converted == now.converted


def test_a_pass_that_fails_midway_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = trained()
    converted = convert_fx(copy.deepcopy(prepared))
    code = converted.code

    def fails(self: Any, rewriter: Rewriter) -> None:
        rewriter.graph_module.get_submodule("head")
        raise ValueError("midway")

    monkeypatch.setattr(RestoreRange, "rewrite", fails)
    with pytest.raises(fxqfix.errors.PassError, match="midway"):
        fxqfix.repair(prepared, converted, engine="fbgemm")
    assert converted.code == code


def test_bad_input() -> None:
    prepared = trained()
    converted = convert_fx(copy.deepcopy(prepared))
    order = r"repair\(prepared, converted\). To do: put the prepared model first"
    with pytest.raises(PairingError, match=f"first model is not a prepared one.*{order}"):
        fxqfix.repair(converted, prepared)  # the order up to 0.1
    assert not fxqfix.repair(converted=converted, prepared=prepared).refused
    with pytest.raises(PairingError, match="second model is not a converted one"):
        fxqfix.repair(prepared, prepared)

    def once() -> Iterator[Tensor]:
        yield from data()

    with pytest.raises(DataError, match="read the data again"):
        fxqfix.repair(prepared, converted, data=once())
    with pytest.raises(DataError, match="no batch"):
        fxqfix.repair(prepared, converted, data=[])
    other = prepare_qat_fx(
        nn.Sequential(nn.Linear(4, 4)).train(),
        get_default_qat_qconfig_mapping("fbgemm"),
        (torch.randn(2, 4),),
    )
    with pytest.raises(UncalibratedError):
        fxqfix.repair(other, converted)
    other(torch.randn(2, 4))
    with pytest.raises(PairingError):
        fxqfix.repair(other, converted)


class Behind(nn.Module):
    """Layers with weights of one sign, one behind the other, and an average of what they give."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(8, 8) if kind == "linears" else nn.Conv2d(3, 8, 3)
        self.second = nn.Linear(8, 8) if kind == "linears" else nn.Conv2d(8, 8, 3)
        for layer in (self.first, self.second):
            layer.weight.data.abs_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        if self.kind == "linears":
            return x
        return x.mean([2, 3]) if self.kind == "mean" else torch.relu(x).mean(-1)


@pytest.mark.parametrize("kind", ["linears", "mean", "last mean"])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_returned_runs(engine: str, kind: str) -> None:
    """Without data too: islands one behind the other, memory orders in front of averages."""
    torch.manual_seed(0)
    torch.backends.quantized.engine = engine
    x = torch.rand(4, 8) if kind == "linears" else torch.rand(2, 3, 8, 8)
    prepared = prepare_qat_fx(Behind(kind).train(), get_default_qat_qconfig_mapping(engine), (x,))
    prepared(x)
    prepared.eval().apply(disable_observer)
    converted = convert_fx(copy.deepcopy(prepared))
    mended = fxqfix.repair(prepared, converted, engine=engine)
    assert not misplaced(mended.graph_module)
    equal = torch.equal(mended.graph_module(x), prepared(x))
    assert equal or kind != "linears"  # an average's ties are the kernel's
    with_data = fxqfix.repair(prepared, converted, data=[x], engine=engine)
    assert torch.equal(with_data.graph_module(x), mended.graph_module(x))


def test_a_graph_that_can_not_run_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that puts an island on codes."""
    torch.manual_seed(0)
    x, torch.backends.quantized.engine = torch.rand(4, 8), "onednn"
    prepared = prepare_qat_fx(
        Behind("linears").train(), get_default_qat_qconfig_mapping("onednn"), (x,)
    )
    prepared(x)
    prepared.eval().apply(disable_observer)
    converted = convert_fx(copy.deepcopy(prepared))
    graft = GraftIslands.rewrite

    def on_codes(self: Any, rewriter: Rewriter) -> None:
        graft(self, rewriter)
        for node in rewriter.graph.nodes:
            if has_island(rewriter.graph_module, node):
                node.replace_input_with(node.args[0], node.args[0].all_input_nodes[0])

    monkeypatch.setattr(GraftIslands, "rewrite", on_codes)
    mended = fxqfix.repair(prepared, converted, engine="onednn")
    mended.graph_module(x)
    assert any("could not run" in refusal.reason for refusal in mended.refused)


@pytest.mark.parametrize("seed", [0, 1, 4])
def test_a_second_repair_finds_nothing_where_one_was_rolled_back(seed: int) -> None:
    """Converted in train mode, as many scripts do."""
    torch.manual_seed(seed)
    torch.backends.quantized.engine = "fbgemm"
    net = nn.Sequential(nn.Conv1d(3, 3, 3), nn.BatchNorm1d(3), nn.ReLU()).train()
    x = torch.rand(2, 3, 10)
    prepared = prepare_qat_fx(net, get_default_qat_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    converted = convert_fx(copy.deepcopy(prepared))
    first = fxqfix.repair(prepared, converted, data=[x, 3 * x])
    again = fxqfix.repair(prepared, first.graph_module, data=[x, 3 * x])
    assert not again.modified
    for batch in (x, 3 * x):
        assert torch.equal(first.graph_module(batch), again.graph_module(batch))


@pytest.mark.parametrize("told", [True, False])
def test_a_reference_model_of_an_own_backend_config(told: bool) -> None:
    torch.manual_seed(0)
    activation = tq.FusedMovingAvgObsFakeQuantize.with_args(
        observer=tq.MovingAverageMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_tensor_symmetric,
    )
    weight = tq.fused_per_channel_wt_fake_quant_range_neg_127_to_127
    mapping = tq.QConfigMapping().set_global(tq.QConfig(activation=activation, weight=weight))
    config, x = get_tensorrt_backend_config(), torch.randn(4, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3)).train()
    prepared = prepare_qat_fx(net, mapping, (x,), backend_config=config)
    for _ in range(3):
        prepared(x)
    prepared.eval().apply(disable_observer)
    given = convert_to_reference_fx(copy.deepcopy(prepared), backend_config=config)
    assert not torch.equal(given(x), prepared(x))
    told_config = config if told else None
    mended = fxqfix.repair(prepared, given, data=[x], backend_config=told_config)
    assert torch.equal(mended.graph_module(x), prepared(x))

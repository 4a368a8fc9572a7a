"""Each cause against the fault that is planted for it, and the bookkeeping of shares."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import fxqfix
import fxqfix.causes
import fxqfix.report
from fxqfix.causes import registry
from fxqfix.qparams import zero_point_first
from tests.faults.injectors import INJECTORS, data, trained

# Causes that need no injector: what is left over, and what the CPU has to do itself.
WITHOUT_INJECTOR = {
    "upstream": "every fault downstream of which there is an op shows it",
    "unexplained": "must not occur; asserted everywhere",
    "int16-saturation": "only a CPU without VNNI does it; tests/engines and the 000 demo",
}


def test_every_cause_has_an_injector_or_a_reason() -> None:
    names = {cause.name for cause in registry()}
    assert names == set(INJECTORS) | set(WITHOUT_INJECTOR)
    assert not set(INJECTORS) & set(WITHOUT_INJECTOR)


def test_the_last_cause_takes_everything() -> None:
    assert [cause.name for cause in registry()][-2:] == ["upstream", "unexplained"]


@pytest.mark.parametrize("name", INJECTORS)
def test_the_planted_fault_is_named(name: str) -> None:
    if name == "rounding" and not zero_point_first():
        pytest.skip("native quantize of this torch rounds ties as fake-quantize does")
    fault = INJECTORS[name]()
    report = fxqfix.compare(fault.prepared, fault.converted, fault.batches, engine=fault.engine)
    found = {row.name: dict(row.causes) for row in report.rows if row.kind == "activation"}
    assert any(name in found[site] for site in fault.sites), found
    for site, causes in found.items():
        wrong = set(causes) - {name, "upstream", "rounding"}
        if name == "bias-int32":
            wrong -= {"range-lost"}  # an int8 kernel clamps to its container
        assert not wrong, f"{site}: {causes}"
    assert report.unexplained == 0


@pytest.mark.parametrize("name", INJECTORS)
def test_shares_add_up(name: str) -> None:
    fault = INJECTORS[name]()
    report = fxqfix.compare(fault.prepared, fault.converted, fault.batches, engine=fault.engine)
    for row in report.rows:
        local = row.local.differing if row.local else 0
        assert sum(row.causes.values()) >= max(local, row.cumulative.differing)
        assert sum(row.causes.values()) <= local + row.cumulative.differing
        assert row.causes.get("upstream", 0) <= row.cumulative.differing
        assert set(row.evidence) == set(row.causes)


class Dropping(nn.Module):
    """F.dropout drops by default, in eval mode too."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.fc, self.inplace = nn.Linear(8, 8), inplace

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), 0.3, inplace=self.inplace)


@pytest.mark.parametrize("spelled", ["by name", "in place", "by position"])
def test_dropout_that_is_no_module(spelled: str) -> None:
    torch.manual_seed(0)
    x, mapping = torch.randn(16, 8), get_default_qconfig_mapping("fbgemm")
    model = Dropping(inplace=spelled == "in place").eval()
    prepared = prepare_fx(model, mapping, (x,))
    prepared(x)
    frozen = fxqfix.freeze(prepared)
    converted = convert_fx(copy.deepcopy(frozen))
    node = next(n for n in frozen.graph.nodes if n.name == "dropout")
    if spelled == "by position":
        node.args, node.kwargs = (*node.args, 0.3, True), {}
        frozen.recompile()
    report = fxqfix.compare(frozen, converted, [x], engine="fbgemm")
    row = next(row for row in report.rows if row.name == "dropout")
    assert row.causes["dropout-training"] > 30
    assert row.evidence["dropout-training"] == "dropout is in train mode"
    assert not row.problems
    assert report.unexplained == 0


class Normed(nn.Module):
    """A BatchNorm that nothing is fused with, which keeps a kernel of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.conv, self.relu, self.bn = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.bn(self.relu(self.conv(self.quant(x)))))


@pytest.mark.parametrize("gain", [1.0, 3.0])
def test_train_mode_beyond_the_range(gain: float) -> None:
    """Codes that take two corrections, eval mode and the range, are no gap in the causes."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    net = Normed().train()
    net.qconfig = tq.get_default_qat_qconfig("fbgemm")
    prepared = tq.prepare_qat(net)
    prepared(x)
    converted = tq.convert(copy.deepcopy(prepared).eval())
    report = fxqfix.compare(prepared, converted, [gain * x], engine="fbgemm")
    assert report.row("bn").causes["bn-training"] > 1000
    assert report.unexplained == 0


def test_range_lost_counts_exactly_the_codes_beyond_the_range() -> None:
    fault = INJECTORS["range-lost"]()
    report = fxqfix.compare(fault.prepared, fault.converted, fault.batches)
    row = report.row("x")
    scale, point = row.prepared.scale, row.prepared.zero_point
    beyond = sum(
        int((torch.round(batch * (1 / torch.tensor(scale))) + point > 127).sum())
        for batch in fault.batches
    )
    assert beyond > 0
    assert row.causes == {"range-lost": beyond}
    assert row.cumulative.out_of_range == beyond


def test_a_healthy_pair_has_no_cause() -> None:
    frozen = fxqfix.freeze(trained())
    report = fxqfix.compare(frozen, fxqfix.to_decomposed(frozen), data(3.0))
    assert report.exact
    assert report.causes == {}


def test_without_attribution_the_numbers_are_the_same() -> None:
    fault = INJECTORS["scale-formula"]()
    with_causes = fxqfix.compare(fault.prepared, fault.converted, fault.batches)
    without = fxqfix.compare(fault.prepared, fault.converted, fault.batches, attribute=False)
    assert [r.local for r in with_causes.rows] == [r.local for r in without.rows]
    assert [r.cumulative for r in with_causes.rows] == [r.cumulative for r in without.rows]
    assert without.causes == {}
    counted = [r.differing for r in without.rows]
    assert counted == [sum(r.causes.values()) for r in with_causes.rows]
    assert any(counted)
    merged = [r.differing for r in with_causes.merge(without).rows if r.kind == "activation"]
    rows = [r for r in without.rows if r.kind == "activation"]
    assert merged == [2 * r.differing for r in rows]


def test_a_cause_that_fails_says_so_in_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxqfix.causes.rounding import Rounding
    from fxqfix.causes.scale_formula import ScaleFormula

    def broken(self: object, view: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Rounding, "explains", broken)
    monkeypatch.setattr(ScaleFormula, "explains", broken)
    fault = INJECTORS["scale-formula"]()
    report = fxqfix.compare(fault.prepared, fault.converted, fault.batches)
    assert report.unexplained > 0
    row = next(r for r in report.rows if "unexplained" in r.causes and r.kind == "activation")
    assert "could not be computed here: no such kernel" in row.evidence["unexplained"]
    said = tuple(
        f"{cause} could not be computed here: no such kernel"
        for cause in ("rounding", "scale-formula")
    )
    assert row.problems == said
    assert f"- {row.name}: {said[0]}\n" in str(report).partition("\nproblems:\n")[2]
    assert f"<li>{row.name}: {said[0]}</li>" in report.to_html().partition("<h2>Problems</h2>")[2]
    assert fxqfix.report.Report.from_json(report.to_json()) == report
    assert report.merge(report).row(row.name).problems == said


def test_reports_written_before_there_were_problems_are_read() -> None:
    fault = INJECTORS["range-lost"]()
    report = fxqfix.compare(fault.prepared, fault.converted, fault.batches)
    old = json.loads(report.to_json())
    for row in old["rows"]:
        assert row.pop("problems") == []
    assert fxqfix.report.Report.from_json(json.dumps(old)) == report


def test_torch_traces_are_left_out_of_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **options: bool) -> None:
        raise RuntimeError("no such kernel\n\nWhile executing %conv")

    monkeypatch.setattr(fxqfix.causes.Recompute, "at", broken)
    fault = INJECTORS["scale-formula"]()
    report = fxqfix.compare(fault.prepared, fault.converted, fault.batches)
    found = {problem for row in report.rows for problem in row.problems}
    assert found == {"no float64 recomputation: no such kernel"}

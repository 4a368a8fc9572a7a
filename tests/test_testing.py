"""check_pass: our own passes keep its promises, and each broken promise is named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn

import fxqfix
from fxqfix.errors import CheckError, PassError, UnknownNameError
from fxqfix.flows import convert_by_torch
from fxqfix.passes import (
    ExplicitWrites,
    FoldBatchNorm,
    FreezeQParams,
    HoldWeights,
    OwnReaders,
    Pass,
    PinRanges,
    Rewriter,
    SignedCodes,
    SplitShared,
)
from fxqfix.testing import assert_deployed, check_pass
from tests.faults.injectors import data, trained


@pytest.fixture(scope="module")
def models() -> dict[str, fx.GraphModule]:
    prepared = trained()
    frozen = fxqfix.freeze(prepared)
    return {
        "prepared": prepared,
        "frozen": frozen,
        "decomposed": fxqfix.to_decomposed(frozen, pin_ranges=False),
    }


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        (FreezeQParams(), "prepared"),
        (FoldBatchNorm(), "frozen"),
        (HoldWeights(), "frozen"),
        (SplitShared(), "frozen"),
        (ExplicitWrites(), "frozen"),
        (PinRanges(), "decomposed"),
        (PinRanges(where="codes"), "decomposed"),
        (SignedCodes(), "decomposed"),
        (OwnReaders(), "decomposed"),
    ],
    ids=str,
)
def test_our_passes_keep_the_promises(
    step: Pass, kind: str, models: dict[str, fx.GraphModule]
) -> None:
    result = check_pass(step, models[kind], data()[0])
    assert result.modified is (kind != "frozen")


@dataclass(frozen=True)
class Broken(Pass):
    """A pass that breaks one promise."""

    name: ClassVar[str] = "broken"
    promise: str = ""

    def rewrite(self, rewriter: Rewriter) -> None:
        relu = next((n for n in rewriter.graph.nodes if n.target is torch.relu), None)
        if self.promise == "edits nothing":
            rewriter.note("again and again")
        elif self.promise == "same bits" and relu is not None:
            relu.target = torch.sigmoid
            rewriter.note("another op")


class Relu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)


@pytest.mark.parametrize("promise", ["edits nothing", "same bits"])
def test_a_broken_promise_is_named(promise: str) -> None:
    model = fx.symbolic_trace(Relu())
    with pytest.raises(PassError, match=rf"broken: a promise is broken.*{promise}"):
        check_pass(Broken(promise), model, torch.ones(2))
    if promise == "same bits":
        assert check_pass(Broken(promise), model, torch.ones(2), same_bits=False).modified


def test_changing_what_it_is_given_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    net = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))

    def mutates(self: Pass, module: Any) -> Any:
        with torch.no_grad():
            module.get_parameter("0.weight").add_(1)
        return original(self, module)

    original = Pass.__call__
    monkeypatch.setattr(Pass, "__call__", mutates)
    with pytest.raises(PassError, match="the model that it is given stays as it is"):
        check_pass(FoldBatchNorm(), net)


def test_a_name_against_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Broken, "name", "NOT_KEBAB")  # a class of this name would stay registered
    with pytest.raises(PassError, match="kebab-case"):
        check_pass(Broken(), fx.symbolic_trace(Relu()))


@pytest.fixture(scope="module")
def deployed() -> tuple[nn.Module, nn.Module, list[torch.Tensor]]:
    prepared = trained()
    return prepared, fxqfix.to_int8(prepared, engine="qnnpack"), [data()]


def test_what_is_deployed_right_passes(deployed: Any) -> None:
    prepared, int8, batches = deployed
    assert assert_deployed(prepared, "export", batches).exact
    found = assert_deployed(prepared, "int8:qnnpack", batches)
    assert isinstance(found, fxqfix.Certificate)
    report = assert_deployed(fxqfix.freeze(prepared), int8, batches, engine="qnnpack")
    assert isinstance(report, fxqfix.Report)


def test_what_is_not_fails_with_the_table(deployed: Any) -> None:
    prepared, _, batches = deployed
    plain = convert_by_torch(prepared)
    report = fxqfix.compare(prepared, plain, batches, engine="qnnpack")
    assert report.causes.keys() - fxqfix.report.ALLOWED["Report"]
    with pytest.raises(AssertionError, match="not what was trained") as failure:
        assert_deployed(prepared, plain, batches, engine="qnnpack")
    assert "site" in str(failure.value)
    assert str(failure.value).count("\n") > len(report.rows)
    allow, far = set(report.causes), max(r.local.max_lsb for r in report.rows if r.local)
    options: dict[str, Any] = {"allow": allow, "engine": "qnnpack"}
    if far > 1:
        with pytest.raises(CheckError, match=f"codes are up to {far} apart"):
            assert_deployed(prepared, plain, batches, **options)
    allowed = {name for name in allow if name != "upstream"}
    for name in allowed - {"rounding"}:
        with pytest.raises(CheckError, match=f"{name}: [0-9]+ codes"):
            assert_deployed(
                prepared, plain, batches, allow=allowed - {name}, max_lsb=far, engine="qnnpack"
            )
    with pytest.raises(UnknownNameError, match="no cause is named"):
        assert_deployed(prepared, "export", batches, allow={"nonsense"})

"""split-shared: every call of a shared module converts with its own output scale."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import fxqfix
from fxqfix.passes import SplitShared
from tests.states import fingerprint

SHAPE = (2, 4, 6, 6)


class Head(nn.Module):
    """A head for two levels, as detectors have it."""

    def __init__(self, head: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.head = head()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(x), self.head(torch.sigmoid(self.down(x)))


HEADS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(4, 2, 1),
    "conv-bn-relu": lambda: nn.Sequential(nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2), nn.ReLU()),
    "hardswish": nn.Hardswish,
    "linear": lambda: nn.Sequential(nn.Flatten(2), nn.AdaptiveAvgPool1d(4), nn.Linear(4, 2)),
}


def prepared(head: str, *, qat: bool) -> nn.Module:
    torch.manual_seed(1)
    x = torch.randn(SHAPE)
    if qat:
        mapping = get_default_qat_qconfig_mapping("fbgemm")
        model = prepare_qat_fx(Head(HEADS[head]).train(), mapping, (x,))
    else:
        model = prepare_fx(Head(HEADS[head]).eval(), get_default_qconfig_mapping("fbgemm"), (x,))
    model(x)
    return model.eval()


def grids(model: nn.Module) -> dict[str, object]:
    sites = fxqfix.inspect(model).sites
    return {s.name: (s.used.scale, s.used.zero_point) for s in sites if s.kind == "activation"}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("qat", [False, True], ids=["ptq", "qat"])
def test_every_call_keeps_its_grid(head: str, qat: bool) -> None:
    model = prepared(head, qat=qat)
    before = fingerprint(model)
    frozen = fxqfix.freeze(model)
    assert fingerprint(model) == before
    assert len({v for k, v in grids(frozen).items() if k.startswith("head")}) >= 2
    report = fxqfix.compare(frozen, convert_fx(copy.deepcopy(frozen)), [torch.randn(SHAPE)])
    assert not report.coverage.unpaired
    for row in (row for row in report.rows if row.kind != "output"):
        assert row.prepared.same_grid(row.converted), row.name


def test_without_it_conversion_keeps_the_last_grid_only() -> None:
    """The reason for the pass: a torch that repairs this makes it needless."""
    model = prepared("conv", qat=False)
    wanted, found = grids(model), grids(convert_fx(copy.deepcopy(model)))
    assert found["head"] == wanted["head_1"] != wanted["head"]


def test_parameters_stay_tied_and_a_second_run_finds_nothing() -> None:
    split = SplitShared()(prepared("conv", qat=False))
    assert split.edits == ("head_call_1: head_1 has head to itself",)
    model = split.graph_module
    assert model.head.weight is model.head_call_1.weight
    assert not SplitShared()(model).modified


def test_the_frozen_model_computes_the_same() -> None:
    model = fxqfix.freeze(prepared("conv-bn-relu", qat=True))
    x = torch.randn(SHAPE)
    decomposed = fxqfix.to_decomposed(model)
    assert all(torch.equal(a, b) for a, b in zip(model(x), decomposed(x), strict=True))

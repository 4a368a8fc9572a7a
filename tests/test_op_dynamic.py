"""Dynamic quantization: marked as such everywhere, left alone by freeze, refused by a rewrite."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.ao.nn.quantized.dynamic as nnqd
import torch.ao.quantization as tq
import torch.ao.quantization.quantize_fx as qfx
from torch import Tensor, nn

from fxqfix import compare, freeze, inspect, to_decomposed
from fxqfix.errors import FxqfixError, UnsupportedError

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:UserWarning")
    for message in (
        # From torch's reference LSTM and from its dynamic convolutions, each time one is made.
        "To copy construct from a tensor",
        r"The current implementation of the DynamicQuantizedConv",
    )
]

AT_RUN_TIME = "qparams are chosen at run time (dynamic)"


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.linear = nn.LSTM(8, 4), nn.GRU(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.gru(self.lstm(x)[0])[0])
        return out


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(8, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rnn(self.gru(self.lstm(x)[0]))
        return out


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.relu = nn.Linear(8, 4), nn.ReLU()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.relu(self.linear(x)), self.weight)


@dataclass(frozen=True)
class Case:
    """A float model, its input, and how many of its ops each flow makes dynamic."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    eager: int
    fx: int


CASES = {
    "recurrent": Case(Recurrent, (5, 2, 8), eager=3, fx=3),
    "cells": Case(Cells, (3, 8), eager=3, fx=3),
    "linears": Case(Linears, (3, 8), eager=1, fx=2),  # eager knows modules only
}

each_case = pytest.mark.parametrize("name", CASES)


@functools.cache
def prepared_model(name: str) -> nn.Module:
    case = CASES[name]
    x, qconfigs = (
        torch.randn(case.shape),
        tq.QConfigMapping().set_global(tq.default_dynamic_qconfig),
    )
    prepared = qfx.prepare_fx(case.make().eval(), qconfigs, (x,))
    prepared(x)
    return prepared


def converted_model(name: str, flow: str) -> nn.Module:
    if flow == "eager":
        return tq.quantize_dynamic(CASES[name].make().eval())
    make = qfx.convert_fx if flow == "fx" else qfx.convert_to_reference_fx
    return make(copy.deepcopy(prepared_model(name)))


@pytest.mark.parametrize("flow", ["eager", "fx", "reference"])
@each_case
def test_converted_ops_are_marked(name: str, flow: str) -> None:
    found = inspect(converted_model(name, flow))
    marked = [site for site, reason in found.unsupported if reason == AT_RUN_TIME]
    assert len(marked) == (CASES[name].eager if flow == "eager" else CASES[name].fx)
    assert {found.site(site).source for site in marked} == {"dynamic"}
    assert all(found.site(site).used is None for site in marked)


@pytest.mark.parametrize("flow", ["eager", "fx", "reference"])
@each_case
def test_converted_ops_are_refused(name: str, flow: str) -> None:
    with pytest.raises(UnsupportedError, match=r"dynamically quantized|at run time"):
        to_decomposed(converted_model(name, flow))


@each_case
def test_prepared_sites_are_marked(name: str) -> None:
    found = [site for site in inspect(prepared_model(name)) if site.kind == "activation"]
    assert len(found) == CASES[name].fx
    assert all(site.used is None and site.source.startswith("dynamic") for site in found)


@each_case
def test_freeze_fixes_weights_only(name: str) -> None:
    frozen = freeze(prepared_model(name))
    before, after = inspect(prepared_model(name)), inspect(frozen)
    assert [(s.name, s.used) for s in after] == [(s.name, s.used) for s in before]
    assert all(site.quantizes for site in after if site.kind == "weight")
    again = freeze(frozen)
    x = torch.randn(CASES[name].shape)
    assert torch.equal(again(x), frozen(x))


@each_case
def test_a_dynamic_model_is_never_ok(name: str) -> None:
    """Grids that are chosen at run time can't be decomposed; weights alone can be compared."""
    with pytest.raises(UnsupportedError, match="no fixed qparams"):
        to_decomposed(prepared_model(name))
    data = [torch.randn(CASES[name].shape)]
    if name in ("linears", "recurrent"):
        report = compare(prepared_model(name), None, data)
        assert report.verdict == "not judged"
        assert {row.kind for row in report.rows} == {"weight", "output"}
        return
    with pytest.raises(FxqfixError, match=r"in common|no activation|nothing that can be followed"):
        compare(prepared_model(name), None, data)


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_made_by_hand(kind: str, dims: int) -> None:
    """No flow of torch makes these modules."""
    conv = getattr(nnqd, f"{kind}{dims}d")(4, 4, 3)
    model = nn.Sequential(conv)
    found = inspect(model)
    assert [reason for _, reason in found.unsupported] == [AT_RUN_TIME]
    weight = found.site("_0.weight").used
    assert weight is not None
    assert weight.scale == conv.weight().q_scale()
    with pytest.raises(UnsupportedError, match="dynamically quantized"):
        to_decomposed(model)

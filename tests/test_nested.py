"""Graphs inside of graphs: standalone modules are listed, decomposed, and keep a verdict open."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx

import fxqfix
from fxqfix._torch import quiet


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x))) + x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest, self.last = nn.Linear(8, 8), Inner(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rest(self.first(x)))


X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def prepared() -> Any:
    torch.manual_seed(0)
    custom = PrepareCustomConfig().set_standalone_module_name("rest", None, (X,), None, None)
    mapping = get_default_qconfig_mapping("fbgemm")
    with quiet():
        model = prepare_fx(Net().eval(), mapping, (X,), prepare_custom_config=custom)
        model(X)
    return model


def test_sites_of_a_standalone_module_are_listed() -> None:
    names = [site.name for site in fxqfix.inspect(prepared())]
    assert {"rest.a.weight", "rest.b.weight", "first.weight", "last.weight"} <= set(names)
    found = fxqfix.inspect(prepared())
    assert all("calls as a whole" in reason for name, reason in found.unsupported)


@pytest.mark.parametrize("convert", [convert_fx, convert_to_reference_fx])
def test_converted_nested_graphs_are_listed(convert: Any) -> None:
    with quiet():
        converted = convert(copy.deepcopy(prepared()))
    assert "rest.a.weight" in [site.name for site in fxqfix.inspect(converted)]


def test_nothing_is_certified_that_was_not_looked_at() -> None:
    model = prepared()
    deployed = fxqfix.to_int8(model, engine="fbgemm")
    certificate = fxqfix.certificate_of(deployed)
    assert certificate.verdict == "not judged"
    assert any("rest.a.weight" in reason for reason in certificate.left_out)
    report = fxqfix.compare(fxqfix.freeze(model), deployed, [X], engine="fbgemm")
    assert report.verdict != "ok"
    assert not report.exact
    assert fxqfix.certify(model, "export", [X]).verdict == "not judged"
    assert fxqfix.certify(model, "int8:fbgemm", [X]).verdict != "ok"


def test_nested_graphs_are_decomposed() -> None:
    model = prepared()
    decomposed = fxqfix.to_decomposed(model)
    assert not any("activation_post_process" in name for name, _ in decomposed.named_modules())
    assert torch.equal(decomposed(3 * X), fxqfix.freeze(model)(3 * X))


def test_a_nested_int8_graph_is_refused_by_name() -> None:
    model = prepared()
    with quiet():
        converted = convert_fx(copy.deepcopy(model))
    with pytest.raises(fxqfix.errors.UnsupportedError, match="nested int8 graph"):
        fxqfix.to_decomposed(converted, ranges_from=model)

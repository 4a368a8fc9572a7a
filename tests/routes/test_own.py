"""A route of one's own: by the protocol, and by entry point."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_fx

from fxqfix import certify
from fxqfix.errors import RouteError, UnknownNameError
from fxqfix.measure import tensors_of
from fxqfix.routes import Deployed, Deployer, _own, find, registry


class Torch:
    name, summary = "torch-again", "the graph's own ops"
    lsb = 0

    def deploy(self, graph_module: Any, batch: Any) -> Any:
        def run(*inputs: Any) -> list[Any]:
            found = graph_module(*inputs)
            listed = list(found) if isinstance(found, list | tuple) else [found]
            return [t + self.lsb if not t.is_floating_point() else t for t in listed]

        return run


class Kernels(Torch):
    name = "torch-kernels"

    def deploy(self, graph_module: Any, batch: Any) -> Any:
        return Deployed(super().deploy(graph_module, batch), (("linear", 1),), ("a note",))


class Wrong(Torch):
    name, lsb = "torch-wrong", 1


@pytest.fixture(scope="module")
def prepared() -> nn.Module:
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    mapping = get_default_qconfig_mapping("fbgemm")
    model = prepare_fx(nn.Sequential(nn.Linear(8, 4), nn.ReLU()).eval(), mapping, (x,))
    model(x)
    return model


DATA = [torch.linspace(-2, 2, 128).reshape(16, 8)]


def test_an_object_of_ones_own_is_a_route(prepared: nn.Module) -> None:
    assert isinstance(Torch(), Deployer)
    found = certify(prepared, Torch(), DATA)
    assert found.exact
    assert found.route == "torch-again"
    assert certify(prepared, Kernels(), DATA).kernels == (("linear", 1),)


def test_it_is_not_believed(prepared: nn.Module) -> None:
    found = certify(prepared, Wrong(), DATA)
    assert not found.exact
    assert found.verdict == "not ok"


@pytest.mark.parametrize(
    ("spoiled", "said"),
    [
        (lambda t: t * float("nan"), "NaN or inf in output 0, where the graph gives numbers"),
        (lambda t: t.numpy(), "it gives ndarray, and tensors are due"),
        (lambda t: t[:1], "it gives outputs of shapes"),
    ],
    ids=["nan", "numpy", "shape"],
)
def test_what_can_not_be_compared_is_named(
    spoiled: Callable[[Tensor], Any], said: str, prepared: nn.Module
) -> None:
    def deploy(graph_module: Any, batch: Any) -> Any:
        return lambda *inputs: [spoiled(t) for t in tensors_of([graph_module(*inputs)])]

    route = SimpleNamespace(name="spoiled", summary="s", deploy=deploy)
    with pytest.raises(RouteError, match=said):
        certify(prepared, route, DATA)


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "ok"), (1 + 2.0**-22, "ok"), (1 + 2.0**-12, "not ok")]
)
def test_equal_codes_in_other_bits_are_not_exact(
    factor: float, verdict: str, prepared: nn.Module
) -> None:
    def deploy(graph_module: Any, batch: Any) -> Any:
        def run(*inputs: Any) -> list[Tensor]:
            found = tensors_of([graph_module(*inputs)])
            return [t * factor if t.is_floating_point() else t for t in found]

        return run

    route = SimpleNamespace(name="scaled", summary="s", deploy=deploy)
    found = certify(prepared, route, DATA)
    assert found.exact == (factor == 1.0)
    assert found.verdict == verdict
    assert ("off those of their codes" in str(found)) == (factor != 1.0)


@pytest.mark.parametrize(
    "given",
    [
        7,
        Torch,
        SimpleNamespace(name="x", summary="y"),
        SimpleNamespace(name="", summary="y", deploy=print),
        SimpleNamespace(name="x", summary=None, deploy=print),
    ],
    ids=["number", "class", "no deploy", "no name", "no summary"],
)
def test_what_is_no_route_is_refused(given: Any, prepared: nn.Module) -> None:
    with pytest.raises(RouteError, match="this is no route"):
        certify(prepared, given, DATA)


def _points(monkeypatch: pytest.MonkeyPatch, **named: str) -> None:
    found = [EntryPoint(name, value, _own.GROUP) for name, value in named.items()]
    monkeypatch.setattr(_own, "entry_points", lambda group: found)


def test_a_plug_in_is_found_by_entry_point(
    prepared: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    _points(monkeypatch, **{"torch-again": f"{__name__}:Torch"})
    assert certify(prepared, "torch-again", DATA).exact
    assert "torch-again" not in registry()


@pytest.mark.parametrize("value", ["no_such_package:Route", f"{__name__}:none", f"{__name__}:DATA"])
def test_a_plug_in_that_is_none_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _points(monkeypatch, mine=value)
    with pytest.raises(RouteError):
        find("mine")


def test_a_plug_in_replaces_no_route_of_fxqfix(monkeypatch: pytest.MonkeyPatch) -> None:
    _points(monkeypatch, export="no_such_package:Route")
    assert find("export") is registry()["export"]


def test_an_unknown_name_lists_plug_ins_too(monkeypatch: pytest.MonkeyPatch) -> None:
    _points(monkeypatch, mine=f"{__name__}:Torch")
    with pytest.raises(UnknownNameError, match="mine"):
        find("no-such-route")

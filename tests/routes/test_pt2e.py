"""certify on PT2E models of every mode: static, weight-only, dynamic."""

from __future__ import annotations

import pytest

pytest.importorskip("torchao", reason="PT2E needs torchao")

import torch
from torch import fx

import fxqfix
from fxqfix.routes import Deployed, Route, _registry
from tests.dialects import pt2e_nets

MODES = ["x86-reduced", "xnnpack", "weight-only", "bias-int32", "sub-8-bit"]


@pytest.mark.parametrize("mode", MODES)
def test_a_saved_program_keeps_every_bit(mode: str) -> None:
    data = [pt2e_nets.image(), 3 * pt2e_nets.image(seed=1)]
    found = fxqfix.certify(pt2e_nets.prepared(mode, "residual"), "export", data)
    assert found.exact, str(found)
    assert found.pinned == found.narrow
    assert bool(found.narrow) == (mode in ("x86-reduced", "sub-8-bit"))
    assert found.sites
    assert not found.unchecked


def test_dynamic_sites_are_listed() -> None:
    found = fxqfix.certify(pt2e_nets.prepared("x86-dynamic", "mlp"), "export", [pt2e_nets.image()])
    assert found.verdict == "not judged"
    assert all(record.found.exact for record in (*found.sites, *found.outputs))
    assert {reason for _, reason in found.unchecked} == {"qparams are chosen at run time (dynamic)"}
    assert len(found.unchecked) == 3


def test_a_model_without_quantized_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight-only: what differs is a float, and is judged against float64."""

    def deploy(factor: float) -> Route:
        def inner(graph_module: fx.GraphModule, batch: object, dynamic: bool) -> Deployed:
            def run(*inputs: object) -> tuple[torch.Tensor, ...]:
                found = graph_module(*inputs)
                return tuple(v * factor for v in (found if isinstance(found, tuple) else (found,)))

            return Deployed(run)

        return Route("planted", "of a test", deploy=inner)

    model = pt2e_nets.prepared("weight-only", "residual")
    for factor, cause in ((1 + 2**-23, "rounding"), (1.001, "unexplained")):
        route = deploy(factor)
        monkeypatch.setattr(_registry, "ROUTES", {**_registry.ROUTES, route.name: route})
        found = fxqfix.certify(model, "planted", [pt2e_nets.image()])
        assert set(found.causes) == {cause}
        assert found.ok == (cause == "rounding")

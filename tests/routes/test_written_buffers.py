"""Models that write their buffers: every run starts from what was there, so runs are in step."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

pytest.importorskip("torchao", reason="PT2E needs torchao")

import torch
from torch import Tensor, fx, nn

import fxqfix
from fxqfix.measure import State
from fxqfix.routes import Deployed, Route, _registry
from tests.dialects import pt2e_nets
from tests.states import fingerprint


class Counting(nn.Module):
    """Counts its calls, and adds the count."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1.0)
        return self.layer(x.flatten(1)[:, :8]) + self.calls


class Averaging(nn.Module):
    """Subtracts a running mean, which it moves behind that."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, :8]
        y = self.layer(x - self.mean)
        self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        return y


NETS = {"calls": Counting, "mean": Averaging}
DATA = [pt2e_nets.image(seed=seed, gain=1.0 + seed) for seed in range(3)]
BY_CODES = pt2e_nets.Tiny(pt2e_nets.weight_spec(), pt2e_nets.activation_spec())


def prepared(buffer: str) -> fx.GraphModule:
    torch.manual_seed(0)
    return pt2e_nets.prepare(NETS[buffer](), BY_CODES)


@pytest.mark.parametrize("route", ["export", "float64", "inductor:lowered", "onnxruntime"])
@pytest.mark.parametrize("buffer", NETS)
def test_all_forms_start_from_one_state(buffer: str, route: str) -> None:
    if route == "onnxruntime":
        pytest.importorskip("onnxruntime", reason="the route needs it")
        pytest.importorskip("onnxscript", reason="the route needs it")
    model = prepared(buffer)
    before = fingerprint(model)
    found = fxqfix.certify(model, route, DATA)
    assert found.ok, str(found)
    assert found.exact or route != "export"
    assert any(note.startswith(f"the model writes {buffer}: ") for note in found.notes)
    assert fingerprint(model) == before


@pytest.mark.parametrize("buffer", NETS)
def test_a_file(buffer: str, tmp_path: Path) -> None:
    done = fxqfix.migrate(prepared(buffer), DATA, tmp_path / "model.pt2")
    assert done.ok, str(done)


def test_a_form_that_is_out_of_step_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    """A route that says nothing of its state, and counts on: no site explains its outputs."""

    def deploy(graph_module: fx.GraphModule, batch: object, dynamic: bool) -> Deployed:
        own = copy.deepcopy(graph_module)

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            found = own(*inputs)
            return found if isinstance(found, tuple) else (found,)

        return Deployed(run)

    routes = {**_registry.ROUTES, "planted": Route("planted", "of a test", deploy=deploy)}
    monkeypatch.setattr(_registry, "ROUTES", routes)
    found = fxqfix.certify(prepared("calls"), "planted", DATA)
    assert found.outputs[0].found.differing
    assert not found.ok


def test_state_is_put_back_where_a_run_fails() -> None:
    model = Counting()
    state = State(model)
    with pytest.raises(RuntimeError, match="shapes"), state.held():
        model(torch.ones(2, 3))
    assert state.written == ("calls",)
    assert torch.equal(model.calls, torch.zeros(4))
    with state.held():
        model(DATA[0])
    assert torch.equal(model.calls, torch.zeros(4))

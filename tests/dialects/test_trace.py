"""trace: an eager model and its trace compute the same bits and observe the same ranges."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao import quantization as tq

from fxqfix import trace
from fxqfix._torch import quiet
from fxqfix.errors import TraceError
from tests.dialects.nets import (
    EAGER,
    Plain,
    Shared,
    Stubs,
    calibrated,
    eager_ptq,
    fx_qat,
    image,
    int8,
)
from tests.states import bits, fingerprint, run, same


def assert_same_buffers(eager: nn.Module, graph: nn.Module) -> None:
    """The graph's buffers (those of the modules that it calls) are the eager model's."""
    wanted = dict(eager.named_buffers(remove_duplicate=False))
    found = dict(graph.named_buffers(remove_duplicate=False))
    assert found.keys() <= wanted.keys()
    assert {n: bits(b) for n, b in found.items()} == {n: bits(wanted[n]) for n in found}


def assert_same_model(model: nn.Module, batches: int = 3) -> fx.GraphModule:
    """The trace gives the same bits, batch after batch, and its observers move alike."""
    before = fingerprint(model)
    traced = trace(model)
    assert isinstance(traced, fx.GraphModule)
    assert fingerprint(model) == before
    eager, graph = copy.deepcopy(model), copy.deepcopy(traced)
    for seed in range(batches):
        x = image(seed=seed + 10, gain=1 + seed)
        with torch.no_grad():
            torch.manual_seed(0)
            wanted = eager(x.clone())
            torch.manual_seed(0)
            assert same(wanted, graph(x.clone()))
    assert_same_buffers(eager, graph)
    assert fingerprint(model) == before
    return traced


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", EAGER)
def test_prepared(name: str, mode: str) -> None:
    model = EAGER[name]().train(mode == "train")
    traced = assert_same_model(model)
    assert traced.training == (mode == "train")


@pytest.mark.parametrize("name", EAGER)
def test_converted(name: str) -> None:
    assert_same_model(int8(EAGER[name]()))


def test_every_observer_is_a_node() -> None:
    """Hooked observers and those of FloatFunctional alike; each observes as often as it did."""
    model = eager_ptq(Stubs())
    observed = [m for m in model.modules() if isinstance(m, tq.ObserverBase)]
    nodes = [n for n in trace(model).graph.nodes if "activation_post_process" in str(n.target)]
    assert len(nodes) == len(observed) - 1  # torch's mul_scalar does not run its observer
    shared = trace(eager_ptq(Shared()))
    targets = [n.target for n in shared.graph.nodes if "activation_post_process" in str(n.target)]
    assert len(targets) == len(set(targets)) + 1  # conv is called twice


def test_pre_hooks() -> None:
    """A dynamic (memoryless) activation is observed before the module, by a pre-hook."""
    with quiet():
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4)).train()
        net.qconfig = tq.default_dynamic_qat_qconfig
        mapping = tq.get_default_qat_module_mappings()
        mapping[nn.Linear] = torch.ao.nn.qat.dynamic.Linear
        model = calibrated(tq.prepare_qat(net, mapping))
    linear = model[1]
    assert linear._forward_pre_hooks
    traced = assert_same_model(model)
    order = [str(n.target) for n in traced.graph.nodes if n.op == "call_module"]
    assert order.index("1.activation_post_process") == order.index("1") - 1
    assert linear._forward_pre_hooks  # still there: the model is untouched
    assert not traced.get_submodule("1")._forward_pre_hooks


def test_hooks_of_the_user_stay() -> None:
    """Only torch's observer hooks are replaced by nodes."""
    calls: list[str] = []
    model = eager_ptq(Stubs())
    model.second.register_forward_hook(lambda *_: calls.append("hook"))
    traced = trace(model)
    calls.clear()
    run(traced, image())
    assert calls == ["hook"]


def test_graph_module_passes_through() -> None:
    prepared = fx_qat(Plain())
    for model in (prepared, int8(prepared), fx.symbolic_trace(Plain())):
        before = fingerprint(model)
        assert trace(model) is model
        assert fingerprint(model) == before


def test_modes_of_submodules_are_kept() -> None:
    """A frozen BatchNorm in a training model stays in eval mode."""
    model = EAGER["qat"]().train()
    model.bn.eval()
    traced = trace(model)
    assert traced.training
    assert traced.get_submodule("conv").training
    assert not traced.get_submodule("bn").training


def test_trace_owns_its_state() -> None:
    """Moving the trace moves nothing of the model."""
    model = eager_ptq(Stubs())
    traced = trace(model)
    before = fingerprint(model)
    with torch.no_grad():
        for p in traced.parameters():
            p.zero_()
    traced(image(gain=100))
    assert fingerprint(model) == before


class Counts(nn.Module):
    """Traceable, but the trace holds the number of the tracing run."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Counts.calls += 1
        return x * Counts.calls


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


class Sums(nn.Module):
    """Takes keywords and returns nested results."""

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Any]:
        return {"sum": a + b, "both": (a, [b])}


@pytest.mark.parametrize(
    "batch", [(torch.ones(2), torch.zeros(2)), {"b": torch.ones(2), "a": torch.zeros(2)}]
)
def test_example_inputs(batch: Any) -> None:
    state = torch.get_rng_state()
    assert isinstance(trace(Sums(), batch), fx.GraphModule)
    assert torch.equal(torch.get_rng_state(), state)


def test_trace_that_computes_something_else() -> None:
    with pytest.raises(TraceError, match=r"trace: the traced model computes something else"):
        trace(Counts(), torch.ones(2))


def test_random_models_are_compared_on_one_random_stream() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8)).train()
    trace(model, torch.ones(4, 8))


def test_not_traceable() -> None:
    model = DataDependent()
    before = fingerprint(model)
    with pytest.raises(
        TraceError, match=r"FX can't trace DataDependent.*To do: move control"
    ) as info:
        trace(model)
    assert isinstance(info.value, TypeError)
    assert fingerprint(model) == before


def test_not_copyable() -> None:
    model = nn.Linear(2, 2)
    model.kept = model(torch.ones(1, 2))  # a tensor with a history can't be copied
    with pytest.raises(TraceError, match=r"Linear can't be copied.*detach"):
        trace(model)


def test_not_a_module() -> None:
    with pytest.raises(TraceError, match=r"Found: function. Expected: torch.nn.Module"):
        trace(lambda x: x)  # type: ignore[arg-type]

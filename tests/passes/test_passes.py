"""Passes as such: results, edits, verification, composition, and golden graph texts."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn
from torch.ao.quantization import (
    QConfig,
    QConfigMapping,
    disable_observer,
    get_default_qat_qconfig_mapping,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx
from torch.fx.passes.infra.pass_manager import PassManager

import fxqfix
from fxqfix import passes
from fxqfix.errors import DialectError, PassError, UnsupportedError
from fxqfix.passes import (
    DecomposeQuantize,
    FoldBatchNorm,
    FreezeQParams,
    FrozenFakeQuantize,
    InsertShadows,
    PinRanges,
    RemoveShadows,
    Rewriter,
)
from tests.faults.injectors import data, trained
from tests.states import fingerprint

ROUTE = (FreezeQParams(), FoldBatchNorm(), DecomposeQuantize(), PinRanges())


def test_registry_names_are_kebab_case_and_documented() -> None:
    ours = {k: c for k, c in passes.registry().items() if c.__module__.startswith("fxqfix.")}
    assert ours.keys() >= {step.name for step in ROUTE}
    for name, cls in ours.items():
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", name)
        assert cls.name == name
        assert cls.__doc__


def test_a_pass_that_inherits_its_name_leaves_the_registry_alone() -> None:
    class Quieter(PinRanges):
        """A user's own, under the name of ours."""

    assert Quieter.name == PinRanges.name
    assert passes.registry()[PinRanges.name] is PinRanges


@pytest.mark.parametrize("step", range(len(ROUTE)))
def test_each_pass_is_functional_and_records_its_edits(step: int) -> None:
    model: Any = trained()
    for earlier in ROUTE[:step]:
        model = earlier(model).graph_module
    before = fingerprint(model)
    result = ROUTE[step](model)
    assert fingerprint(model) == before
    assert result.modified is bool(result.edits) is True
    assert result.graph_module is not model


@pytest.mark.parametrize("step", range(len(ROUTE)))
def test_each_pass_is_idempotent(step: int) -> None:
    model: Any = trained()
    for earlier in ROUTE[: step + 1]:
        model = earlier(model).graph_module
    again = ROUTE[step](model)
    assert not again.modified
    x = data()[0]
    assert torch.equal(again.graph_module(x), model(x))


def test_torchs_pass_manager_runs_them() -> None:
    prepared = trained()
    managed = PassManager(passes=list(ROUTE))(prepared)
    assert managed.modified
    x = data(2.0)[0]
    wanted = fxqfix.to_decomposed(prepared)
    assert torch.equal(managed.graph_module(x), wanted(x))
    assert managed.graph_module.code == wanted.code


def test_a_pass_prints_compares_and_hashes() -> None:
    narrow = DecomposeQuantize({"x": (0, 127)})
    assert PinRanges() == PinRanges()
    assert narrow != DecomposeQuantize()
    assert "'x': (0, 127)" in repr(narrow)
    assert hash(PinRanges()) == hash(PinRanges())


@dataclass(frozen=True)
class _Broken(passes.Pass):
    name: ClassVar[str] = ""  # stays out of the registry

    def rewrite(self, rewriter: Rewriter) -> None:
        rewriter.set_module("head", nn.Identity(), "spoilt")
        raise ZeroDivisionError("midway")


def test_a_pass_that_fails_midway_leaves_the_model_alone() -> None:
    model = trained()
    before = fingerprint(model)
    with pytest.raises(PassError, match=r"failed after 1 edits: midway") as caught:
        _Broken()(model)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert fingerprint(model) == before


def test_graph_passes_refuse_eager_modules() -> None:
    with pytest.raises(DialectError, match=r"expected a GraphModule|Expected: a GraphModule"):
        PinRanges()(nn.Linear(1, 1))


def test_frozen_fake_quant_is_what_torch_asks_for() -> None:
    frozen = FrozenFakeQuantize(fxqfix.QParams(0.5, 3, 0, 127, torch.quint8))
    assert isinstance(frozen, torch.ao.quantization.FakeQuantizeBase)
    x = torch.linspace(-5, 70, 1001)
    wanted = torch.fake_quantize_per_tensor_affine(x, 0.5, 3, 0, 127)
    assert torch.equal(frozen(x), wanted)
    frozen.apply(torch.ao.quantization.disable_fake_quant)
    assert torch.equal(frozen(x), x)
    frozen.apply(torch.ao.quantization.enable_fake_quant)
    assert torch.equal(frozen(x), wanted)


def test_frozen_fake_quant_passes_gradients_straight_through() -> None:
    frozen = FrozenFakeQuantize(fxqfix.QParams(0.5, 3, 0, 127, torch.quint8))
    x = torch.tensor([-9.0, 0.3, 99.0], requires_grad=True)
    frozen(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.tensor([0.0, 1.0, 0.0]))


def test_frozen_fake_quant_reads_its_qparams_from_the_buffers() -> None:
    frozen = FrozenFakeQuantize(fxqfix.QParams((0.5, 0.25), (0, 0), -8, 7, torch.qint8, 0))
    frozen.load_state_dict({**frozen.state_dict(), "scale": torch.tensor([2.0, 4.0])})
    assert frozen.qparams == fxqfix.QParams((2.0, 4.0), (0, 0), -8, 7, torch.qint8, 0)


def test_freeze_keeps_shared_observers_shared() -> None:
    prepared = trained()
    frozen = FreezeQParams()(prepared).graph_module
    groups: dict[int, set[str]] = {}
    for path, module in prepared.named_children():
        groups.setdefault(id(module), set()).add(path)
    for path, module in prepared.named_modules(remove_duplicate=False):
        if id(module) in groups and "." not in path:
            groups[id(module)].add(path)
    shared = [paths for paths in groups.values() if len(paths) > 1]
    assert shared  # the pool shares its input's observer
    for paths in shared:
        assert len({id(frozen.get_submodule(path)) for path in paths}) == 1
        assert isinstance(frozen.get_submodule(min(paths)), FrozenFakeQuantize)


def test_training_goes_on_after_freeze() -> None:
    frozen = fxqfix.freeze(trained()).train()
    optimizer = torch.optim.SGD(frozen.parameters(), lr=0.1)
    before = fxqfix.inspect(frozen)
    loss = frozen(data()[0]).square().sum()
    loss.backward()
    optimizer.step()
    after = fxqfix.inspect(frozen)
    assert [s.used for s in before] == [s.used for s in after]
    decomposed = fxqfix.to_decomposed(frozen.eval())
    assert torch.equal(decomposed(data()[0]), frozen(data()[0]))


def test_fold_refuses_what_it_does_not_know() -> None:
    import torch.ao.nn.intrinsic.qat as nniqat

    class Odd(nniqat.ConvBn2d):
        pass

    model: Any = trained()
    plain = model.stem
    model.stem = Odd(3, 8, 3, padding=1, qconfig=plain.qconfig)
    with pytest.raises(UnsupportedError, match=r"fold-batchnorm, stem"):
        FoldBatchNorm()(model)


def test_shadows_come_and_go_without_a_trace() -> None:
    prepared = trained()
    converted = convert_fx(copy.deepcopy(prepared))
    twin = InsertShadows(prepared)(converted)
    x = data(2.0)[0]
    assert torch.equal(twin.graph_module(x), converted(x))
    back = RemoveShadows()(twin.graph_module).graph_module
    assert str(back.graph) == str(converted.graph)
    assert set(dict(back.named_modules())) == set(dict(converted.named_modules()))
    assert not RemoveShadows()(converted).modified


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1, bias=False)

    def forward(self, x):  # an annotation would show in the golden text, as this torch spells it
        return torch.relu(self.conv(x)) + x


def _small() -> fx.GraphModule:
    """A model whose qparams are powers of two, so that golden texts hold round numbers."""
    mapping = QConfigMapping().set_global(
        QConfig(
            activation=torch.ao.quantization.FixedQParamsFakeQuantize.with_args(
                observer=torch.ao.quantization.FixedQParamsObserver.with_args(
                    scale=0.5, zero_point=3, quant_min=0, quant_max=127
                )
            ),
            weight=torch.ao.quantization.default_weight_fake_quant,
        )
    )
    x = torch.ones(1, 1, 2, 2)
    net = _Small().train()
    net.conv.weight.data.fill_(127.5 / 128)
    prepared = prepare_qat_fx(net, mapping, (x,))
    prepared(x)
    return prepared.eval().apply(disable_observer)


@pytest.mark.parametrize("pins", [False, True])
def test_decomposed_graph_text(golden: Callable[[str, str], None], pins: bool) -> None:
    decomposed = fxqfix.to_decomposed(_small(), pin_ranges=pins)
    golden(f"graph_decomposed{'_pinned' if pins else ''}", decomposed.code.strip())


def test_twin_graph_text(golden: Callable[[str, str], None]) -> None:
    prepared = _small()
    twin = InsertShadows(prepared)(fxqfix.to_decomposed(prepared, pin_ranges=False))
    lines = [str(node.format_node()) for node in twin.graph_module.graph.nodes]
    golden("graph_twin", "\n".join(lines))


def test_pin_ranges_leaves_full_ranges_alone() -> None:
    x = torch.randn(4, 8)
    net = nn.Sequential(nn.Linear(8, 2)).train()
    prepared = prepare_qat_fx(net, get_default_qat_qconfig_mapping("qnnpack"), (x,))
    prepared(x)
    decomposed = DecomposeQuantize()(fxqfix.freeze(prepared)).graph_module
    assert not PinRanges()(decomposed).modified  # qnnpack declares [0, 255]

"""What stands in for known modules of the prepared branch gives the same bits, or is not used."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

import fxqfix
from fxqfix.passes import InsertShadows
from fxqfix.passes._codes import codes_and_values, codes_of
from fxqfix.passes._held import Checked, HeldQuantize, HeldWeight
from fxqfix.qparams import QParams, quantize

GRIDS = [QParams(0.05, 3, 0, 127, torch.quint8), QParams(0.03, 0, -128, 127, torch.qint8)]


def net() -> nn.Sequential:
    first = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)]
    second = [nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    third = [nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 8)]
    return nn.Sequential(*first, *second, *third)


def models(change: Any = None) -> tuple[Any, Any, list[torch.Tensor]]:
    torch.manual_seed(0)
    batches = [torch.rand(4, 3, 12, 12) for _ in range(3)]
    prepared = prepare_qat_fx(
        net().train(), get_default_qat_qconfig_mapping("fbgemm"), (batches[0],)
    )
    prepared(batches[0])
    prepared.eval()
    if change is not None:
        change(prepared)
    return prepared, convert_fx(copy.deepcopy(prepared)), batches


def stand_ins(prepared: Any, converted: Any) -> list[Any]:
    twin = InsertShadows(prepared, noise_floor=False)(converted).graph_module
    found = twin.get_submodule("fxqfix_prepared").modules()
    return [m for m in (*found, *twin.children()) if isinstance(m, (HeldWeight, HeldQuantize))]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@given(seed=st.integers(0, 2**16), size=st.sampled_from([1, 7, 2**16, 2**16 + 3]))
def test_codes_and_values_are_those_of_the_fake_quant(grid: QParams, seed: int, size: int) -> None:
    x = 8 * torch.randn(size, generator=torch.Generator().manual_seed(seed))
    x[0] = grid.scales[0] * 2.5  # a tie
    wanted = torch.fake_quantize_per_tensor_affine(
        x, grid.scales[0], int(grid.zero_points[0]), grid.quant_min, grid.quant_max
    )
    found = codes_and_values(x, grid)
    assert found is not None
    assert torch.equal(found[0], quantize(x, grid).to(grid.storage))
    assert torch.equal(found[1].view(torch.int32), wanted.view(torch.int32))
    assert torch.equal(codes_of(x, grid), found[0])
    assert codes_and_values(x, grid, overwrite=True) is not None
    assert torch.equal(x.view(torch.int32), wanted.view(torch.int32))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_kernels_make_their_own_of_is_left_to_them(value: float) -> None:
    assert codes_and_values(torch.tensor([1.0, value]), GRIDS[0]) is None


def test_the_prepared_branch_runs_stand_ins_of_the_same_bits() -> None:
    prepared, converted, batches = models()
    twin = InsertShadows(prepared, noise_floor=False)(converted).graph_module
    known = [m for m in twin.modules() if isinstance(m, Checked)]
    with torch.no_grad():
        for batch in batches:
            twin(batch)
    weights = [m for m in known if isinstance(m, HeldWeight)]
    assert len(weights) == 2 * 4  # of the prepared branch, and of the shadows
    assert len({id(m._weight) for m in weights}) == 4
    assert len(known) - len(weights) == len(prepared.graph.find_nodes(op="call_module")) - 6
    assert all(m.trusted for m in known)


def a_hook(prepared: nn.Module) -> None:
    prepared.get_submodule("0").register_forward_hook(lambda *_: None)


def train_mode(prepared: nn.Module) -> None:
    prepared.get_submodule("0").train()


def a_forward(prepared: Any) -> None:
    prepared.get_submodule("0").forward = type(prepared.get_submodule("0")).forward.__get__(
        prepared.get_submodule("0")
    )


class OwnConv(torch.ao.nn.intrinsic.qat.ConvBn2d):
    pass


def own_class(prepared: Any) -> None:
    prepared.get_submodule("0").__class__ = OwnConv


@pytest.mark.parametrize("change", [a_hook, train_mode, a_forward, own_class])
def test_code_of_the_users_own_runs_as_it_is(change: Any) -> None:
    prepared, converted, _ = models()
    change(prepared)
    paths = {m.site for m in stand_ins(prepared, converted) if isinstance(m, HeldWeight)}
    assert paths == {"3", "6", "9"}


def test_where_the_bits_differ_the_users_own_module_runs(monkeypatch: Any) -> None:
    prepared, converted, batches = models()
    wanted = fxqfix.compare(prepared, converted, batches)
    computed = HeldWeight._computed
    monkeypatch.setattr(HeldWeight, "_computed", lambda self, x: computed(self, x) + 1e-7)
    found = fxqfix.compare(prepared, converted, batches)
    assert found.to_json() == wanted.to_json()
    assert found.verdict == wanted.verdict != "not judged"


def test_a_stand_in_that_strays_later_is_named(monkeypatch: Any) -> None:
    prepared, converted, batches = models()
    assert not fxqfix.compare(prepared, converted, batches).coverage.unsupported
    calls = 0
    computed = HeldWeight._computed

    def strays(self: HeldWeight, x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += self.site == "3"
        return computed(self, x) + (1.0 if self.site == "3" and calls > 2 else 0.0)

    monkeypatch.setattr(HeldWeight, "_computed", strays)
    report = fxqfix.compare(prepared, converted, batches, noise_floor=False, local=False)
    assert [u.name for u in report.coverage.unsupported] == ["3"]
    assert not report.ok

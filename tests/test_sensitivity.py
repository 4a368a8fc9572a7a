"""sensitivity: each variant is what torch prepares with that module's qconfig None, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_fx, prepare_qat_fx

import fxqfix
from fxqfix import Discrepancy, Sensitivity
from fxqfix.errors import DialectError, PairingError, UnknownNameError, UnsupportedError
from tests.states import fingerprint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.last(F.relu(self.bn(self.conv(x)))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 3), Block(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.block(F.relu(self.stem(x)))
        return self.head(y.mean((2, 3))), y


NAMES = ["stem", "block.conv", "block.last", "head", "block"]


def calibrated(net: nn.Module, mapping: Any, data: list[Tensor], *, qat: bool) -> nn.Module:
    torch.manual_seed(1)
    make = prepare_qat_fx if qat else prepare_fx
    prepared = make(copy.deepcopy(net).train(qat), mapping, (data[0],))
    if qat:  # BatchNorm's statistics stay, so that both calibrations see the same values
        prepared.eval()
        prepared.apply(tq.disable_fake_quant)
    for x in data:
        prepared(x)
    if qat:
        prepared.apply(tq.enable_fake_quant)
    return prepared.eval()


def noise(net: nn.Module, model: nn.Module, data: list[Tensor]) -> Discrepancy:
    found = Discrepancy()
    with torch.no_grad():
        for x in data:
            for a, b in zip(net(x), model(x), strict=True):
                apart = (b.double() - a.double()).square().sum().item()
                found += Discrepancy(
                    elements=a.numel(), signal=a.double().square().sum().item(), noise=apart
                )
    return found


@pytest.mark.parametrize("qat", [False, True], ids=["ptq", "qat"])
def test_each_variant_is_what_torch_prepares(qat: bool) -> None:
    torch.manual_seed(0)
    net, data = Net().eval(), [torch.randn(2, 3, 8, 8) for _ in range(2)]
    get = get_default_qat_qconfig_mapping if qat else get_default_qconfig_mapping
    mapping = get("qnnpack")  # observers of minimum and maximum
    prepared = calibrated(net, mapping, data, qat=qat)
    before = fingerprint(prepared), fingerprint(net), torch.get_rng_state()
    found = fxqfix.sensitivity(prepared, data, float_model=net, modules=NAMES)
    assert (fingerprint(prepared), fingerprint(net)) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert found.batches == 2
    whole = noise(net, fxqfix.freeze(prepared), data)
    assert (found.quantized.noise, found.quantized.signal) == (whole.noise, whole.signal)
    gains = []
    for name in NAMES:
        other = copy.deepcopy(mapping)
        paths = ["block.conv", "block.bn", "block.last", "block"] if name == "block" else [name]
        for path in [*paths, *(["block.bn"] if name == "block.conv" else [])]:
            other.set_module_name(path, None)
        wanted = noise(net, fxqfix.freeze(calibrated(net, other, data, qat=qat)), data)
        row = found.row(name)
        if qat and "block" in name:
            # reason: without a qconfig torch runs convolution and BatchNorm apart; QAT fuses them
            assert row.after.noise == pytest.approx(wanted.noise, rel=1e-6), name
        else:
            assert row.after.noise == wanted.noise, name
        assert row.gain_db == row.after.sqnr_db - found.quantized.sqnr_db
        gains.append(row.gain_db)
    assert [r.gain_db for r in found.rows] == sorted(gains, reverse=True)
    assert max(gains) > 0
    default = fxqfix.sensitivity(prepared, data, float_model=net)
    assert {r.name for r in default.rows} == set(NAMES) - {"block"}


def test_the_qconfig_that_says_so() -> None:
    rows = tuple(
        fxqfix.LeftInFloat(name, 1, Discrepancy(), gain) for name, gain in (("a", 2.0), ("b", 0.5))
    )
    mapping = get_default_qconfig_mapping("fbgemm")
    found = Sensitivity(rows, Discrepancy(), 1).qconfig_mapping(mapping)
    assert found.module_name_qconfigs == {"a": None}
    assert "a" not in mapping.module_name_qconfigs


def test_eager_models() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    net = nn.Sequential(tq.QuantStub(), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), tq.DeQuantStub())
    prepared = copy.deepcopy(net).eval()
    prepared.qconfig = tq.get_default_qconfig("fbgemm")
    prepared = tq.prepare(prepared)
    prepared(x)
    found = fxqfix.sensitivity(prepared, [x], float_model=net)
    assert {row.name for row in found.rows} == {"1", "2"}
    assert any(row.gain_db > 0 for row in found.rows)
    assert all(row.quantizers for row in found.rows)


def test_bad_input() -> None:
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(2, 3, 8, 8)
    prepared = calibrated(net, get_default_qconfig_mapping("fbgemm"), [x], qat=False)
    with pytest.raises(UnknownNameError, match="nothing is quantized in a module 'blok'"):
        fxqfix.sensitivity(prepared, [x], float_model=net, modules=["blok"])
    with pytest.raises(PairingError, match="other tensors"):
        fxqfix.sensitivity(prepared, [x], float_model=net.stem)
    with pytest.raises((PairingError, DialectError)):
        fxqfix.sensitivity(net, [x], float_model=net)


def test_exported_models_are_refused() -> None:
    quantizer = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    x, net = torch.randn(2, 8), nn.Sequential(nn.Linear(8, 3)).eval()
    config = quantizer.get_default_x86_inductor_quantization_config()
    made = quantizer.X86InductorQuantizer().set_global(config)
    prepared = prepare_pt2e(torch.export.export(net, (x,)).module(), made)
    prepared(x)
    with pytest.raises(UnsupportedError, match="have no qconfig"):
        fxqfix.sensitivity(prepared, [x], float_model=net)

"""hold-weights: what conversion bakes of weights that left their fake-quant's range."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.quantization import (
    FakeQuantize,
    PerChannelMinMaxObserver,
    QConfig,
    QConfigMapping,
    disable_observer,
    get_default_qat_qconfig,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

import fxqfix
from fxqfix.dialects import read
from fxqfix.passes import FoldBatchNorm, FreezeQParams, HoldWeights, chain

NARROW = FakeQuantize.with_args(
    observer=PerChannelMinMaxObserver,
    quant_min=-127,
    quant_max=127,
    dtype=torch.qint8,
    qscheme=torch.per_channel_symmetric,
)
X = torch.linspace(-1, 1, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8)


class Net(nn.Module):
    """Convolution with BatchNorm, linear, and a function's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head, self.last = nn.Linear(8, 8), nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        return F.linear(self.head(x), self.last)


def trained(net: nn.Module) -> fx.GraphModule:
    """Weights that grew on after their observers were off: some are beyond code -127.5."""
    activation = get_default_qat_qconfig("fbgemm").activation
    mapping = QConfigMapping().set_global(QConfig(activation, NARROW))
    prepared: fx.GraphModule = prepare_qat_fx(net.train(), mapping, (X,))
    prepared(X)
    prepared.eval().apply(disable_observer)
    with torch.no_grad():
        for name, parameter in prepared.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.1)
                assert parameter.abs().amax() > 0, name
    return prepared


def codes(model: nn.Module) -> dict[str, Tensor]:
    taps = read(model).weights
    return {t.site.name: t.weight().codes.int() for t in taps if t.weight is not None}


def test_conversion_bakes_the_codes_that_were_trained() -> None:
    prepared = trained(Net())
    before = copy.deepcopy(prepared.state_dict())
    unheld = chain(prepared, FreezeQParams(), FoldBatchNorm()).graph_module
    frozen = fxqfix.freeze(prepared)
    assert all(torch.equal(v, before[k]) for k, v in prepared.state_dict().items())
    for gain in (1, 3):
        assert torch.equal(frozen(gain * X), unheld(gain * X))  # not a bit moves
    wanted, wide, held = codes(frozen), codes(convert_fx(unheld)), codes(convert_fx(frozen))
    assert len(wanted) == 3
    for name, own in wanted.items():
        assert int(own.min()) >= -127
        assert int(wide[name].min()) == -128  # or this test could not fail
        assert torch.equal(held[name], own)
    again = HoldWeights()(fxqfix.freeze(frozen))
    assert not again.modified


@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
def test_compare_names_it_and_repair_mends_it(engine: str) -> None:
    torch.backends.quantized.engine = engine
    prepared = trained(Net())
    unheld = chain(prepared, FreezeQParams(), FoldBatchNorm()).graph_module
    plain = convert_fx(copy.deepcopy(unheld))
    report = fxqfix.compare(unheld, plain, [0.5 * X], engine=engine)
    assert report.unexplained == 0
    wrong = [r for r in report.rows if r.kind == "activation" and "range-lost" in r.causes]
    assert wrong
    assert any("declared [-127,127]" in r.evidence["range-lost"] for r in wrong)
    done = fxqfix.repair(unheld, plain, data=[0.5 * X])
    after = fxqfix.compare(unheld, done.graph_module, [0.5 * X], engine=engine)
    assert "range-lost" not in after.causes
    assert all(row.exact for row in after.rows if row.kind == "weight")


class Tied(nn.Module):
    """A weight that is read in float too, and one that two linears share."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 8)
        self.c = nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(self.conv(x).mean((2, 3))))
        return self.c(x) + self.c.weight.sum()


def test_a_weight_that_others_read_is_left_alone() -> None:
    prepared = trained(Tied())
    unheld = chain(prepared, FreezeQParams(), FoldBatchNorm()).graph_module
    result = HoldWeights()(unheld)
    held = [edit.split(":")[0] for edit in result.edits]
    assert held == ["conv.weight", "a.weight"]  # a and b quantize it alike
    assert torch.equal(result.graph_module(X), unheld(X))
    with torch.no_grad():
        unheld.get_submodule("b").weight_fake_quant.scale.mul_(2)  # type: ignore[union-attr]
    apart = HoldWeights()(unheld)
    assert [edit.split(":")[0] for edit in apart.edits] == ["conv.weight"]
    assert torch.equal(apart.graph_module(X), unheld(X))

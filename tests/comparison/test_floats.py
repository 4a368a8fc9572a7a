"""compare(float_model=): what quantization costs at each site, against hooks and NumPy."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.ao.quantization as tq
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import fxqfix
from fxqfix import Report
from fxqfix.comparison import in_float
from fxqfix.errors import ModelRunError, PairingError
from tests.states import fingerprint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.deep, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.relu(self.bn(self.conv(x)))
        y = y + torch.relu(self.deep(y))
        return self.head(y.mean((2, 3))), {"features": y}


def models(*, qat: bool) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    net, data = Net().train(qat), [torch.randn(4, 3, 8, 8) for _ in range(2)]
    make = prepare_qat_fx if qat else prepare_fx
    mapping = (get_default_qat_qconfig_mapping if qat else get_default_qconfig_mapping)("fbgemm")
    prepared = make(copy.deepcopy(net), mapping, (data[0],))
    for x in data:
        prepared(x)
        net(x)  # the same running statistics
    return net.eval(), prepared.eval(), data


def compared(net: Any, prepared: nn.Module, data: Any, **options: Any) -> Report:
    return fxqfix.compare(
        prepared, None, data, engine="fbgemm", float_model=net, attribute=False, **options
    )


def sqnr(pairs: list[tuple[Tensor, Tensor]]) -> float:
    real, value = (np.concatenate([p[i].double().numpy().ravel() for p in pairs]) for i in (0, 1))
    return float(10 * np.log10((real**2).sum() / ((value - real) ** 2).sum()))


class _Values(fx.Interpreter):
    """Keeps what each quantizer gives, by the name of what it quantizes."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if "activation_post_process" in str(n.target):
            self.__dict__.setdefault("quantized", {})[n.all_input_nodes[0].name] = value
        return value


@pytest.mark.parametrize("qat", [False, True], ids=["ptq", "qat"])
def test_the_figures_are_those_of_hooks(qat: bool) -> None:
    net, prepared, data = models(qat=qat)
    frozen = fxqfix.freeze(prepared)
    before = fingerprint(net), fingerprint(prepared), torch.get_rng_state()
    report = compared(net, prepared, data)
    assert (fingerprint(net), fingerprint(prepared)) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert not any("no node of the float model" in note for note in report.notes)
    # Site -> the float module whose output it is, and the prepared quantizer.
    places = {"conv": "relu", "head": "head"}
    found: dict[str, list[tuple[Tensor, Tensor]]] = {"output 0": [], "output 1": []}
    seen: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda m, a, y, n=name: seen.__setitem__(n, y))
    for x in data:
        with torch.no_grad():
            wanted, given = net(x), frozen(x)
            run = _Values(frozen)
            run.run(x)
        found["output 0"].append((wanted[0], given[0]))
        found["output 1"].append((wanted[1]["features"], given[1]["features"]))
        for site, place in places.items():
            found.setdefault(site, []).append((seen[place].clone(), run.quantized[site]))
    for name, pairs in found.items():
        figures = report.row(name).quantization
        assert figures is not None, name
        assert figures.elements == sum(real.numel() for real, _ in pairs)
        # reason: NumPy adds float64 in another order
        assert figures.sqnr_db == pytest.approx(sqnr(pairs), abs=1e-9)
        assert 5 < figures.sqnr_db < 60


def test_every_site_has_a_figure_and_weights_have_none() -> None:
    net, prepared, data = models(qat=True)
    report = compared(net, prepared, data)
    for row in report.rows:
        assert (row.quantization is None) == (row.kind == "weight"), row.name
    assert "quant. dB" in str(report)
    assert report.to_json() == Report.from_json(report.to_json()).to_json()
    assert Report.from_json(report.to_json()).rows == report.rows
    frame = report.to_csv().splitlines()[0]
    assert "quantization_db" in frame
    plain = compared(None, prepared, data)
    assert "quant. dB" not in str(plain)
    assert all(row.quantization is None for row in plain.rows)


def test_batches_add_up() -> None:
    net, prepared, data = models(qat=False)
    both = compared(net, prepared, data)
    parts = [compared(net, prepared, [x]) for x in data]
    for row, a, b in zip(both.rows, parts[0].rows, parts[1].rows, strict=True):
        if row.quantization is not None and a.quantization and b.quantization:
            total = a.quantization + b.quantization
            assert total.elements == row.quantization.elements
            assert total.noise == pytest.approx(row.quantization.noise, rel=1e-12)  # reason: order
    merged = parts[0].merge(parts[1])
    assert merged.row("conv").quantization == (
        parts[0].row("conv").quantization + parts[1].row("conv").quantization
    )


def test_the_code_of_the_float_value_is_counted() -> None:
    """A layer that is the identity: codes differ where quantized inputs round otherwise."""
    net, prepared, data = models(qat=False)
    row = compared(net, prepared, data).row("x")
    assert row.quantization is not None
    assert row.quantization.differing == 0  # the input's own code, by definition
    assert row.quantization.max_abs > 0
    assert compared(net, prepared, data).row("deep").quantization.differing > 0


def test_eager_models() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    parts = [tq.QuantStub(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), tq.DeQuantStub()]
    net = nn.Sequential(*parts).eval()
    fused = tq.fuse_modules(copy.deepcopy(net), ["1", "2", "3"])
    fused.qconfig = tq.get_default_qconfig("fbgemm")
    prepared = tq.prepare(fused)
    prepared(x)
    report = compared(net, prepared, [x])
    figures = [row.quantization for row in report.rows if row.kind != "weight"]
    assert all(f is not None and 20 < f.sqnr_db < 60 for f in figures)
    assert len(figures) >= 3


def test_exported_models() -> None:
    quantizer = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    torch.manual_seed(0)
    x = torch.randn(2, 8)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    config = quantizer.get_default_x86_inductor_quantization_config()
    made = quantizer.X86InductorQuantizer().set_global(config)
    prepared = prepare_pt2e(torch.export.export(net, (x,)).module(), made)
    prepared(x)
    report = compared(net, prepared, [x])
    figures = [row.quantization for row in report.rows if row.kind == "activation"]
    assert figures
    assert all(f is not None and f.sqnr_db > 20 for f in figures)


def test_a_model_that_was_trained_since_is_said() -> None:
    net, prepared, data = models(qat=True)
    assert not any("trained since" in note for note in compared(net, prepared, data).notes)
    with torch.no_grad():
        prepared.get_submodule("deep").weight.add_(0.1)
    assert any("1 layers have other weights" in n for n in compared(net, prepared, data).notes)


def _swapped() -> tuple[nn.Module, nn.Module, list[Any]]:
    class Ordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(x) + y

    class Swapped(Ordered):
        def forward(self, y: Tensor, x: Tensor) -> Tensor:
            return super().forward(x, y)

    torch.manual_seed(0)
    net, batch = Ordered().eval(), (torch.randn(2, 4), torch.randn(2, 4))
    prepared = prepare_fx(copy.deepcopy(net), get_default_qconfig_mapping("fbgemm"), batch)
    prepared(*batch)
    other = Swapped().eval()
    other.load_state_dict(net.state_dict())
    return other, prepared, [batch]


@pytest.mark.parametrize("case", ["statistics", "checkpoint", "inputs"])
def test_another_float_function_is_said(case: str) -> None:
    """What is no work of the quantizers is named, and how large it is."""
    net, prepared, data = models(qat=case == "statistics")
    assert not any("without its quantizers" in n for n in compared(net, prepared, data).notes)
    if case == "statistics":
        prepared.train()(data[0])
        prepared.eval()
    elif case == "checkpoint":
        net.get_submodule("head").bias.data.add_(0.5)
    else:
        net, prepared, data = _swapped()
    report = compared(net, prepared, data)
    said = next(n for n in report.notes if "without its quantizers" in n)
    assert "moved BatchNorm statistics, rounding in half precision, or inputs" in said
    found = fxqfix.sensitivity(prepared, data, float_model=net)
    assert found.in_float is not None
    assert found.in_float.sqnr_db < 40
    assert f"without any quantizer: {found.in_float.sqnr_db:.1f} dB" in str(found)


def test_a_quantizer_that_stands_under_two_names_is_left_out_too() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 4), nn.MaxPool1d(2), nn.Linear(2, 2)).eval(), torch.rand(4)
    mapping, x = get_default_qat_qconfig_mapping("fbgemm"), x[None]
    prepared = prepare_qat_fx(copy.deepcopy(net).train(), mapping, (x,)).eval()
    prepared(x)
    names = [n for n, _ in prepared.named_modules(remove_duplicate=False) if "post" in n]
    assert len(names) > len([n for n, _ in prepared.named_modules() if "post" in n])
    assert torch.equal(in_float(prepared)(x), net(x))


def test_bad_float_models() -> None:
    _, prepared, data = models(qat=False)
    with pytest.raises(PairingError, match="the float model is quantized"):
        compared(prepared, prepared, data)
    for bad, named in ((convert_fx(copy.deepcopy(prepared)), "fx-int8"), (len, "is no module")):
        for call in (compared, lambda n, p, d: fxqfix.sensitivity(p, d, float_model=n)):
            with pytest.raises(PairingError, match=named):
                call(bad, prepared, data)
    with pytest.raises(PairingError, match="other inputs"):
        compared(nn.Bilinear(2, 2, 2), prepared, data)
    with pytest.raises(ModelRunError, match="the float model can't run"):
        compared(nn.Linear(3, 3), prepared, data)


def test_a_site_that_the_float_model_lacks_is_said() -> None:
    _, prepared, data = models(qat=False)
    report = compared(nn.Conv2d(3, 8, 3), prepared, data)
    said = "; ".join(report.notes)
    assert "sites are no node of the float model: conv" in said
    assert report.row("conv").quantization is None

"""Route "executorch": XNNPACK's integers, the ranges that they hold, and what is refused."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx

from fxqfix import certify, compare, dialects, freeze, inspect, to_decomposed
from fxqfix._torch import quiet
from fxqfix.errors import MissingDependencyError, RouteError
from fxqfix.passes import CutSites, PassResult, SuitXnnpack
from fxqfix.passes.cut_sites import cut_points
from fxqfix.routes import SiteView, executorch
from fxqfix.routes._seen import Seen
from fxqfix.routes._xnnpack import codes_of_site
from tests.routes.nets import GAINS, image


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "executorch", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'fxqfix\[executorch\]'"):
        certify(_decomposed(Small()), "executorch", [image()])


class Small(nn.Module):
    """A convolution with relu and one without, and an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.body(x) + x


class Every(nn.Module):
    """Each op whose integers are known, in the forms that XNNPACK has kernels for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU6()
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.grouped = nn.Conv2d(16, 8, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 16, 2, 2)
        self.gate, self.head = nn.Conv2d(16, 16, 1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        y = self.deep(x)
        z = self.up(F.relu(self.grouped(y)))
        x = torch.relu(x + z) + y
        x = x * self.gate(F.adaptive_avg_pool2d(x, 1))
        x = torch.cat([F.max_pool2d(x, 2), F.max_pool2d(y, 2)], 1)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _decomposed(net: nn.Module, pinned: bool = True) -> fx.GraphModule:
    torch.manual_seed(0)
    mapping = get_default_qat_qconfig_mapping("fbgemm")
    if any(isinstance(m, nn.ConvTranspose2d) for m in net.modules()):
        mapping = get_default_qat_qconfig_mapping("qnnpack")  # per tensor, which all kernels take
    prepared = prepare_qat_fx(net.train(), mapping, (image(),))
    with torch.no_grad():
        prepared(image())
    return to_decomposed(prepared.eval(), pin_ranges=pinned)


needed = pytest.mark.usefixtures("installed")


@pytest.fixture
def installed() -> None:
    with quiet():
        pytest.importorskip("executorch", reason='the extra "executorch" is not installed')


@needed
def test_xnnpacks_integers() -> None:
    """Every code of every int8 op, those that differ from the graph's and those that don't."""
    model = _decomposed(Every())
    reading = dialects.read(model)
    seen = Seen(model, reading)
    with torch.no_grad():
        x = 2 * image(batch=16, seed=3) - 0.5
        seen.run(x)
        sites = cut_points(reading)
        given = (x, *(seen.values[node] for node in sites))
        form = executorch.ROUTE.deploy(CutSites()(model).graph_module, given, False)
        found = dict(zip(sites, form.run(*given), strict=True))
    checked, differing = [], 0
    for tap in reading.activations:
        grid = tap.site.used
        view = SiteView(
            reading,
            tap,
            grid,
            seen.values,
            seen.values[tap.producer],
            seen.values[tap.node],
            found[tap.node],
        )
        own = codes_of_site(view)
        if own is None:
            assert torch.equal(view.found, view.wanted), tap.site
            continue
        clamped = own.clamp(grid.quant_min, grid.quant_max)
        assert torch.equal(clamped, view.found.int()), tap.site
        checked.append(tap.site.op)
        differing += int((view.found != view.wanted).sum())
    assert differing > 0  # the graph's own codes would not do
    assert {op.removesuffix("_relu") for op in checked} >= {
        "conv2d",
        "conv_transpose2d",
        "linear",
        "add",
        "mul",
        "adaptive_avg_pool2d",
    }


@needed
def test_the_range_is_held_with_pins_and_lost_without() -> None:
    data = [gain * image(seed=seed) for seed, gain in enumerate(GAINS)]
    pinned = certify(_decomposed(Small()), "executorch", data)
    assert pinned.ok, str(pinned)
    assert pinned.out_of_range == 0
    assert pinned.narrow == pinned.pinned == 4
    assert pinned.differing <= 0.01 * sum(s.found.elements for s in pinned.sites)
    assert set(pinned.causes) <= {"requantization"}
    kernels = dict(pinned.kernels)
    assert kernels == {"aten.convolution": 2, "aten.add.Tensor": 1, "aten.clamp": 4}
    assert not any("float32" in note or "portable" in note for note in pinned.notes)
    plain = certify(_decomposed(Small(), pinned=False), "executorch", data)
    assert not plain.ok
    assert plain.out_of_range > 0
    assert plain.causes["range-lost"] > 0
    assert plain.unexplained == 0
    assert {k: n for k, n in kernels.items() if "clamp" not in k} == dict(plain.kernels)


@needed
def test_pt2e_models_of_its_own_quantizer() -> None:
    """QAT with a narrow range; a convolution that is called twice, max pool and cat."""
    from tests.dialects import pt2e_nets

    with quiet():
        from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as own

        config = own.get_symmetric_quantization_config(
            is_per_channel=True, is_qat=True, act_qmin=-64, act_qmax=63
        )
        quantizer = own.XNNPACKQuantizer().set_global(config)
    prepared = pt2e_nets.prepare(pt2e_nets.NETS["branches"](), quantizer, qat=True)
    data = [gain * pt2e_nets.image(seed=seed) for seed, gain in enumerate(GAINS)]
    held, frozen = pt2e_nets.held(prepared), freeze(prepared)
    converted = pt2e_nets.convert(frozen)
    with torch.no_grad():
        for x in data:
            assert torch.equal(held(x), frozen(x))
            assert torch.equal(held(x), converted(x))
        assert not torch.equal(held(data[0]), pt2e_nets.convert(prepared)(data[0]))
    report = compare(prepared, None, data)
    assert report.unexplained == 0
    assert report.coverage.unpaired == report.coverage.unsupported == ()
    assert sum(r.kind != "output" for r in report.rows) == len(inspect(prepared).sites)
    found = certify(prepared, "executorch", data)
    assert found.ok, str(found)
    assert found.out_of_range == 0
    assert found.integer_kernels >= 3


@needed
def test_inputs_with_defaults_may_be_left_out() -> None:
    class Optional(Small):
        def forward(self, x: Tensor, scale: float = 1.0, *, flag: Any = None) -> Tensor:
            return super().forward(x)

    model = _decomposed(Optional())
    found = [certify(model, "executorch", [batch]) for batch in (image(), (image(), 1.0))]
    assert all(c.ok and not c.unchecked and c.integer_kernels >= 3 for c in found)


@needed
def test_a_graph_that_can_t_be_lowered() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    model = _decomposed(nn.Sequential(nn.Conv2d(3, 3, 1), Odd()))
    with pytest.raises(RouteError, match="route executorch: the route can't lower this graph"):
        certify(model, "executorch", [image()])


@needed
def test_codes_read_as_floats_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What executorch makes of a clamp between a convolution and its quantize op."""

    class Nothing:
        def __call__(self, model: Any) -> PassResult:
            return PassResult(model, False)

    monkeypatch.setattr(executorch, "SuitXnnpack", Nothing)
    q, dq = (
        getattr(torch.ops.quantized_decomposed, f"{n}_per_tensor")
        for n in ("quantize", "dequantize")
    )
    grid = (0.05, 0, -128, 127, torch.int8)

    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.ones(3, 3, 1, 1, dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(dq(q(x, *grid), *grid), dq(self.weight, *grid)).clamp(-1.0, 1.0)
            return dq(q(x, *grid), *grid)

    with quiet():
        model = torch.export.export(Clamped(), (image(),)).module()
    with pytest.raises(RouteError, match="reads codes as floats"):
        certify(model, "executorch", [image()])


@needed
@pytest.mark.parametrize(("kernel", "padding"), [(3, "same"), (2, "same"), (3, "valid"), (2, 1)])
def test_kernels_are_those_that_ran(kernel: int, padding: str | int) -> None:
    """padding="same" of an even kernel is a pad in front: the convolution runs on integers."""
    from tests.dialects import pt2e_nets

    with quiet():
        from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as own

        config = own.get_symmetric_quantization_config(is_per_channel=True)
        quantizer = own.XNNPACKQuantizer().set_global(config)
    torch.manual_seed(0)
    first, last = (nn.Conv2d(*n, kernel, padding=padding) for n in ((3, 8), (8, 4)))
    prepared = pt2e_nets.prepare(nn.Sequential(first, nn.ReLU(), last), quantizer)
    found = certify(prepared, "executorch", [pt2e_nets.image(seed=s) for s in range(3)])
    assert found.ok, str(found)
    assert dict(found.kernels)["aten.convolution"] == 2
    assert not any("float32" in note for note in found.notes)


@pytest.mark.parametrize("idle", [nn.Dropout(0.5), nn.Identity()], ids=["dropout", "identity"])
@pytest.mark.parametrize("last", [False, True])
def test_what_does_nothing_stops_no_look(idle: nn.Module, last: bool) -> None:
    pytest.importorskip("torchao", reason="PT2E needs torchao")
    from tests.dialects import pt2e_nets

    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), idle, nn.Conv2d(4, 4, 3), *([idle] if last else [])]
    prepared = pt2e_nets.prepare(nn.Sequential(*layers), pt2e_nets.xnnpack(is_per_channel=True))
    found = certify(prepared, "executorch", [pt2e_nets.image()])
    assert found.ok, str(found)
    assert not found.unchecked
    assert len(found.sites) >= 3


@needed
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "second",
    [
        {"stride": 2, "padding": 1, "dilation": 2, "groups": 2},
        {"padding": "same"},
    ],
    ids=["options", "same"],
)
def test_1d_convolutions_with_weights_of_one_sign(second: dict[str, Any], bias: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3, bias=bias, **second))
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        net[2].weight.abs_()
    mapping = get_default_qat_qconfig_mapping("fbgemm")
    prepared = prepare_qat_fx(net.train(), mapping, (x,))
    prepared(x)
    graph = to_decomposed(prepared.eval())
    suited = SuitXnnpack()(graph).graph_module
    assert torch.equal(suited(x), graph(x))
    assert any("conv2d" in str(node.target) for node in suited.graph.nodes)
    found = certify(prepared, "executorch", [x, 2 * x])
    assert found.ok, str(found)

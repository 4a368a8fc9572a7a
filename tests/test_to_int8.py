"""to_int8: what was trained is what runs, on every engine; and it says what it checked."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import fxqfix
from fxqfix import Int8Certificate, Report
from fxqfix.engines import isa_of
from fxqfix.errors import DialectError, UncalibratedError, UnknownNameError
from fxqfix.flows._int8_certificate import certify
from tests.engines.nets import NETS, SHAPES
from tests.op_flows import batches, prepare
from tests.op_samples import SAMPLES
from tests.states import fingerprint

ENGINES = [e for e in torch.backends.quantized.supported_engines if e != "none"]
# Their kernels round in float32, within 1e-6 of the codes; qnnpack's rounds the bias to int32.
MOST = {"fbgemm": 1e-4, "x86": 1e-4, "onednn": 1e-4, "qnnpack": 1e-3}
# Sums behind tanh, whose codes reach 255 whatever the qconfig says, saturate without VNNI.
SATURATES = {"MLP"} if isa_of(None).fbgemm != "vnni" else set[str]()

pytestmark = [
    pytest.mark.filterwarnings("ignore:must run observer before calling:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]

each_engine = pytest.mark.parametrize("engine", ENGINES)


@functools.cache
def prepared_net(name: str, *, qat: bool) -> tuple[fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(SHAPES.get(name, (4, 3, 16, 16)))
    return prepared_model(NETS[name](), x, qat=qat), x


def prepared_model(
    net: nn.Module, x: Tensor, *, qat: bool = True, mapping: Any = None
) -> fx.GraphModule:
    make = prepare_qat_fx if qat else prepare_fx
    default = get_default_qat_qconfig_mapping if qat else get_default_qconfig_mapping
    model: fx.GraphModule = make(net.train(qat), mapping or default("fbgemm"), (x,))
    model(x)
    return model.eval()


def compared(prepared: nn.Module, model: nn.Module, engine: str, *data: Any) -> Report:
    frozen = fxqfix.freeze(prepared)
    return fxqfix.compare(frozen, model, data, engine=engine, noise_floor=False)


def certificate(model: fx.GraphModule) -> Int8Certificate:
    found = fxqfix.certificate_of(model)
    assert isinstance(found, Int8Certificate)
    return found


def outside(report: Report) -> int:
    return sum(row.local.out_of_range + row.cumulative.out_of_range for row in report.rows)


def most(report: Report) -> float:
    return max(row.local.max_lsb for row in report.rows)


# -------------------------------------------------------------------------- the figures


@pytest.mark.parametrize(
    ("engine", "qat"),
    [*((engine, True) for engine in ENGINES), ("onednn", False)],
)
@pytest.mark.parametrize("name", sorted(NETS))
def test_holds_the_range_and_computes_the_same(name: str, engine: str, qat: bool) -> None:
    if engine not in ENGINES:
        pytest.skip("this torch has no such engine")
    prepared, x = prepared_net(name, qat=qat)
    model = fxqfix.to_int8(prepared, engine=engine)
    assert certificate(model).ok, str(certificate(model))
    report = compared(prepared, model, engine, 1.5 * x, 3 * x)
    assert outside(report) == 0
    assert not {"range-lost", "kernel-defect", "scale-formula", "unexplained"} & set(report.causes)
    if name in SATURATES and engine != "qnnpack":
        assert report.causes["int16-saturation"]
        return
    rows = [row for row in report.rows if row.kind == "activation"]
    differing = sum(row.local.differing for row in rows)
    assert most(report) <= 1
    assert differing <= max(1.0, MOST[engine] * sum(row.local.elements for row in rows))


@pytest.mark.filterwarnings("ignore:All inputs of this cat operator:UserWarning")
def test_convert_fx_does_neither() -> None:
    """The figures above would see it."""
    prepared, x = prepared_net("Inception", qat=True)
    torch.backends.quantized.engine = "fbgemm"
    report = fxqfix.compare(prepared, None, [1.5 * x, 3 * x], noise_floor=False)
    assert outside(report) > 0
    assert {"range-lost", "scale-formula"} <= set(report.causes)
    model = fxqfix.to_int8(prepared)
    report = fxqfix.compare(prepared, model, [1.5 * x, 3 * x], noise_floor=False)
    assert outside(report) == 0
    assert not {"range-lost", "scale-formula"} & set(report.causes)


# --------------------------------------------------------------------- wrong kernels


class Up(nn.Module):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, args[0], 3, padding=1)
        self.up, self.last = nn.ConvTranspose2d(*args, **options), nn.Conv2d(args[1], 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.up(self.first(x))))


UPS: dict[str, Callable[[], nn.Module]] = {
    "other channels": lambda: Up(5, 3, 3, stride=2, padding=1),
    "2x2": lambda: Up(8, 16, 2, 2),
    "grouped": lambda: Up(8, 8, 3, groups=2),
    "output padding": lambda: Up(6, 6, 3, stride=2, padding=1, output_padding=1),
    "skips rows": lambda: Up(4, 4, 1, stride=3),
}


@each_engine
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("name", UPS)
def test_transposed_convolutions(name: str, per_channel: bool, engine: str) -> None:
    """Within one code of the fake-quant, where plain kernels permute weights or refuse."""
    x = torch.randn(4, 3, 8, 8)
    mapping = get_default_qat_qconfig_mapping("fbgemm")
    if per_channel:
        weight = tq.FakeQuantize.with_args(
            observer=tq.PerChannelMinMaxObserver.with_args(ch_axis=1),
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
            quant_min=-128,
            quant_max=127,
        )
        qconfig = mapping.global_qconfig._replace(weight=weight)
        mapping.set_object_type(nn.ConvTranspose2d, qconfig)
    prepared = prepared_model(UPS[name](), x, mapping=mapping)
    model = fxqfix.to_int8(prepared, engine=engine)
    assert certificate(model).ok
    report = compared(prepared, model, engine, x, 3 * x)
    row = report.row("relu")
    assert row.local.max_lsb <= 1
    assert row.local.differing <= 1e-3 * row.local.elements
    assert outside(report) == 0
    routed = {r.node: r.reason for r in certificate(model).routed}
    if per_channel and (engine != "qnnpack" or name == "grouped"):
        assert "up" in routed
    if name == "other channels" and engine in ("onednn", "x86"):
        assert "up" in routed  # on CPUs with VNNI x86 takes onednn's kernel


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.act, self.hard = nn.ReLU6(), nn.Hardtanh(-0.5, 0.5)
        self.pool = nn.AvgPool2d(3, 2, 1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.conv(x)))
        return self.last(F.hardtanh(self.hard(x), -0.4, 0.4))


def test_qnnpacks_pools_and_clamps() -> None:
    x = 8 * torch.randn(2, 3, 9, 9)
    prepared = prepared_model(Pooled(), x)
    torch.backends.quantized.engine = "qnnpack"
    plain = fxqfix.compare(prepared, None, [x], engine="qnnpack", noise_floor=False)
    assert most(plain) > 20  # both kernels are plainly wrong
    model = fxqfix.to_int8(prepared, engine="qnnpack")
    report = compared(prepared, model, "qnnpack", x, 3 * x)
    assert most(report) <= 1
    assert outside(report) == 0
    found = {r.node: (r.way, r.reason) for r in certificate(model).routed}
    assert found == {
        "act": ("memory order", "relu6-channels-last"),
        "pool": ("float island", "average-counts-padding"),
        "hard": ("memory order", "relu6-channels-last"),
        "hardtanh": ("contiguous input", "relu6-channels-last"),
    }
    emulated = fxqfix.emulate(model, engine="qnnpack")
    with fxqfix._torch.quantized_engine("qnnpack"):
        assert torch.equal(emulated(3 * x), model(3 * x))


class Averages(nn.Module):
    """Averages of even numbers of codes, and one of nine, which can't be a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.nine = nn.Conv2d(3, 8, 3, padding=1), nn.AvgPool2d(3, 1, 1)
        self.four, self.some = nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.four(self.nine(F.relu(self.conv(x))))
        return self.some(x).flatten(1) + x.mean((2, 3)).repeat(1, 9)


@each_engine
def test_dropout_is_quantized_as_trained(engine: str) -> None:
    """Its fake-quant saw inputs scaled by 1 / (1 - p); torch's kernel keeps its input's grid."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 8))
    x = torch.rand(64, 8)
    prepared = prepared_model(net, x)
    torch.backends.quantized.engine = engine
    plain = compared(prepared, convert_fx(fxqfix.freeze(prepared)), engine, x).row("_2")
    assert not plain.prepared.same_grid(plain.converted)
    assert not plain.exact
    report = compared(prepared, fxqfix.to_int8(prepared, engine=engine), engine, x, 3 * x)
    found = report.row("_2")
    assert (found.op, found.prepared) == ("dropout", found.converted)
    assert found.local is not None
    assert found.local.exact
    assert report.unexplained == 0


@each_engine
def test_ties_round_as_in_training(engine: str) -> None:
    x = torch.randn(8, 3, 16, 16)
    prepared = prepared_model(Averages(), x)
    left = {"four": 0, "some": 0, "mean": 0}
    for averages in ("exact", "kernel"):
        model = fxqfix.to_int8(prepared, engine=engine, averages=averages)
        assert certificate(model).ok
        report = compared(prepared, model, engine, x, 3 * x)
        found = {r.node for r in certificate(model).routed if r.reason == "ties round otherwise"}
        assert found == (set(left) if averages == "exact" else set())
        ties = {name: report.row(name).causes.get("rounding", 0) for name in left}
        assert ties == left if averages == "exact" else ties["four"] > 9
        assert outside(report) == 0
        emulated = fxqfix.emulate(model, engine=engine)
        with fxqfix._torch.quantized_engine(engine):
            assert torch.equal(emulated(x), copy.deepcopy(model)(x))


class Resized(nn.Module):
    """As in DeepLab: a branch of one pixel behind a global pool, and one that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.branch = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        one = F.interpolate(self.branch(self.pool(x)), size=(16, 16))
        return F.interpolate(x, scale_factor=2.0) + one


def test_one_pixel() -> None:
    x = torch.randn(2, 3, 8, 8)
    prepared = prepared_model(Resized(), x)
    model = fxqfix.to_int8(prepared, engine="fbgemm")
    report = compared(prepared, model, "fbgemm", x, 3 * x)
    assert most(report) <= 1
    assert outside(report) == 0
    found = certificate(model)
    assert {r.op: r.reason for r in found.routed} == {
        "adaptive_avg_pool2d": "ties round otherwise",
        "interpolate": "one-pixel-mixes",
    }
    said = {name: reason for name, reason in found.possible if "one-pixel" in reason}
    assert len(said) == 1
    assert all(reason.startswith("one-pixel-mixes: ") for reason in said.values())


@each_engine
def test_weights_of_one_sign(engine: str) -> None:
    """User report 000: the fused kernel's zero point is -128, which onednn refuses to pack."""
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Linear(8, 4))
    nn.init.ones_(net[0].weight)
    x = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)
    prepared = prepared_model(net, x)
    model = fxqfix.to_int8(prepared, engine=engine)
    assert certificate(model).ok
    assert outside(compared(prepared, model, engine, x, 3 * x)) == 0
    assert most(compared(prepared, model, engine, x, 3 * x)) <= 1
    routed = [r.reason for r in certificate(model).routed]
    assert routed == (["weights-with-zero-point"] if engine == "onednn" else [])


@pytest.mark.parametrize("engine", [e for e in ENGINES if e != "x86"])  # it has no kernels
@pytest.mark.filterwarnings("ignore:Quantized Adaptive Average Pool 3D:UserWarning")
@pytest.mark.parametrize(
    "name",
    [
        *("scalar", "shared_module", "prelu", "conv2d_circular", "conv2d_same", "pools3d"),
        *("conv3d", "channel_shuffle_qat", "functional_conv2d", "functional_conv3d"),
    ],
)
def test_what_torch_drops_clips_or_refuses(name: str, engine: str) -> None:
    """Grids of scalar ops and of shared modules, slopes, paddings, ops that an engine lacks."""
    sample = next(sample for sample in SAMPLES if sample.name == name)
    prepared = prepare(sample, "fx-qat")
    model = fxqfix.to_int8(prepared, engine=engine)
    assert certificate(model).ok, str(certificate(model))
    report = compared(prepared, model, engine, *batches(sample))
    assert outside(report) == 0
    assert most(report) <= 1
    assert "unexplained" not in report.causes


# ------------------------------------------------------------------------ saturation


def test_saturation_is_said_or_avoided() -> None:
    prepared, x = prepared_net("MLP", qat=True)
    model = fxqfix.to_int8(prepared, engine="fbgemm")
    found = [(s.node, s.highest) for s in certificate(model).saturating]
    assert [node for node, _ in found] == ["two"]  # behind tanh, whose range is [0,255]
    assert 127 < found[0][1] <= 255
    assert "int16 saturation possible without VNNI" in str(certificate(model))
    model = fxqfix.to_int8(prepared, engine="fbgemm", saturation="island")
    assert certificate(model).saturating == ()
    assert [(r.node, r.reason) for r in certificate(model).routed] == [("two", "int16-saturation")]
    report = compared(prepared, model, "fbgemm", x, 3 * x)
    assert most(report) <= 1
    assert outside(report) == 0
    assert certificate(fxqfix.to_int8(prepared, engine="qnnpack")).saturating == ()


# ----------------------------------------------------------------------------- eager


class Eager(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.conv, self.relu = nn.Conv2d(3, 5, 3, padding=1), nn.ReLU()
        self.up, self.act = nn.ConvTranspose2d(5, 3, 3, stride=2), nn.ReLU6()
        self.add = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.relu(self.conv(self.quant(x))))
        return self.dequant(self.add.add(x, self.act(x)))


def eager_model(*, qat: bool) -> tuple[nn.Module, Tensor]:
    x = torch.randn(2, 3, 6, 6)
    net = Eager().train(qat)
    net.qconfig = (tq.get_default_qat_qconfig if qat else tq.get_default_qconfig)("fbgemm")
    plain = tq.get_default_qconfig("qnnpack").weight
    net.up.qconfig = net.qconfig._replace(weight=plain)
    net.relu.qconfig = None
    model = (tq.prepare_qat if qat else tq.prepare)(net)
    model(x)
    return model.eval(), x


@each_engine
@pytest.mark.parametrize("qat", [True, False], ids=["qat", "ptq"])
def test_eager_models(qat: bool, engine: str) -> None:
    prepared, x = eager_model(qat=qat)
    before = fingerprint(prepared)
    model = fxqfix.to_int8(prepared, engine=engine)
    assert isinstance(model, fx.GraphModule)
    assert certificate(model).ok
    report = compared(prepared, model, engine, x, 3 * x)
    assert outside(report) == 0
    assert most(report) <= 1
    assert "unexplained" not in report.causes
    assert fingerprint(prepared) == before
    routed = {r.node: r.reason for r in certificate(model).routed}
    wanted = {"act": "the kernel only knows its input's grid"}  # eager mode observes it
    if engine in ("onednn", "x86"):
        wanted["up_island"] = "transposed-permutes"
    assert routed == wanted


# ----------------------------------------------------------------- the flows see through


@each_engine
def test_the_way_back_is_exact(engine: str) -> None:
    """Islands, clamps and all: decomposed without `ranges_from`, it is the frozen model again."""
    x = torch.randn(2, 3, 8, 8)
    prepared = prepared_model(Up(5, 3, 3, stride=2), x)
    model = fxqfix.to_int8(prepared, engine=engine)
    frozen = fxqfix.freeze(prepared)
    assert torch.equal(fxqfix.to_decomposed(model)(3 * x), frozen(3 * x))
    ops = {op.name: op for op in fxqfix.extract_parameters(model)}
    assert ops["up"].weight is not None
    wanted = fxqfix.extract_parameters(fxqfix.to_decomposed(prepared))["up"]
    assert wanted.weight is not None
    assert torch.equal(ops["up"].weight, wanted.weight)
    with fxqfix._torch.quantized_engine("qnnpack"):  # whatever engine is current
        found = fxqfix.extract_parameters(model).arithmetic
    assert found.engine == {"onednn": "x86"}.get(engine, engine)  # x86 runs its kernels
    emulated = fxqfix.emulate(model, engine=engine)
    with fxqfix._torch.quantized_engine(engine):
        assert torch.equal(emulated(3 * x), model(3 * x))
    golden = fxqfix.golden_vectors(model, x)
    assert int(golden.output_of("first").max()) <= 127


# ------------------------------------------------------------------------ certificate


def test_the_certificate_counts_what_is_there() -> None:
    prepared, _ = prepared_net("Residual", qat=True)
    model = fxqfix.to_int8(prepared, engine="fbgemm")
    found = certificate(model)
    assert (found.engine, found.torch) == ("fbgemm", torch.__version__)
    holds = [n for n in model.graph.nodes if "hold_range" in str(n.target)]
    assert sum(r.clamped for r in found.ranges) == len(holds) == 7
    assert {w.elements for w in found.weights} == {
        site.shape[0] * int(torch.tensor(site.shape[1:]).prod())
        for site in fxqfix.inspect(prepared)
        if site.shape is not None
    }
    text = str(found)
    assert "ranges held: 8 of 8, 7 by a clamp" in text
    assert "weights equal, code for code: 4 of 4" in text
    assert json.loads(found.to_json())["ok"] is True
    assert found.to_dict()["ranges"][0]["site"] == "x"


def test_the_certificate_sees_faults() -> None:
    """It is read off the result: what is planted there is found."""
    prepared, _ = prepared_net("Residual", qat=True)
    own = fxqfix.dialects.read(fxqfix.freeze(prepared))
    model = fxqfix.to_int8(prepared, engine="fbgemm")

    def judged(model: fx.GraphModule) -> Int8Certificate:
        with fxqfix._torch.quantized_engine("fbgemm"):
            return certify(own, fxqfix.dialects.read(model), "fbgemm")

    assert judged(model) == certificate(model)
    lost = copy.deepcopy(model)
    hold = next(n for n in lost.graph.nodes if n.name == "stem_0_hold")
    hold.replace_all_uses_with(hold.args[0])
    lost.graph.erase_node(hold)
    found = judged(lost)
    assert not found.ok
    # The residual add has a clamp of its own, and so has what is behind it.
    assert [r.site for r in found.ranges if not r.held] == ["stem_0"]
    assert "NO" in str(found)

    other = copy.deepcopy(model)
    weight, bias = other.head._packed_params._weight_bias()
    codes = weight.int_repr()
    codes[0, 0] += 1
    changed = torch._make_per_channel_quantized_tensor(
        codes, weight.q_per_channel_scales(), weight.q_per_channel_zero_points(), 0
    )
    other.head.set_weight_bias(changed, bias + 1.0)
    found = judged(other)
    head = next(w for w in found.weights if w.site == "head.weight")
    assert (head.differing, head.same_qparams, head.bias) == (1, True, "bias differs by 1")
    assert not found.ok
    assert "1 of 80 codes differ, bias differs by 1" in str(found)

    with fxqfix._torch.quantized_engine("fbgemm"):
        plain = convert_fx(copy.deepcopy(own.graph_module))
    assert Counter(r.held for r in judged(plain).ranges)[False] == 8


# -------------------------------------------------------------------------- bad input


def test_nothing_is_perturbed() -> None:
    prepared, _ = prepared_net("UNet", qat=True)
    prepared = copy.deepcopy(prepared).train()
    before, state = fingerprint(prepared), torch.get_rng_state()
    torch.backends.quantized.engine = "qnnpack"
    model = fxqfix.to_int8(prepared, engine="fbgemm")
    assert torch.backends.quantized.engine == "qnnpack"
    assert fingerprint(prepared) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training


def test_the_engine_in_force_is_the_default() -> None:
    prepared, _ = prepared_net("MLP", qat=True)
    torch.backends.quantized.engine = "onednn"
    assert certificate(fxqfix.to_int8(prepared)).engine == "onednn"


@pytest.fixture(autouse=True)
def engine_in_force() -> Any:
    before = torch.backends.quantized.engine
    yield
    torch.backends.quantized.engine = before


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, x = prepared_net("MLP", qat=True)
    with pytest.raises(UnknownNameError, match="no quantized engine is named 'gpu'"):
        fxqfix.to_int8(prepared, engine="gpu")
    with pytest.raises(UnknownNameError, match="no quantized engine is named 'none'"):
        fxqfix.to_int8(prepared, engine="none")
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["fxqfix.flows.to_int8"], "ENGINES", ("qnnpack",))
        with pytest.raises(UnknownNameError, match="'fbgemm' has no int8 kernels that fxqfix"):
            fxqfix.to_int8(prepared, engine="fbgemm")
    with pytest.raises(UnknownNameError, match="saturation='never'"):
        fxqfix.to_int8(prepared, saturation="never")
    with pytest.raises(DialectError, match="holds no observer, fake-quant"):
        fxqfix.to_int8(NETS["MLP"]())
    with pytest.raises(DialectError):
        fxqfix.to_int8(fxqfix.to_int8(prepared, engine="fbgemm"))
    fresh = prepare_fx(NETS["MLP"]().eval(), get_default_qconfig_mapping("fbgemm"), (x,))
    with pytest.raises(UncalibratedError):
        fxqfix.to_int8(fresh)


def test_records_are_frozen() -> None:
    prepared, _ = prepared_net("MLP", qat=True)
    found = certificate(fxqfix.to_int8(prepared, engine="fbgemm"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.engine = "x86"  # type: ignore[misc]  # that is the test


class Gated(nn.Module):
    """A cat shares one observer: the gate is declared on the cat's grid, its kernel knows one."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(4, 4, 3, padding=1), gate

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.gate(self.conv(x))], 1)


# From torch, where plainly converted: it is what to_int8 and the way back have to survive.
@pytest.mark.filterwarnings("ignore:All inputs of this cat operator:UserWarning")
@pytest.mark.parametrize("gate", [torch.sigmoid, torch.tanh, nn.functional.hardsigmoid])
@pytest.mark.parametrize("engine", ["fbgemm", "onednn"])
def test_a_kernel_with_a_grid_of_its_own(engine: str, gate: Callable[[Tensor], Tensor]) -> None:
    """A range of codes on the declared grid, held on the kernel's own, would clip its values."""
    x = torch.randn(3, 4, 6, 6)
    torch.backends.quantized.engine = engine
    prepared = prepare_qat_fx(Gated(gate).train(), get_default_qat_qconfig_mapping(engine), (x,))
    prepared(x)
    frozen = fxqfix.freeze(prepared.eval())
    result = fxqfix.to_int8(prepared, engine=engine)
    row = fxqfix.compare(frozen, result, [x, 3 * x], engine=engine).row(gate.__name__)
    assert row.prepared == row.converted
    assert row.local is not None
    assert row.local.exact
    back = fxqfix.to_decomposed(convert_fx(copy.deepcopy(frozen)), ranges_from=frozen)
    used = fxqfix.inspect(back).site(gate.__name__).used
    assert used is not None
    assert (used.quant_min, used.quant_max) == used.container
    assert certificate(result).ok


def test_the_certificate_of_a_model() -> None:
    x = torch.rand(2, 4)
    result = fxqfix.to_int8(prepared_model(nn.Sequential(nn.Linear(4, 2)), x), engine="fbgemm")
    found = fxqfix.certificate_of(result)
    assert found is result.meta["certificate"]  # as 0.1 had it: until 0.3
    assert fxqfix.certificate_of(copy.deepcopy(result)) == found
    strange = copy.deepcopy(result)
    strange.meta["certificate"] = "a user's own"
    for model in (strange, nn.Linear(2, 2)):
        with pytest.raises(DialectError, match="certificate_of: the model carries no certificate"):
            fxqfix.certificate_of(model)

"""Every dialect's reader, judged by running the graph: what flows there is what the sites say."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao import quantization as tq
from torch.ao.quantization import quantize_fx

from fxqfix import freeze, inspect, trace
from fxqfix._torch import quiet
from fxqfix.dialects import Reading, read
from fxqfix.errors import DialectError, NonFiniteError, UnknownNameError
from fxqfix.qparams import dequantize, quantize, quantize_native
from tests.dialects.nets import (
    EAGER,
    Plain,
    Stubs,
    calibrated,
    decomposed,
    eager_ptq,
    fx_ptq,
    fx_qat,
    image,
    int8,
    reference,
    torchs_decomposed,
)
from tests.states import fingerprint

# --- what flows in the graph ---------------------------------------------------------------------


class Recorder(fx.Interpreter):
    """Runs a graph and keeps a copy of every node's value."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n] = value.clone() if isinstance(value, Tensor) else value
        return value


def recorded(graph_module: fx.GraphModule, x: Tensor) -> dict[fx.Node, Any]:
    """Values by node of the graph itself; the run happens on a copy, so that nothing moves."""
    own = copy.deepcopy(graph_module)
    for module in own.modules():
        if isinstance(module, tq.FakeQuantizeBase):
            module.disable_observer()
    recorder = Recorder(own)
    with torch.no_grad():
        recorder.run(x)
    mine = {n.name: n for n in graph_module.graph.nodes}
    return {mine[n.name]: v for n, v in recorder.values.items()}


def assert_reads(reading: Reading, x: Tensor) -> None:
    """Every activation site's qparams are those of the value at its node."""
    values = recorded(reading.graph_module, x)
    for tap in reading.activations:
        q, value, before = tap.site.used, values[tap.node], values[tap.producer]
        assert q is not None
        if reading.dialect == "fx-prepared" and tap.site.quantizes:
            assert torch.equal(value, dequantize(quantize(before, q), q)), tap.site
        elif reading.dialect == "fx-prepared":
            assert torch.equal(value, before)
        elif reading.dialect == "decomposed":
            assert torch.equal(value.int(), quantize(before, q)), tap.site
        else:
            assert (value.q_scale(), value.q_zero_point()) == (q.scale, q.zero_point), tap.site
            assert (value.dtype, q.is_narrow) == (q.dtype, False)
            if tap.producer is not tap.node:
                assert torch.equal(value.int_repr().int(), quantize_native(before, q))
    carried = {n for n, v in values.items() if isinstance(v, Tensor) and v.is_quantized}
    weights = {t.producer for t in reading.weights if t.producer is not t.node}
    if reading.dialect in ("fx-int8", "fx-reference"):
        assert carried - weights == {t.node for t in reading.activations}


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "qat": lambda: fx_qat(Plain()),
    "ptq": lambda: fx_ptq(Plain()),
    "qat qnnpack": lambda: fx_qat(Plain(), tq.get_default_qat_qconfig_mapping("qnnpack")),
    "frozen": lambda: freeze(fx_qat(Plain())),
}
FLOWS: dict[str, Callable[[Any], nn.Module]] = {
    "fx-prepared": lambda model: model,
    "fx-int8": int8,
    "fx-reference": reference,
    "decomposed": decomposed,
    "decomposed (torch's)": torchs_decomposed,
}


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("maker", MAKERS)
def test_fx(maker: str, flow: str) -> None:
    model = FLOWS[flow](MAKERS[maker]())
    before = fingerprint(model)
    reading = read(model)
    assert reading.dialect == flow.partition(" ")[0]
    assert reading.unsupported == ()
    assert_reads(reading, image(seed=9, gain=2))
    assert fingerprint(model) == before


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("name", EAGER)
def test_eager(name: str, converted: bool) -> None:
    model = EAGER[name]()
    model = int8(model) if converted else model
    before = fingerprint(model)
    reading = read(model)
    assert reading.dialect == ("fx-int8" if converted else "fx-prepared")
    assert_reads(reading, image(seed=9, gain=2))
    assert fingerprint(model) == before


# --- names, kinds, ops ---------------------------------------------------------------------------

PLAIN_SITES = [
    ("x", "activation", "input"),
    ("conv.weight", "weight", "conv2d"),
    ("conv", "activation", "conv2d"),
    ("relu", "activation", "relu"),
    ("twice.weight", "weight", "conv2d"),
    ("twice", "activation", "conv2d"),
    ("twice_1.weight", "weight", "conv2d"),
    ("twice_1", "activation", "conv2d"),
    ("act", "activation", "hardswish"),
    ("relu_1", "activation", "add_relu"),
    ("cat", "activation", "cat"),
    ("mean", "activation", "mean"),
    ("linear.weight", "weight", "linear"),
    ("linear", "activation", "linear"),
    ("sigmoid", "activation", "sigmoid"),
]


@pytest.mark.parametrize("flow", FLOWS)
def test_sites_in_graph_order(flow: str) -> None:
    found = inspect(FLOWS[flow](fx_qat(Plain())))
    expected = PLAIN_SITES
    if flow == "fx-int8":  # lowering renames add + relu; cat and mean keep their input's qparams
        kept = [s for s in PLAIN_SITES if s[0] not in ("cat", "mean")]
        expected = [("add_relu", *s[1:]) if s[0] == "relu_1" else s for s in kept]
    assert [(s.name, s.kind, s.op) for s in found] == expected
    assert {s.module for s in found if s.name.startswith("twice")} <= {"twice", ""}


def test_a_module_shared_by_two_nodes() -> None:
    """Two sites of one module: each prepared output has its own qparams, the weights are one."""
    prepared = fx_qat(Plain())
    found = inspect(prepared)
    first, second = found.site("twice"), found.site("twice_1")
    assert (first.module, second.module) == ("twice", "twice")
    assert first.used != second.used
    assert found.site("twice.weight").used == found.site("twice_1.weight").used
    converted = inspect(int8(prepared))  # torch bakes the last one's into both
    assert converted.site("twice").used == converted.site("twice_1").used
    with pytest.raises(UnknownNameError, match="no site is named 'twic'"):
        found.site("twic")


def test_a_shared_observer_is_one_state() -> None:
    """Ops that keep qparams share their input's observer: cat and mean here."""
    found = inspect(fx_qat(Plain()))
    assert found.site("cat").used == found.site("mean").used == found.site("relu").used


class Relus(nn.Module):
    """add + relu in every spelling."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.inplace = nn.ReLU(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a = torch.relu(x + x)
        b = nn.functional.relu(torch.add(x, a))
        c = self.relu(x + b)
        d = self.inplace(c * x)
        e = (x + d).relu()
        f = (x + e).relu_()
        g = x + f
        return a, b, c, d, e, f, torch.relu(g), g + x  # g has two users: not fused


def test_add_relu_in_every_spelling() -> None:
    """Fused where torch fuses: functions and modules; it quantizes between add and a method."""
    found = inspect(fx_qat(Relus()))
    assert [(s.name, s.op) for s in found][1:] == [
        ("relu", "add_relu"),
        ("relu_1", "add_relu"),
        ("relu_2", "add_relu"),
        ("inplace", "mul_relu"),
        ("add_3", "add"),
        ("relu_3", "relu"),
        ("add_4", "add"),
        ("relu_", "relu"),
        ("add_5", "add"),
        ("add_6", "add"),
    ]


class RelusBehind(nn.Module):
    """A relu behind ops that torch does not fuse it with, in a method or in place."""

    def forward(self, x: Tensor) -> Tensor:
        y = (x + x).relu_()
        y = nn.functional.relu(torch.cat([y, y], 1), inplace=True)
        return y.mean([2, 3])


@pytest.mark.parametrize("flow", FLOWS)
def test_relu_behind_a_site_is_an_op_of_its_own(flow: str) -> None:
    """Also where the op before it runs on quantized tensors: else the two are not paired."""
    reading = read(FLOWS[flow](fx_qat(RelusBehind())))
    ops = [t.site.op for t in reading.activations]
    assert ops == ["input", "add", "relu", "cat", "relu", "mean"]
    assert_reads(reading, image(seed=3))


class Clamped(nn.Module):
    """A clamp whose bounds are whole multiples of the scale before it, sigmoid's 1/256."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(torch.sigmoid(x), -0.25, 1.0)


def test_a_users_clamp_is_no_pin() -> None:
    """-64 and 256 are codes of no quint8: pin-ranges has not set them."""
    reading = read(reference(fx_ptq(Clamped())))
    assert [t.site.op for t in reading.activations] == ["input", "sigmoid", "clamp"]
    assert_reads(reading, image(seed=3))


# --- what the qparams are beside the flow --------------------------------------------------------


@pytest.mark.parametrize("observing", [False, True])
def test_baked_is_what_conversion_bakes(observing: bool) -> None:
    """Of every prepared site: with observers on, torch's conversion moves those of weights."""
    prepared = fx_qat(Plain())
    if not observing:
        prepared.apply(tq.disable_observer)
    sites = inspect(prepared)
    converted = inspect(reference(prepared))
    assert [s.name for s in sites] == [s.name for s in converted]
    for mine, theirs in zip(sites, converted, strict=True):
        assert mine.baked is not None
        assert theirs.used is not None
        assert mine.baked.same_grid(theirs.used), mine.name
    changed = {s.name for s in sites if s.baked != s.used}
    assert {"conv.weight", "twice.weight", "linear.weight"} <= changed


def test_ranges() -> None:
    """The declared range is in the prepared and the decomposed model, and lost elsewhere."""
    prepared = fx_qat(Plain())
    ranges = {
        flow: {s.used.range_text for s in inspect(make(prepared)) if s.kind == "activation"}
        for flow, make in FLOWS.items()
    }
    assert ranges == {
        "fx-prepared": {"[0,127]", "[0,255]"},  # sigmoid's is fixed
        "decomposed": {"[0,127]", "[0,255]"},
        "decomposed (torch's)": {"[0,127]", "[0,255]"},
        "fx-int8": {"[0,255]"},
        "fx-reference": {"[0,255]"},
    }


@pytest.mark.parametrize(
    ("low", "high", "dtype"), [(0, 15, torch.quint8), (-8, 7, torch.qint8), (0, 3, torch.quint8)]
)
def test_sub_8_bit_ranges(low: int, high: int, dtype: torch.dtype) -> None:
    """In an 8-bit container: activations and weights keep their declared range."""
    act = tq.FakeQuantize.with_args(
        observer=tq.MovingAverageMinMaxObserver, quant_min=low, quant_max=high, dtype=dtype
    )
    weight = tq.FusedMovingAvgObsFakeQuantize.with_args(
        observer=tq.MovingAveragePerChannelMinMaxObserver,
        quant_min=-8,
        quant_max=7,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    )
    mapping = tq.QConfigMapping().set_global(tq.QConfig(act, weight))
    with quiet():
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        prepared = quantize_fx.prepare_qat_fx(net.train(), mapping, (image(),))
        calibrated(prepared).eval()
    for flow in ("fx-prepared", "decomposed"):
        reading = read(FLOWS[flow](prepared))
        for site in reading.inspection:
            wanted = (-8, 7) if site.kind == "weight" else (low, high)
            assert site.used is not None
            assert (site.used.quant_min, site.used.quant_max) == wanted
        assert_reads(reading, image(gain=3))


@pytest.mark.parametrize("name", ["ptq fused", "qat fused", "wrapper qat"])
def test_weights_of_int8_models(name: str) -> None:
    """Codes and qparams are those of the packed tensors."""
    model = int8(EAGER[name]())
    modules = dict(trace(model).named_modules())
    taps = read(model).weights
    assert taps
    for tap in taps:
        weight = modules[tap.site.module].weight()
        assert tap.weight is not None
        view = tap.weight()
        assert torch.equal(view.codes, weight.int_repr())
        assert tap.site.used is not None
        assert list(tap.site.used.scales) == weight.q_per_channel_scales().tolist()
        assert torch.equal(dequantize(view.codes, view.qparams), weight.dequantize())
        assert tap.site.shape == tuple(weight.shape)


def test_weights_of_prepared_models() -> None:
    """What the weight's fake-quant gives in the forward, BatchNorm's factor included."""
    prepared = fx_qat(Plain())
    tap = read(prepared).tap("conv.weight")
    conv = copy.deepcopy(prepared.conv)
    conv.weight_fake_quant.disable_observer()
    seen: list[Tensor] = []
    conv.weight_fake_quant.register_forward_hook(lambda _m, _i, out: seen.append(out))
    conv(image())
    assert tap.weight is not None
    view = tap.weight()
    assert torch.equal(dequantize(view.codes, view.qparams), seen[0])
    assert view.folded


# --- graphs that a user edited -------------------------------------------------------------------


def test_edited_graph() -> None:
    """A renamed node, an inserted op and a removed fake-quant are read as they stand."""
    prepared = fx_qat(Plain())
    nodes = {n.name: n for n in prepared.graph.nodes}
    nodes["act"].name = "my_act"
    with prepared.graph.inserting_after(nodes["relu"]):
        new = prepared.graph.call_function(torch.neg, (nodes["relu"],))
    nodes["activation_post_process_2"].replace_input_with(nodes["relu"], new)
    gone = nodes["activation_post_process_3"]
    gone.replace_all_uses_with(gone.all_input_nodes[0])
    prepared.graph.erase_node(gone)
    prepared.recompile()
    found = inspect(prepared)
    names = " ".join(s.name for s in found if s.kind == "activation")
    assert names == "x conv neg twice_1 my_act relu_1 cat mean linear sigmoid"
    assert found.site("neg").op == "neg"
    assert_reads(read(prepared), image(seed=4))


def test_two_sites_of_one_value() -> None:
    """A user's second fake-quant behind the first has its own name."""
    prepared = fx_qat(nn.Sequential(nn.Conv2d(3, 4, 3)))
    last = next(n for n in prepared.graph.nodes if n.name == "activation_post_process_1")
    with prepared.graph.inserting_after(last):
        copy_of_it = prepared.graph.node_copy(last)
    copy_of_it.args = (last.args[0],)
    prepared.graph.output_node().replace_input_with(last, copy_of_it)
    prepared.recompile()
    names = [s.name for s in inspect(prepared) if s.kind == "activation"]
    assert names == ["input_1", "_0", "_0_1"]


# --- what has no static qparams ------------------------------------------------------------------


@pytest.mark.parametrize("qconfig", [tq.default_dynamic_qconfig, tq.float16_dynamic_qconfig])
def test_dynamic_is_marked(qconfig: tq.QConfig) -> None:
    with quiet():
        mapping = tq.QConfigMapping().set_global(qconfig)
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
        prepared = quantize_fx.prepare_fx(net, mapping, (image(),))
    sites = [s for s in inspect(prepared) if s.kind == "activation"]
    assert [(s.used, s.quantizes, s.source) for s in sites] == [
        (None, False, "dynamic (PlaceholderObserver)")
    ]


def test_float16_is_marked() -> None:
    with quiet():
        net = nn.Sequential(tq.QuantStub(), nn.Flatten(), nn.Linear(192, 4)).eval()
        net.qconfig = tq.float16_static_qconfig
        found = inspect(tq.prepare(net))
    assert len(found) == 2
    assert all(s.source == "placeholder for torch.float16 (PlaceholderObserver)" for s in found)
    assert not any(s.used or s.quantizes for s in found)


def test_uncalibrated_is_flagged() -> None:
    with quiet():
        mapping = tq.get_default_qconfig_mapping("fbgemm")
        prepared = quantize_fx.prepare_fx(Plain().eval(), mapping, (image(),))
    found = inspect(prepared)
    flags = {s.name: s.calibrated for s in found if s.kind == "activation"}
    assert not any(ok for name, ok in flags.items() if name != "sigmoid")
    assert flags["sigmoid"]  # its qparams are fixed
    assert "uncalibrated" in str(found)


def test_float_model_is_no_dialect() -> None:
    net = Plain()
    before = fingerprint(net)
    with pytest.raises(
        DialectError, match=r"inspect: Plain holds no observer.*To do: pass"
    ) as info:
        inspect(net)
    assert isinstance(info.value, TypeError)
    assert fingerprint(net) == before


@pytest.mark.parametrize("make", [lambda: fx_qat(Plain()), lambda: eager_ptq(Stubs())])
def test_nan_qparams_name_their_site(make: Callable[[], nn.Module]) -> None:
    prepared = make()
    module = prepared.get_submodule(
        "activation_post_process_3"
        if isinstance(prepared, fx.GraphModule)
        else "second.activation_post_process"
    )
    getattr(module, "activation_post_process", module).max_val.fill_(float("nan"))
    before = fingerprint(prepared)
    with pytest.raises(NonFiniteError, match=r"^site '(twice|second)' \(.*\): the qparams of this"):
        inspect(prepared)
    assert fingerprint(prepared) == before


def test_nan_in_a_weight_names_the_module() -> None:
    prepared = fx_ptq(Plain())
    with torch.no_grad():
        prepared.twice.weight[1, 0] = float("nan")
    with pytest.raises(
        NonFiniteError, match=r"^twice.weight: .*(1 of 8 channels, channel 1|should be less th)"
    ):
        inspect(prepared)

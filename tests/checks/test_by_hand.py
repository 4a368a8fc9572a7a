"""Checks of readings made by hand: the bounds of each, in milliseconds."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxqfix.checks import Finding, kernels, modes, observers, ranges, weights, writes
from fxqfix.checks._base import Subject
from fxqfix.dialects import Reading, Tap
from fxqfix.dialects.site import Site
from fxqfix.dialects.weights import WeightView
from fxqfix.qparams import FLOOR, QParams

WIDE = QParams(0.5, 3, 0, 255, torch.quint8)
NARROW = replace(WIDE, quant_max=127)
OTHER = replace(WIDE, scale=0.25)
KERNEL = QParams(0.5, 0, -128, 127, torch.qint8)
CHANNELS = QParams((0.5, 0.25, 0.125), (0, 0, 0), -128, 127, torch.qint8, axis=0)
CHECKS = {
    check.code: check
    for part in (kernels, modes, observers, ranges, weights, writes)
    for check in part.CHECKS
}


class Model:
    """A graph with sites, as the reader of a prepared model gives it."""

    def __init__(self, *, exported: bool = False) -> None:
        self.graph, self.root, self.exported = fx.Graph(), nn.Module(), exported
        self.taps: list[Tap] = []
        self.training = False

    def input(self, name: str = "x", used: QParams | None = WIDE, **more: Any) -> fx.Node:
        return self.site(self.graph.placeholder(name), used, name, **more)

    def op(self, target: Any, *args: Any, used: QParams | None = WIDE, **more: Any) -> fx.Node:
        """An op and its observer, whose node is given back."""
        node = self.graph.call_function(target, args, more.pop("kwargs", {}))
        return self.site(node, used, more.pop("name", node.name), **more)

    def module(self, module: nn.Module, x: fx.Node, name: str, **more: Any) -> fx.Node:
        if not hasattr(self.root, name):
            self.root.add_module(name, module)
        node = self.graph.call_module(name, (x,))
        return self.site(node, more.pop("used", WIDE), more.pop("site", name), **more)

    def site(self, node: fx.Node, used: QParams | None, name: str, **more: Any) -> fx.Node:
        quantizer = self.graph.call_function(torch.clone, (node,))
        site = Site(name, "activation", "", "op", used, **more)
        self.taps.append(Tap(site, quantizer, node))
        return quantizer

    def weight(self, used: QParams | None = KERNEL, view: WeightView | None = None, **more: Any):
        site = Site(
            more.pop("name", "fc.weight"), "weight", "", more.pop("op", "linear"), used, **more
        )
        node = self.taps[-1].producer
        self.taps.append(Tap(site, node, node, weight=None if view is None else lambda: view))

    def found(self, code: str, engine: str = "fbgemm") -> list[Finding]:
        if not any(node.op == "output" for node in self.graph.nodes):
            self.graph.output(None)
        module = fx.GraphModule(self.root, self.graph)
        reading = Reading(module, "by hand", tuple(self.taps), exported=self.exported)
        return list(CHECKS[code].run(Subject(reading, engine, self.training)))


def said(found: list[Finding]) -> list[tuple[str, str, str]]:
    return [(f.severity, f.site, f.evidence) for f in found]


# --- ranges


def test_a_range_is_lost_where_the_kernels_clamp_later() -> None:
    model = Model()
    model.input(used=NARROW)
    model.op(torch.relu, model.taps[0].node, used=WIDE, name="relu")
    model.op(torch.relu, model.taps[0].node, used=None, name="float")
    model.weight(replace(KERNEL, quant_min=-127))
    assert said(model.found("range-lost")) == [
        ("warning", "x", "declared [0,127]; int8 kernels clamp at [0,255]")
    ]


@pytest.mark.parametrize(
    ("low", "high", "steps"), [(0, 125, 126), (0, 126, None), (0, 127, None), (-8, 7, 16)]
)
def test_fewer_codes_than_7_bits(low: int, high: int, steps: int | None) -> None:
    model = Model()
    model.input(used=replace(KERNEL, quant_min=low, quant_max=high))
    model.weight(None)
    found = model.found("narrow-range")
    wanted = [("info", "x", f"{steps} codes in a container of 8 bits")] if steps else []
    assert said(found) == wanted


@pytest.mark.parametrize(
    ("kind", "scale", "codes", "floor"),
    [
        ("activation", FLOOR, 255, True),
        ("activation", FLOOR * 1.01, 255, False),
        ("activation", FLOOR * 1.9, 127, False),  # no higher a floor with fewer codes
        ("activation", FLOOR, 127, True),
        ("activation", FLOOR / 257, 65535, True),
        ("activation", FLOOR / 256, 65535, False),  # with so many codes it may well be one
        ("activation", 1.2e-7, 2**32 - 1, True),
        ("activation", 1.3e-7, 2**32 - 1, False),
        ("weight", FLOOR, 255, False),
        ("weight", 1.2e-7, 255, True),
        ("weight", 1.3e-7, 255, False),
    ],
)
def test_a_scale_at_the_floor(kind: str, scale: float, codes: int, floor: bool) -> None:
    model = Model()
    grid = QParams(scale, 0, 0, codes, torch.qint32)
    if kind == "weight":
        model.input()
        model.weight(grid, name="x")
    else:
        model.input(used=grid)
    found = model.found("degenerate-scale")
    assert [f.site for f in found] == ["x"] * floor


def test_scales_that_say_nothing_of_a_floor() -> None:
    model = Model()
    model.input(used=None)
    model.input("y", replace(WIDE, scale=1e-9), calibrated=False)
    model.weight(replace(CHANNELS, scale=(1e-9, 1.0, 1.0)))
    assert model.found("degenerate-scale") == []


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize(
    ("target", "kwargs", "in_eager", "in_fx"),
    [
        (torch.flatten, {}, True, False),  # prepare_fx lets both share one observer
        (F.dropout, {"training": False}, True, True),
        (F.max_pool2d, {"kernel_size": 2}, True, False),
        (torch.sigmoid, {}, False, False),  # its kernel requantizes
    ],
)
def test_an_op_that_keeps_its_inputs_grid(
    eager: bool, target: Any, kwargs: dict[str, Any], in_eager: bool, in_fx: bool
) -> None:
    model = Model()
    x = model.input()
    model.op(target, x, used=OTHER, name="kept", kwargs=kwargs)
    model.op(target, x, used=WIDE, name="same", kwargs=kwargs)
    model.op(target, x, used=None, name="float", kwargs=kwargs)
    model.op(target, x, used=OTHER, name="unseen", kwargs=kwargs, calibrated=False)
    found = _with_observed(model, not eager)
    grids = "0.25/3 [0,255] quint8", "0.5/3 [0,255] quint8"
    text = f"it quantizes to {grids[0]}; the int8 op keeps its input's {grids[1]} (x)"
    wanted = in_eager if eager else in_fx
    assert said(found) == [("warning", "kept", text)] * wanted


def _with_observed(model: Model, observed: bool) -> list[Finding]:
    """As prepare_fx leaves it, or eager mode."""
    if not any(node.op == "output" for node in model.graph.nodes):
        model.graph.output(None)
    module = fx.GraphModule(model.root, model.graph)
    if observed:
        module.meta["_observed_graph_module_attrs"] = object()
    reading = Reading(module, "by hand", tuple(model.taps))
    return list(CHECKS["shared-qparams"].run(Subject(reading, "fbgemm", False)))


def test_inputs_of_cat_with_other_grids() -> None:
    model = Model()
    inputs = [model.input("a"), model.input("b", OTHER), model.input("c", OTHER)]
    inputs.append(model.input("d", None))
    model.op(torch.cat, inputs, used=WIDE, name="cat")
    model.op(torch.cat, [inputs[0], inputs[0]], used=WIDE, name="same")
    text = "2 of 3 inputs have another grid: cat rounds them anew"
    assert said(_with_observed(model, True)) == [("info", "cat", text)]
    exported = Model(exported=True)
    exported.op(torch.cat, [exported.input("a"), exported.input("b", OTHER)], name="cat")
    assert exported.found("shared-qparams") == []


def test_a_module_that_is_called_twice_has_one_scale() -> None:
    model, layer = Model(), nn.Linear(4, 4)
    x = model.input()
    first = model.module(layer, x, "act", site="act", used=OTHER)
    model.module(layer, first, "act", site="act_1", used=WIDE)
    found = model.found("shared-qparams")
    assert said(found) == [
        (
            "error",
            "act",
            "act is called 2 times and converts to one output scale, that of act_1: 0.25/3 "
            "[0,255] quint8 becomes 0.5/3 [0,255] quint8",
        )
    ]


@pytest.mark.parametrize("uses", [(WIDE, WIDE), (None, WIDE), (OTHER, None), (None, None)])
def test_calls_whose_grids_are_one_or_not_known(uses: tuple[QParams | None, ...]) -> None:
    model, act = Model(), nn.Linear(4, 4)
    x = model.input()
    for used in uses:
        x = model.module(act, x, "act", used=used)
    assert model.found("shared-qparams") == []


def test_calls_without_sites() -> None:
    model = Model()
    x = model.input()
    model.root.act = nn.Linear(4, 4)
    for _ in range(2):
        x = model.graph.call_module("act", (x,))
    assert model.found("shared-qparams") == []


# --- observers


def test_a_forward_that_quantizes_on_another_grid() -> None:
    model = Model()
    kernel, buffers = "fused kernel", "buffers (scale)"
    model.input("a", WIDE, baked=OTHER, source=kernel)
    model.input("b", WIDE, baked=OTHER, source=buffers)
    model.input("c", WIDE, baked=WIDE, source=kernel)
    model.input("d", None, baked=OTHER, source=kernel)
    model.input("e", WIDE, baked=None, source=kernel)
    model.input("f", WIDE, baked=OTHER, source=kernel, quantizes=False)
    model.input("g", WIDE, baked=OTHER, source=kernel, calibrated=False)
    assert [f.site for f in model.found("scale-formula")] == ["a"]
    assert [f.site for f in model.found("stale-qparams")] == ["b"]
    assert [f.site for f in model.found("uncalibrated")] == ["g"]


def test_fake_quants_that_are_off_and_observers() -> None:
    model = Model()
    model.input("a", quantizes=False, source="observer (HistogramObserver)")
    model.input("b", quantizes=False, source="observer (x), switched off")
    model.input("c", quantizes=True, source="fake-quant, switched off")
    model.input("d", quantizes=False, source="observer (MinMaxObserver)")
    assert [f.site for f in model.found("fake-quant-off")] == ["b"]
    (found,) = model.found("observer-only")
    assert (found.site, found.evidence[:1]) == ("a", "2")
    assert Model().found("observer-only") == []


# --- weights


def view(codes: list[Any], grid: QParams, values: list[Any] | None = None) -> WeightView:
    floats = None if values is None else torch.tensor(values)
    return WeightView(torch.tensor(codes, dtype=torch.int8), grid, values=floats)


@pytest.mark.parametrize(
    ("codes", "grid", "op", "evidence"),
    [
        ([[1, 0], [0, 0], [0, 0]], KERNEL, "linear", "2 of 3 channels have (next to) no weights, "
         "first 1: scale 0.5"),
        ([[0, 0], [0, 0]], KERNEL, "linear", "all 2 channels have (next to) no weights, "
         "first 0: scale 0.5"),
        ([[0, 1], [0, 1]], KERNEL, "linear", None),
        ([[0, 1], [0, 1]], KERNEL, "conv_transpose2d", "1 of 2 channels have (next to) no "
         "weights, first 0: scale 0.5"),
        ([[7, 7], [0, 7]], replace(KERNEL, zero_point=7), "linear", "1 of 2 channels have (next "
         "to) no weights, first 0: scale 0.5"),
        ([[1, 1], [0, 0], [1, 1]], CHANNELS, "linear", "1 of 3 channels have (next to) no "
         "weights, first 1: scale 0.25"),
        ([[1, 1], [1, 1], [1, 1]], replace(CHANNELS, scale=(0.5, FLOOR, 0.5)), "linear",
         "1 of 3 channels have (next to) no weights, first 1: scale 6.2e-05"),
        ([[1, 1], [1, 1], [1, 1]], replace(CHANNELS, scale=(0.5, 7e-5, 0.5)), "linear", None),
    ],
)  # fmt: skip
def test_channels_without_weights(
    codes: list[Any], grid: QParams, op: str, evidence: str | None
) -> None:
    model = Model()
    model.input()
    model.weight(grid, view(codes, grid), op=op)
    found = model.found("dead-channel")
    assert said(found) == ([("warning", "fc.weight", evidence)] if evidence else [])


@pytest.mark.parametrize(
    ("beyond", "severity"), [(0, None), (1, "warning"), (4, "warning"), (5, "error"), (9, "error")]
)
@pytest.mark.parametrize("side", [1, -1])
def test_values_beyond_their_grid(beyond: int, severity: str | None, side: int) -> None:
    """The grid is [-64, 63.5]; a step beyond it is still what rounding may do."""
    edge = 64.5 if side > 0 else -65.0  # one code, or one and a bit
    values = [side * 90.0] * beyond + [64.0 if side > 0 else -64.5] * (10 - beyond)
    model = Model()
    model.input()
    model.weight(KERNEL, view([0] * 10, KERNEL, values))
    wanted = [severity] if severity else []
    assert [f.severity for f in model.found("weight-saturated")] == wanted
    if beyond:
        assert f"{beyond} of 10 values" in model.found("weight-saturated")[0].evidence
    last = Model()
    last.input()
    last.weight(KERNEL, view([0], KERNEL, [edge]))
    assert len(last.found("weight-saturated")) == 1


def test_fewer_than_one_in_ten_is_let_alone() -> None:
    model = Model()
    model.input()
    model.weight(KERNEL, view([0] * 11, KERNEL, [90.0] + [0.0] * 10))
    model.weight(KERNEL, view([0], KERNEL, [90.0]), quantizes=False)
    model.weight(KERNEL, view([0], KERNEL, [90.0]), calibrated=False)
    model.weight(KERNEL, view([0], KERNEL))
    model.weight(KERNEL)
    model.weight(None, view([0], KERNEL, [90.0]))
    model.weight(KERNEL, view([], KERNEL, []))
    assert model.found("weight-saturated") == []


# --- kernels


@pytest.mark.parametrize("engine", ["fbgemm", "onednn", "qnnpack", "x86"])
def test_what_an_engine_refuses(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    model.input("x", replace(KERNEL, dtype=torch.qint8))
    model.input("y", WIDE)
    model.input("z", None)
    model.weight(replace(CHANNELS, zero_point=(0, 1, 2)))
    model.weight(CHANNELS, name="zero")
    model.weight(None, name="float")
    known = torch.backends.quantized.supported_engines
    if engine not in known:
        pytest.skip(f"this torch has no {engine}")
    torch.backends.quantized.engine = engine  # put back behind each test
    found = said(model.found("engine-mismatch", engine))
    if engine == "onednn":
        text = "2 zero points of the weight are not 0: onednn refuses to pack it"
        assert found == [("error", "fc.weight", text)]
    else:
        assert found == [("error", "x", f"qint8 activations: {engine}'s kernels take quint8")]


def test_an_engine_that_is_not_the_one_that_is_set() -> None:
    known = [e for e in torch.backends.quantized.supported_engines if e not in ("none", "x86")]
    if len(known) < 2:
        pytest.skip("this torch has one engine")
    torch.backends.quantized.engine = known[0]
    model = Model()
    model.input()
    assert model.found("engine-mismatch", known[0]) == []
    (found,) = model.found("engine-mismatch", known[1])
    assert (found.severity, found.site) == ("warning", "")
    assert repr(known[0]) in found.evidence
    (unknown,) = model.found("engine-mismatch", "tpu")
    assert unknown.severity == "error"
    assert "none" not in unknown.evidence
    exported = Model(exported=True)
    exported.input()
    assert exported.found("engine-mismatch", "tpu") == []


def test_ops_that_stay_in_float() -> None:
    model = Model()
    x = model.input()
    model.root.fc = nn.Linear(4, 4)
    plain = model.graph.call_module("fc", (x,))
    model.root.weight = nn.Parameter(torch.ones(4, 4))
    held = model.graph.get_attr("weight")
    model.op(F.linear, x, held, name="constant")  # its weight is a site of its own
    model.op(F.linear, x, model.input("y"), name="both")
    value = model.graph.call_function(torch.neg, (held,))
    loose = model.graph.call_function(F.linear, (x, value))
    model.op(torch.relu, x)
    known = model.module(nn.Linear(4, 4), x, "known")
    assert known is not None
    model.weight()
    found = model.found("not-lowered")
    assert [(f.severity, f.site) for f in found] == [("info", plain.name), ("info", loose.name)]
    assert found[0].evidence == "linear has no quantized weight: it stays in float"


# --- writes


@pytest.mark.parametrize("quantized", [True, False])
def test_a_value_that_is_read_behind_a_write(quantized: bool) -> None:
    model = Model()
    x = model.input()
    value = model.graph.call_function(torch.neg, (x,))
    write = model.graph.call_function(operator.iadd, (value, x))
    if quantized:
        model.site(write, WIDE, "write")
    else:
        model.graph.call_function(torch.sigmoid, (write,))
    model.graph.call_function(torch.neg, (value,)).name = "reader"
    (found,) = model.found("inplace-lost")
    assert (found.severity, found.site) == ("error" if quantized else "warning", write.name)


def test_writes_that_the_int8_op_makes_too() -> None:
    """hardswish_ and dropout_; an exported graph's ops run as they stand."""
    for exported, count in ((False, 0), (True, 1)):
        model = Model(exported=exported)
        value = model.graph.call_function(torch.neg, (model.input(),))
        model.graph.call_function(F.relu, (value,), {"inplace": True})
        model.graph.call_function(F.dropout, (value,), {"training": False, "inplace": True})
        model.graph.call_function(torch.neg, (value,))
        sites = {f.site for f in model.found("inplace-lost")}
        assert len(sites) == count


# --- modes


def test_modules_in_train_mode() -> None:
    model = Model()
    x = model.input()
    norm, drop = nn.BatchNorm1d(4), nn.Dropout()
    model.module(norm, x, "norm")
    model.module(drop, x, "drop")
    assert [f.site for f in model.found("bn-training")] == ["norm"]
    assert [f.site for f in model.found("dropout-training")] == ["drop"]
    model.training = True  # then it is normal
    assert model.found("bn-training") == []
    assert model.found("dropout-training") == []
    assert model.found("nondeterministic") == []
    model.training = False
    norm.eval()
    drop.eval()
    assert model.found("bn-training") == []
    assert model.found("dropout-training") == []


def test_functions_that_were_traced_in_train_mode() -> None:
    model = Model()
    x = model.input()
    model.op(F.dropout, x, 0.5, True, name="on")
    model.op(F.dropout, x, 0.5, False, name="off")
    found = model.found("dropout-training")
    assert [f.site for f in found] == ["dropout"]
    assert model.found("nondeterministic") == []  # said already
    model.op(torch.rand_like, x, name="noise")
    (noise,) = model.found("nondeterministic")
    assert noise.site == "rand_like"

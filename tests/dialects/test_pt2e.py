"""The PT2E reader, judged by running the graphs and by what torchao itself bakes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxqfix import inspect, trace
from fxqfix._pt2e import origins, own_annotations
from fxqfix._torch import quiet
from fxqfix.dialects import Reading, read, read_prepared
from fxqfix.errors import DialectError
from fxqfix.qparams import dequantize
from tests.dialects.nets import Plain, fx_ptq
from tests.states import fingerprint

pytest.importorskip("torchao", reason='the extra "pt2e" is not installed')

from tests.dialects import pt2e_nets as nets  # it imports torchao
from tests.dialects.pt2e_nets import CASES, MODES, image, prepared

each_case = pytest.mark.parametrize(("mode", "net"), CASES)
each_qat_case = pytest.mark.parametrize(("mode", "net"), [c for c in CASES if MODES[c[0]].qat])


class Recorder(fx.Interpreter):
    """Runs a graph and keeps every node's value."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n.name] = value.clone() if isinstance(value, Tensor) else value
        return value


def recorded(model: fx.GraphModule, x: Tensor) -> dict[str, Any]:
    """Values by node name, of a copy whose observers are held still."""
    recorder = Recorder(nets.held(model))
    with torch.no_grad():
        recorder.run(x)
    return recorder.values


def quantizer(reading: Reading, name: str) -> fx.Node:
    tap = reading.tap(name)
    return tap.quantizer or tap.node


# --- prepared ------------------------------------------------------------------------------------


@each_qat_case
def test_used_is_what_the_forward_uses(mode: str, net: str) -> None:
    """torch's own fake-quantize ops with the qparams that were read give the very bits."""
    model = prepared(mode, net)
    reading = read(model)
    values = recorded(model, image(seed=5))
    assert len(reading.taps) > 2 or net == "words"
    for tap in reading.taps:
        node, used = quantizer(reading, tap.site.name), tap.site.used
        assert used is not None
        assert tap.site.quantizes
        x = values[node.all_input_nodes[0].name]
        limits = (used.quant_min, used.quant_max)
        if used.axis is None:
            point = int(used.zero_points[0])
            wanted = torch.fake_quantize_per_tensor_affine(x, used.scales[0], point, *limits)
        else:
            points = torch.tensor(used.zero_points, dtype=torch.int32)
            scales = torch.tensor(used.scales)
            wanted = torch.fake_quantize_per_channel_affine(x, scales, points, used.axis, *limits)
        assert torch.equal(values[node.name], wanted), tap.site


@each_case
def test_baked_is_what_torchao_bakes(mode: str, net: str) -> None:
    """Read off the converted graph's arguments, op by op, through the record of their origin."""
    model = prepared(mode, net)
    reading, converted = read(model), nets.converted(mode, net)
    baked: dict[str, tuple[Any, ...]] = {}
    for node in converted.graph.nodes:
        if "quantize_per" in str(node.target):
            for name in origins(node):
                baked.setdefault(name, _grid(converted, node))
    for tap in reading.taps:
        node, site = quantizer(reading, tap.site.name), tap.site
        if site.used is None:
            assert site.source.startswith("dynamic")
            continue
        assert site.baked is not None
        grid = site.baked.scales, site.baked.zero_points, site.baked.quant_min, site.baked.quant_max
        assert baked[node.name] == grid, site
    assert {t.site.used is None for t in reading.activations} <= {not MODES[mode].static}


def _grid(model: fx.GraphModule, node: fx.Node) -> tuple[Any, ...]:
    given: Any = node.args[1:3]
    if any(isinstance(a, fx.Node) and a.op != "get_attr" for a in given):
        return ()  # chosen at run time
    values = [getattr(model, str(a.target)) if isinstance(a, fx.Node) else a for a in given]
    flat = [torch.as_tensor(v, dtype=torch.float64).flatten().tolist() for v in values]
    limits = node.args[4:6] if "per_channel" in str(node.target) else node.args[3:5]
    return tuple(flat[0]), tuple(flat[1]), *limits


@each_case
def test_names_are_stable_and_nothing_moves(mode: str, net: str) -> None:
    model = prepared(mode, net)
    before = fingerprint(model)
    first = [(s.name, s.kind, s.op, s.module) for s in inspect(model)]
    assert [(s.name, s.kind, s.op, s.module) for s in inspect(copy.deepcopy(model))] == first
    assert len({name for name, *_ in first}) == len(first)
    assert fingerprint(model) == before
    assert read(model).dialect == "pt2e-prepared"


def test_the_fused_fake_quant_is_asked_and_not_its_observer() -> None:
    """torchao's fused kernel picks symmetric scales as torch.ao's does: 127 steps, not 127.5."""
    site = inspect(prepared("x86-qat", "residual")).site("conv2d.weight")
    assert site.source == "fused kernel (FusedMovingAvgObsFakeQuantize)"
    assert site.used is not None
    assert site.baked is not None
    ratios = {round(b / u, 5) for u, b in zip(site.used.scales, site.baked.scales, strict=True)}
    # reason: 127/127.5 and 128/127.5, by which side the channel's largest weight lies on
    assert ratios <= {0.99608, 1.00392}
    assert ratios


def test_a_convolution_with_batch_norm_is_one_op() -> None:
    found = inspect(prepared("x86-qat", "mobile"))
    ops = [(s.kind, s.op, s.module) for s in found]
    assert ("weight", "conv2d", "deep") in ops
    assert ("activation", "conv2d_relu", "act2") in ops
    assert not any(op.startswith("batch_norm") for _, op, _ in ops)
    assert {s.shape for s in found if s.kind == "weight"} == {
        (8, 3, 1, 1),
        (8, 1, 3, 3),
        (3, 8, 1, 1),
    }


def test_biases_are_told_from_weights() -> None:
    found = inspect(prepared("bias-int32", "residual"))
    weights = [s for s in found if s.kind == "weight"]
    assert [s.name.rpartition(".")[2] for s in weights].count("bias") == 3
    bias, weight, x = (found.site(n).used for n in ("conv2d.bias", "conv2d.weight", "x"))
    assert bias is not None
    assert weight is not None
    assert x is not None
    scales = torch.tensor(x.scale) * torch.tensor(weight.scales)
    assert torch.equal(torch.tensor(bias.scales), scales)


def test_learnable_fake_quants() -> None:
    learnable = nets.pt2e.LearnableFakeQuantize.with_args
    weight, activation = nets.weight_spec(), nets.activation_spec()
    per_channel = nets.pt2e.MovingAveragePerChannelMinMaxObserver
    per_tensor = nets.pt2e.MovingAverageMinMaxObserver
    object.__setattr__(weight, "observer_or_fake_quant_ctr", learnable(observer=per_channel))
    object.__setattr__(activation, "observer_or_fake_quant_ctr", learnable(observer=per_tensor))
    with quiet():
        model = nets.prepare_qat_pt2e(
            nets.exported(nets.Mlp().train()), nets.Tiny(weight, activation)
        )
    never = inspect(model)
    assert {s.calibrated for s in never} == {False}
    assert {s.used for s in never} == {None}
    model(image())
    model.apply(nets.pt2e.enable_range_learning)
    for module in model.modules():
        if isinstance(module, nets.pt2e.LearnableFakeQuantize):
            module.scale.data *= 1.03  # as if an optimizer had stepped
            module.zero_point.data += 0.7
    values = recorded(model, image(seed=5))
    reading = read(model)
    assert {t.site.source for t in reading.taps} == {"parameters (LearnableFakeQuantize)"}
    for tap in reading.activations:
        used = tap.site.used
        assert used is not None
        x = values[tap.producer.name]
        wanted = torch.fake_quantize_per_tensor_affine(
            x, used.scales[0], int(used.zero_points[0]), used.quant_min, used.quant_max
        )
        assert torch.equal(values[tap.node.name], wanted)


def test_dynamic_sites_are_marked() -> None:
    found = inspect(prepared("x86-dynamic", "mlp"))
    dynamic = [s for s in found if s.kind == "activation"]
    assert len(dynamic) == 3
    assert all(s.used is None and s.source.startswith("dynamic") for s in dynamic)
    assert all(s.used is not None for s in found if s.kind == "weight")


def test_grids_by_group_are_listed_with_the_reason() -> None:
    with quiet():
        from torchao.quantization import PerGroup
        from torchao.quantization.pt2e import MappingType
        from torchao.quantization.pt2e._affine_quantization import AffineQuantizedMinMaxObserver

        spec = nets.weight_spec()
        grouped = AffineQuantizedMinMaxObserver.with_args(
            mapping_type=MappingType.SYMMETRIC, target_dtype=torch.int8, granularity=PerGroup(4)
        )
        object.__setattr__(spec, "observer_or_fake_quant_ctr", grouped)
        model = nets.prepare_pt2e(nets.exported(nets.Mlp().eval()), nets.Tiny(spec))
        model(image())
        converted = nets.convert(model)
    found = inspect(model)
    assert len(found) == 3
    assert all(s.used is None and "group" in s.source for s in found)
    after = inspect(converted)
    assert [name for name, _ in after.unsupported] == [s.name for s in found]
    assert all("group" in reason for _, reason in after.unsupported)


# --- converted -----------------------------------------------------------------------------------


@each_case
def test_converted_sites_are_what_flows(mode: str, net: str) -> None:
    converted = nets.converted(mode, net)
    reading = read(converted)
    assert reading.dialect == "decomposed"
    values = recorded(converted, image(seed=5, gain=3.0))
    for tap in reading.activations:
        codes, used = values[tap.node.name], tap.site.used
        assert used is not None
        assert not codes.is_floating_point()
        assert used.quant_min <= int(codes.min())
        assert int(codes.max()) <= used.quant_max
        for user in tap.node.users:
            assert torch.equal(values[user.name], dequantize(codes, used))
    for tap in reading.weights:
        assert tap.weight is not None
        view = tap.weight()
        wanted = dequantize(view.codes, view.qparams)
        assert torch.equal(values[tap.producer.name], wanted), tap.site


@each_case
def test_both_sides_have_the_same_weights(mode: str, net: str) -> None:
    """One weight site per quantizer, in one order, and under one name if torchao kept the op."""
    mine, theirs = read(prepared(mode, net)), read(nets.converted(mode, net))
    if (mode, net) != ("x86-qat", "mobile"):  # a convolution whose BatchNorm torchao folds
        assert [t.site.name for t in theirs.weights] == [t.site.name for t in mine.weights]
    assert [t.site.shape for t in theirs.weights] == [t.site.shape for t in mine.weights]


def test_quantize_ops_that_are_not_folded() -> None:
    model = copy.deepcopy(prepared("xnnpack", "residual"))
    own_annotations(model)
    with quiet():
        unfolded = nets.convert_pt2e(model, fold_quantize=False)
    folded = nets.converted("xnnpack", "residual")
    assert [(s.name, s.kind, s.used, s.shape) for s in inspect(unfolded)] == [
        (s.name, s.kind, s.used, s.shape) for s in inspect(folded)
    ]


# --- what is passed in ---------------------------------------------------------------------------


def test_an_exported_program_of_a_converted_model() -> None:
    converted = nets.converted("xnnpack", "residual")
    with quiet():
        program = torch.export.export(converted, (image(),))
    found = inspect(program)
    assert found.dialect == "decomposed"
    assert [s.used for s in found] == [s.used for s in inspect(converted)]
    assert isinstance(trace(program), fx.GraphModule)


def test_an_exported_program_of_a_float_model() -> None:
    with quiet():
        program = torch.export.export(nets.Mlp().eval(), (image(),))
    with pytest.raises(DialectError, match="convert_to_reference_fx, prepare_pt2e"):
        inspect(program)


def test_other_flows_are_not_taken_for_it() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aten.relu.default(self.conv(x))

    assert read(fx_ptq(Mixed())).dialect == "fx-prepared"
    assert read(fx_ptq(Plain())).dialect == "fx-prepared"
    with pytest.raises(DialectError, match="only prepared models"):
        read_prepared(nets.convert(prepared("x86", "mlp")), "test")


def test_annotations_of_a_copy_speak_of_the_copy() -> None:
    """copy.deepcopy leaves them keyed by the nodes of the original: dynamic conversion fails."""
    model = prepared("x86-dynamic", "mlp")
    copied = copy.deepcopy(model)
    before = fingerprint(model)

    def strangers(owner: fx.GraphModule) -> int:
        own = set(owner.graph.nodes)
        found = [n.meta.get("quantization_annotation") for n in owner.graph.nodes]
        return sum(n not in own for a in found if a is not None for n in a.input_qspec_map)

    assert strangers(model) == 0
    assert strangers(copied) > 0
    own_annotations(copied)
    assert strangers(copied) == 0
    assert strangers(model) == 0
    assert fingerprint(model) == before
    with quiet():
        nets.convert_pt2e(copied)

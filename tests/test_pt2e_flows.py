"""PT2E models through every flow: freeze, compare, to_decomposed, lint, extraction."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxqfix
from fxqfix import _pt2e as pt2e_names
from fxqfix import (
    compare,
    extract_parameters,
    freeze,
    golden_vectors,
    inspect,
    lint,
    to_decomposed,
)
from fxqfix._rng import rng_state
from fxqfix._torch import quiet
from fxqfix.dialects import read
from fxqfix.errors import DialectError, MissingDependencyError, PairingError, UncalibratedError
from fxqfix.passes import FloatWeights, InsertShadows
from tests.dialects.nets import Plain as FxPlain
from tests.dialects.nets import fx_qat, int8
from tests.states import fingerprint

pytest.importorskip("torchao", reason='the extra "pt2e" is not installed')

from tests.dialects import pt2e_nets as nets  # it imports torchao
from tests.dialects.pt2e_nets import CASES, MODES, image, prepared

STATIC = [c for c in CASES if MODES[c[0]].static or MODES[c[0]].make is MODES["weight-only"].make]
DYNAMIC = [c for c in CASES if "dynamic" in c[0]]
each_case = pytest.mark.parametrize(("mode", "net"), CASES)
each_static_case = pytest.mark.parametrize(("mode", "net"), STATIC)
each_dynamic_case = pytest.mark.parametrize(("mode", "net"), DYNAMIC)
GAINS = (1.0, 1.5, 3.0)


def outputs(model: nn.Module, gain: float = 1.0) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(image(seed=5, gain=gain))
    return found


# --- freeze --------------------------------------------------------------------------------------


@each_static_case
def test_frozen_equals_what_torchao_converts_it_to(mode: str, net: str) -> None:
    """Every output bit, at and beyond the calibrated amplitude, on torchao's own conversion."""
    frozen = freeze(prepared(mode, net))
    converted = nets.convert(frozen)
    for gain in GAINS:
        assert torch.equal(outputs(frozen, gain), outputs(converted, gain))
    baked = {t.site.name: t.site.used for t in read(converted).taps}
    assert baked == {s.name: s.used for s in inspect(frozen)}


@each_case
def test_freezing_keeps_the_model_and_its_names(mode: str, net: str) -> None:
    model = prepared(mode, net)
    before, state = fingerprint(model), torch.get_rng_state()
    frozen = freeze(model)
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(frozen, fx.GraphModule)
    mine = [(s.name, s.used, s.op) for s in inspect(model)]
    assert [(s.name, s.used, s.op) for s in inspect(frozen)] == mine
    again = freeze(frozen)
    assert torch.equal(outputs(again), outputs(frozen))


@pytest.mark.parametrize("net", ["residual", "mlp", "attention", "words"])
def test_qat_without_batch_norm_computes_what_its_frozen_form_does(net: str) -> None:
    model = prepared("x86-qat", net)
    for gain in GAINS:
        assert torch.equal(outputs(nets.held(model), gain), outputs(freeze(model), gain))


def test_batch_norm_is_folded_as_the_fake_quants_saw_it() -> None:
    """The weights have the very codes; what folding itself rounds is named as such."""
    model = prepared("x86-qat", "mobile")
    frozen = freeze(model)
    assert not any("batch_norm" in str(n.target) for n in frozen.graph.nodes)
    assert not any("add_" in str(n.target) for n in frozen.graph.nodes)
    mine = {t.site.name: t.weight().codes for t in read(model).weights if t.weight}
    theirs = {t.site.name: t.weight().codes for t in read(frozen).weights if t.weight}
    assert len(mine) == 3
    for name, codes in mine.items():
        assert torch.equal(codes, theirs[name])
    report = compare(model, to_decomposed(model), [image(seed=s) for s in range(8)])
    assert report.unexplained == 0
    assert report.causes.keys() <= {"bn-folding", "upstream"}
    assert report.coverage.unpaired == ()


def test_a_derived_bias_follows_the_frozen_scales() -> None:
    """Its scale is input scale times weight scale: of the frozen ones, not of the observers'."""
    weight, activation = nets.weight_spec(), nets.activation_spec()
    fused = nets.pt2e.FusedMovingAvgObsFakeQuantize.with_args
    per_channel = nets.pt2e.MovingAveragePerChannelMinMaxObserver
    object.__setattr__(weight, "observer_or_fake_quant_ctr", fused(observer=per_channel))
    object.__setattr__(activation, "observer_or_fake_quant_ctr", fused())
    model = nets.prepare(nets.Mlp(), nets.Tiny(weight, activation, bias=True), qat=True)
    found = inspect(freeze(model))
    bias, own, x = (found.site(n).used for n in ("linear.bias", "linear.weight", "slice_1"))
    assert bias is not None
    assert own is not None
    assert x is not None
    assert torch.equal(torch.tensor(bias.scales), torch.tensor(x.scale) * torch.tensor(own.scales))
    before = inspect(model).site("linear.bias").used
    assert before is not None
    assert before.scales != bias.scales  # the fused kernel's weight scale is another


# --- to_decomposed -------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "net"), [*STATIC, ("embedding", "words")])
def test_decomposed_equals_frozen(mode: str, net: str) -> None:
    model = prepared(mode, net)
    before = fingerprint(model)
    decomposed, frozen = to_decomposed(model), freeze(model)
    assert fingerprint(model) == before
    for gain in GAINS:
        assert torch.equal(outputs(decomposed, gain), outputs(frozen, gain))
    with torch.no_grad():
        assert compare(frozen, decomposed, [image(seed=5, gain=3.0)]).exact


def test_embeddings_are_cut_off_by_torch_and_that_is_named() -> None:
    model = prepared("embedding", "words")
    own = compare(model, nets.converted("embedding", "words"), [image()])
    assert own.causes.keys() == {"zero-point-cut", "upstream"}
    assert own.row("embedding.weight").local.max_lsb == 1
    assert compare(fxqfix.freeze(model), to_decomposed(model), [image()]).exact


@each_dynamic_case
def test_dynamic_ops_are_converted_as_they_are(mode: str, net: str) -> None:
    """Weights of observers: what is baked is what torchao bakes, so that every bit is equal."""
    decomposed, own = to_decomposed(prepared(mode, net)), nets.converted(mode, net)
    for gain in GAINS:
        assert torch.equal(outputs(decomposed, gain), outputs(own, gain))


@pytest.mark.parametrize(
    ("mode", "net"), [("x86-reduced", "residual"), ("sub-8-bit", "residual"), ("xnnpack", "mlp")]
)
def test_converted_models_get_their_ranges_pinned(mode: str, net: str) -> None:
    converted = nets.converted(mode, net)
    before = fingerprint(converted)
    pinned = to_decomposed(converted)
    assert fingerprint(converted) == before
    narrow = [s for s in inspect(converted) if s.kind == "activation" and s.used.is_narrow]
    clamps = [n for n in pinned.graph.nodes if n.target is torch.clamp]
    assert len(clamps) == len(narrow)
    assert bool(narrow) == (mode != "xnnpack")
    for gain in GAINS:
        assert torch.equal(outputs(pinned, gain), outputs(converted, gain))


# --- compare -------------------------------------------------------------------------------------


@each_case
def test_every_site_is_paired_or_has_its_reason(mode: str, net: str) -> None:
    model, converted = prepared(mode, net), nets.converted(mode, net)
    before, state = fingerprint(model), rng_state()[0]
    report = compare(model, converted, [image(seed=5), image(seed=6, gain=1.5)])
    assert report.unexplained == 0
    covered = report.coverage
    named = {name for name, *_ in covered.paired}
    named |= {u.name for u in (*covered.unpaired, *covered.unsupported) if u.side == "prepared"}
    assert named == {s.name for s in inspect(model)}
    assert all(u.reason for u in (*covered.unpaired, *covered.unsupported))
    assert {how for *_, how in covered.paired} == {"origin"}
    static = [s for s in inspect(model) if s.used is not None]
    assert len(covered.paired) == len(static) == sum(r.kind != "output" for r in report.rows)
    assert fingerprint(model) == before
    assert torch.equal(rng_state()[0], state)


def test_torchaos_own_conversion_of_batch_norm() -> None:
    """It folds anew, with other roundings and the observer's scales: named, nothing unexplained."""
    model = prepared("x86-qat", "mobile")
    own = nets.converted("x86-qat", "mobile")
    report = compare(model, own, [image(seed=s) for s in range(8)])
    assert report.unexplained == 0
    assert report.causes["scale-formula"] > 0
    assert report.causes.keys() <= {"scale-formula", "bn-folding", "rounding", "upstream"}
    assert report.coverage.unpaired == ()
    assert {how for *_, how in report.coverage.paired} == {"origin"}


def test_repair_mends_torchaos_own_conversion() -> None:
    model, own = prepared("x86-qat", "mobile"), nets.converted("x86-qat", "mobile")
    mended = fxqfix.repair(model, own, data=[image(seed=1)])
    assert {m.site for m in mended.applied} == {
        row.name for row in mended.before.rows if row.kind == "weight"
    }
    assert sum(row.local.differing for row in mended.before.rows) > 0
    assert sum(row.local.differing for row in mended.after.rows) == 0
    assert not fxqfix.repair(model, mended.graph_module).modified
    x = image(seed=3)
    with torch.no_grad():
        assert torch.equal(mended.graph_module(x), freeze(model)(x))


class Twice(nn.Module):
    """A layer that is called twice: conversion repeats the dequantize of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.sigmoid(self.inner(x)))


@pytest.fixture(scope="module")
def twice() -> tuple[fx.GraphModule, fx.GraphModule]:
    torch.manual_seed(0)
    model = nets.prepare(Twice(), nets.x86(is_qat=True, reduce_range=True), qat=True)
    return model, nets.convert(model)


def test_repair_mends_a_weight_for_all_that_read_it(twice: Any) -> None:
    model, own = twice
    mended = fxqfix.repair(model, own, data=[image(seed=1)])
    assert mended.before.causes["scale-formula"] > 0
    assert sum(row.local.differing for row in mended.after.rows) == 0
    assert mended.after.coverage.unpaired == ()
    assert not fxqfix.repair(model, mended.graph_module).modified
    x = image(seed=3)
    with torch.no_grad():
        assert torch.equal(mended.graph_module(x), freeze(model)(x))


def test_a_weight_that_two_ops_read_is_extracted_for_both(twice: Any) -> None:
    for decomposed in (to_decomposed(twice[0]), twice[1]):
        (tap,) = (t for t in read(decomposed).weights if t.weight)
        assert len(tap.repeats) == 1
        linears = [op for op in extract_parameters(decomposed) if op.op == "linear"]
        assert len(linears) == 2
        assert all(torch.equal(op.weight, tap.weight().codes) for op in linears)
        golden = golden_vectors(decomposed, image(seed=5))
        assert torch.equal(golden.output_of(linears[1].name), outputs(decomposed))


def test_a_weight_that_two_ops_read_is_made_float_for_both(twice: Any) -> None:
    model = copy.deepcopy(twice[1])
    (tap,) = (t for t in read(model).weights if t.weight)
    model.get_buffer(str(tap.producer.args[2])).fill_(3)  # zero points
    made = FloatWeights()(model)
    assert made.modified
    assert read(made.graph_module).weights == ()
    assert torch.equal(outputs(made.graph_module), outputs(model))


def test_converted_none_means_torchaos_own_conversion() -> None:
    model = prepared("xnnpack-qat", "branches")
    mine = compare(model, None, [image(seed=5)])
    given = compare(model, nets.converted("xnnpack-qat", "branches"), [image(seed=5)])
    assert str(mine) == str(given)
    assert mine.causes["scale-formula"] > 0


def test_pairing_without_the_record_of_origins() -> None:
    """After torch.export, say: names and dataflow are enough here."""
    model = prepared("x86-qat", "residual")
    bare = copy.deepcopy(nets.converted("x86-qat", "residual"))
    for node in bare.graph.nodes:
        node.meta.pop("from_node", None)
    report = compare(model, bare, [image(seed=5)])
    assert {how for *_, how in report.coverage.paired} <= {"name", "dataflow"}
    assert report.coverage.unpaired == ()
    known = compare(model, nets.converted("x86-qat", "residual"), [image(seed=5)])
    assert report.causes == known.causes


def test_an_exported_program_is_taken_as_the_converted_model() -> None:
    model, own = prepared("x86-qat", "residual"), nets.converted("x86-qat", "residual")
    with quiet():
        program = torch.export.export(own, (image(),))
    report = compare(model, program, [image(seed=5)])
    assert report.coverage.unpaired == ()
    assert report.causes == compare(model, own, [image(seed=5)]).causes
    again = to_decomposed(program)
    assert torch.equal(outputs(again), outputs(own))


def test_sites_inside_a_loop_are_listed() -> None:
    """Control flow calls its body as a whole: frozen and converted like the rest, but no rows."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            def more(count: Tensor, _: Tensor) -> Tensor:
                return count < 3

            def body(count: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
                return count + 1, torch.relu(self.step(value))

            start = (x[:, 0, 0] * 1.0).contiguous()
            return self.last(torch.while_loop(more, body, (torch.tensor(0), start))[1])

    torch.manual_seed(0)
    model = nets.prepare(Loop(), nets.xnnpack(is_per_channel=True))
    frozen = freeze(model)
    converted = nets.convert(frozen)
    assert torch.equal(outputs(frozen, 1.5), outputs(converted, 1.5))
    report = compare(model, converted, [image(seed=5)])
    assert report.unexplained == 0
    hidden = {u.name for u in report.coverage.unsupported if u.side == "prepared"}
    assert len(hidden) == 3  # the state, the weight, which is handed in as well, and the relu
    paired = {name for name, *_ in report.coverage.paired}
    assert paired | hidden == {s.name for s in inspect(model)}


def test_the_converted_outputs_pass_through_the_twin() -> None:
    model, own = prepared("x86-qat", "residual"), nets.converted("x86-qat", "residual")
    twin = InsertShadows(model)(own).graph_module
    with torch.no_grad():
        assert torch.equal(twin(image(seed=5)), own(image(seed=5)))


def test_batch_norm_left_in_train_mode_is_the_cause() -> None:
    torch.manual_seed(0)
    with quiet(), nets.only_conv2d():
        net = nets.exported(nets.Mobile().train())
        model = nets.prepare_qat_pt2e(net, nets.x86(is_qat=True))
        for seed in range(2):
            model(image(seed=seed))
    findings = lint(model).of("error")
    found = [f for f in findings if f.code == "bn-training"]
    assert len(found) == 3
    assert "move_exported_model_to_eval" in found[0].remedy
    assert any(f.code == "dropout-training" for f in findings)
    report = compare(model, to_decomposed(model), [image(seed=5, gain=2.0)])
    assert report.unexplained == 0
    assert report.causes["bn-training"] > 0
    assert any("train mode" in note for note in report.notes)


# --- lint ----------------------------------------------------------------------------------------


def test_lint_speaks_of_pt2e() -> None:
    findings = lint(prepared("x86-qat", "residual")).findings
    codes = {f.code for f in findings}
    assert codes == {"scale-formula", "moving-observer", "int16-saturation"}
    remedies = {f.remedy for f in findings if f.code == "moving-observer"}
    assert all("torchao.quantization.pt2e.disable_observer" in r for r in remedies)
    frozen = {f.code for f in lint(freeze(prepared("x86-qat", "residual"))).findings}
    assert frozen == {"int16-saturation"}


def test_ops_that_the_quantizer_leaves_float() -> None:
    found = [f for f in lint(prepared("xnnpack", "branches")).findings if f.code == "not-lowered"]
    # The quantizer annotates a convolution that is called twice only once.
    assert [f.site for f in found] == ["conv2d_1", "conv_transpose2d"]
    assert all("annotate it in the quantizer" in f.remedy for f in found)


def test_uncalibrated_models() -> None:
    with quiet():
        model = nets.prepare_pt2e(nets.exported(nets.Mlp().eval()), nets.x86())
    found = [f for f in lint(model).of("error") if f.code == "uncalibrated"]
    assert {f.site for f in found} >= {"slice_1", "relu", "gelu"}
    for act in (freeze, to_decomposed, lambda m: compare(m, None, [image()])):
        with pytest.raises(UncalibratedError):
            act(model)


# --- parameters and golden vectors ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "net"),
    [("x86", "residual"), ("xnnpack", "mobile"), ("x86-qat", "mobile"), ("bias-int32", "mlp")],
)
def test_parameters_and_golden_vectors(mode: str, net: str) -> None:
    decomposed = to_decomposed(prepared(mode, net))
    parameters = extract_parameters(decomposed)
    held = [op for op in parameters.ops if op.weight is not None]
    buffers = [
        t.weight().codes for t in read(decomposed).weights if t.weight and "weight" in t.site.name
    ]
    assert len(held) == len(buffers) == 3
    same = [any(torch.equal(op.weight.int(), b.int()) for b in buffers) for op in held]
    assert all(same)
    means = [op for op in parameters.ops if op.op == "mean"]
    assert all(op.options["dim"] == (2, 3) and "dtype" not in op.options for op in means)
    x = image(seed=5)
    golden = golden_vectors(decomposed, x)
    output = golden.output_of(parameters.ops[-1].name)
    assert torch.equal(output, outputs(decomposed)) or not output.is_floating_point()


# --- bad input -----------------------------------------------------------------------------------


def test_a_program_where_a_prepared_model_is_wanted() -> None:
    with quiet():
        program: Any = torch.export.export(nets.Mlp().eval(), (image(),))
    for act in (freeze, lint, to_decomposed, lambda p: compare(p, None, [image()])):
        with pytest.raises(DialectError, match="prepare_pt2e"):
            act(program)


def test_swapped_and_strange_models() -> None:
    model, own = prepared("x86", "residual"), nets.converted("x86", "residual")
    with pytest.raises(PairingError, match="swapped"):
        compare(own, model, [image()])
    with pytest.raises(PairingError):
        compare(model, nets.converted("x86", "mlp"), [image()])
    with pytest.raises(PairingError):
        compare(model, int8(fx_qat(FxPlain())), [image()])


def test_models_with_nothing_but_grids_by_group() -> None:
    with quiet():
        from torchao.quantization import PerGroup
        from torchao.quantization.pt2e import MappingType
        from torchao.quantization.pt2e._affine_quantization import AffineQuantizedMinMaxObserver

        spec = nets.weight_spec()
        grouped = AffineQuantizedMinMaxObserver.with_args(
            mapping_type=MappingType.SYMMETRIC, target_dtype=torch.int8, granularity=PerGroup(4)
        )
        object.__setattr__(spec, "observer_or_fake_quant_ctr", grouped)
        model = nets.prepare(nets.Mlp(), nets.Tiny(spec))
    with pytest.raises(DialectError, match="group"):
        compare(model, None, [image()])
    assert torch.equal(outputs(to_decomposed(model)), outputs(nets.convert(model)))


def test_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pt2e_names._torch, "resolve", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r'pip install "fxqfix\[pt2e\]"'):
        pt2e_names.convert(copy.deepcopy(prepared("x86", "mlp")))
    assert fxqfix.errors.MissingDependencyError is MissingDependencyError

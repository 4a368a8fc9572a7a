"""Models that somebody edited after they were made, or that hold what a graph does not show."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    QuantWrapper,
    disable_fake_quant,
    disable_observer,
    get_default_qat_qconfig,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
    prepare_qat,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx
from torch.nn.utils import prune, weight_norm

import fxqfix
from fxqfix import certificate_of, compare, freeze, lint, to_decomposed, to_int8
from fxqfix._torch import quantized_engine, quiet
from fxqfix.errors import DialectError, PairingError, UnsupportedError
from tests.states import fingerprint

X = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def prepared(model: nn.Module | None = None, *, qat: bool = False) -> Any:
    model = model or net()
    with quiet():
        if qat:
            made = prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping("fbgemm"), (X,))
        else:
            made = prepare_fx(model.eval(), get_default_qconfig_mapping("fbgemm"), (X,))
        made(X)
    return made.eval()


def converted(model: Any) -> Any:
    with quiet(), quantized_engine("fbgemm"):
        return convert_fx(copy.deepcopy(model))


@pytest.mark.parametrize("frozen", [True, False])
def test_an_edited_scale_is_other_qparams(frozen: bool) -> None:
    model = freeze(prepared()) if frozen else prepared()
    edited = converted(model)
    getattr(edited, "0").scale *= 1.3
    report = compare(model, edited, [X], engine="fbgemm")
    assert report.row("_0").causes["other-qparams"] > 0
    assert not {"scale-formula", "moving-observer", "unexplained"} & report.causes.keys()
    assert report.verdict == "not ok"


def test_an_edited_grid_is_no_observer_that_moved() -> None:
    model = prepared(qat=True)
    edited = converted(model)
    getattr(edited, "0").scale *= 1.1
    report = compare(model, edited, [X], engine="fbgemm")
    assert report.row("_0").causes["other-qparams"] > 0
    assert not {"moving-observer", "unexplained"} & report.causes.keys()
    edited = converted(model)
    model(2 * X)  # its observers are on, in eval mode too
    moved = compare(model, edited, [X], engine="fbgemm").causes
    assert moved["moving-observer"] > 0
    assert "other-qparams" not in moved


@pytest.mark.parametrize("frozen", [True, False])
def test_an_edited_zero_point_is_a_fault(frozen: bool) -> None:
    model = freeze(prepared()) if frozen else prepared()
    edited = converted(model)
    getattr(edited, "0").zero_point += 5
    report = compare(model, edited, [X / 2], engine="fbgemm")
    assert any("codes shifted by 5 at _0" in fault for fault in report.faults)


def test_a_weight_under_another_scale_is_other_qparams() -> None:
    model = freeze(prepared(qat=True))
    edited = converted(model)
    layer = getattr(edited, "0")
    weight, scales = layer.weight(), layer.weight().q_per_channel_scales()
    points, codes = weight.q_per_channel_zero_points(), weight.int_repr()
    layer.set_weight_bias(
        torch._make_per_channel_quantized_tensor(codes, scales * 1.3, points, 0), layer.bias()
    )
    report = compare(model, edited, [X], engine="fbgemm")
    assert set(report.row("_0.weight").causes) == {"other-qparams"}
    assert report.row("_0").causes["other-qparams"] > 0
    assert not {"other-weights", "unexplained"} & report.causes.keys()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * 2 + 1


@pytest.mark.parametrize("frozen", [True, False])
def test_lint_knows_the_grids_of_kernels_with_numbers(frozen: bool) -> None:
    model = freeze(prepared(Scaled())) if frozen else prepared(Scaled())
    found = [f for f in lint(model, engine="fbgemm").findings if f.code == "shared-qparams"]
    assert {f.site for f in found} == {"mul", "add"}
    rows = {r.name: r for r in compare(model, converted(model), [X], engine="fbgemm").rows}
    for finding in found:
        theirs = rows[finding.site].converted
        assert theirs is not None
        assert f"{theirs.scales[0]:.6g}/{theirs.zero_points[0]:g}" in finding.evidence


class GivesNaN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        return y, torch.log(-y.abs() - 1)


def test_equal_nan_is_equal() -> None:
    model = freeze(prepared(GivesNaN()))
    for other in (to_decomposed(model), to_int8(model, engine="fbgemm")):
        report = compare(model, other, [X], engine="fbgemm")
        assert report.exact, report.reasons
        assert report.row("output 1").cumulative.elements == X.numel()
    wrong = copy.deepcopy(to_decomposed(model))
    wrong.register_forward_hook(lambda _, __, out: (out[0], torch.zeros_like(out[1])))
    outputs = compare(model, wrong, [X], engine="fbgemm").row("output 1")
    assert outputs.cumulative.exact  # a hook on the whole model is not in its graph


def test_weights_that_a_hook_computes_have_a_remedy_that_helps() -> None:
    with pytest.warns(FutureWarning, match="deprecated"):
        normed = weight_norm(nn.Linear(8, 8))
    model = prepared(nn.Sequential(normed))
    with pytest.raises(UnsupportedError, match="remove_weight_norm"):
        to_int8(model, engine="fbgemm")
    pruned = nn.Sequential(nn.Linear(8, 8))
    prune.l1_unstructured(pruned[0], "weight", 0.5)
    model = prepared(pruned)
    with pytest.raises(UnsupportedError, match=r"prune\.remove"):
        to_int8(model, engine="fbgemm")
    for module in model.modules():
        if prune.is_pruned(module) and hasattr(module, "weight_orig"):
            prune.remove(module, "weight")
    assert certificate_of(to_int8(model, engine="fbgemm")).ok


def test_hooks_of_the_whole_model_are_kept_and_named() -> None:
    model = prepared()
    model.register_forward_hook(lambda _, __, out: out * 2)
    frozen, plain = freeze(model), freeze(prepared())
    assert torch.equal(frozen(X), 2 * plain(X))
    assert torch.equal(to_decomposed(model)(X), 2 * plain(X))
    certificate = certificate_of(to_int8(model, engine="fbgemm"))
    assert certificate.verdict == "not judged"
    assert any("a forward hook" in reason for reason in certificate.left_out)


def test_a_decomposed_graph_inside_of_a_module_is_read() -> None:
    model = freeze(prepared())
    report = compare(model, nn.Sequential(to_decomposed(model)), [X])
    assert report.exact, report.reasons


def test_a_certificate_is_not_given_for_an_edited_model() -> None:
    model = to_int8(prepared(), engine="fbgemm")
    assert certificate_of(copy.deepcopy(model)).ok
    edited = copy.deepcopy(model)
    for node in edited.graph.find_nodes(op="call_function", target=fxqfix.inserted.hold_range):
        node.replace_all_uses_with(node.args[0])
        edited.graph.erase_node(node)
    edited.recompile()
    with pytest.raises(DialectError, match="edited"):
        certificate_of(edited)
    getattr(model, "0").scale *= 2
    with pytest.raises(DialectError, match="edited"):
        certificate_of(model)


def test_other_values_in_a_float_layer_are_other_weights() -> None:
    mapping = get_default_qconfig_mapping("fbgemm").set_module_name("2", None)
    with quiet():
        model = prepare_fx(net().eval(), mapping, (X,))
        model(X)
    edited = converted(model)
    with torch.no_grad():
        getattr(edited, "2").bias.add_(0.5)
    report = compare(freeze(model), edited, [X], engine="fbgemm")
    assert report.row("output 0").causes == {"other-weights": 32}


def test_a_loud_channel_does_not_hide_another_bias() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[0] *= 1e5
        model[2].weight[1] *= 0.01
        model[2].bias[1] = 1e-3
    mapping = get_default_qconfig_mapping("fbgemm").set_module_name("2", None)
    with quiet():
        made = prepare_fx(model.eval(), mapping, (X,))
        made(X)
    edited = converted(freeze(made))
    with torch.no_grad():
        getattr(edited, "2").bias[1] *= 2
    report = compare(freeze(made), edited, [X], engine="fbgemm")
    assert report.row("output 0").causes == {"other-weights": 8}
    assert report.verdict == "not ok"


@pytest.mark.parametrize("moved", [2.0**-24, 2.0**-19, 2.0**-12])
@pytest.mark.parametrize("dialect", ["int8", "decomposed"])
def test_a_float_bias_is_compared_to_the_bit(dialect: str, moved: float) -> None:
    """However little it moved: no order of sums gives a parameter another value."""
    mapping = get_default_qconfig_mapping("fbgemm").set_module_name("2", None)
    model = net()
    with torch.no_grad():
        model[2].bias[1] = 8.0
    with quiet():
        made = prepare_fx(model.eval(), mapping, (X,))
        made(X)
    frozen = freeze(made)
    edited = converted(frozen) if dialect == "int8" else to_decomposed(frozen)
    before = compare(frozen, edited, [X], engine="fbgemm")
    assert "other-weights" not in before.causes
    with torch.no_grad():
        getattr(edited, "2").bias.add_(8.0 * moved)
    report = compare(frozen, edited, [X], engine="fbgemm")
    assert report.row("output 0").causes == {"other-weights": report.row("output 0").differing}
    assert report.verdict == "not ok"


@pytest.mark.parametrize("flow", ["fx", "eager"])
def test_a_prepared_model_beside_itself_is_exact(flow: str) -> None:
    """Both have their observers held still; one that moved since has another grid."""
    if flow == "fx":
        model = prepared(qat=True)
    else:
        wrapped = QuantWrapper(net()).train()
        wrapped.qconfig = get_default_qat_qconfig("fbgemm")
        with quiet():
            model = prepare_qat(wrapped)
            model(X)
        model.eval()
    other = copy.deepcopy(model)
    report = compare(model, other, [2 * X])
    assert report.exact, report.reasons
    assert "held at their present state too" in " ".join(report.notes)
    before = fingerprint(other)
    other(3 * X)
    assert fingerprint(other) != before
    moved = compare(model, other, [2 * X])
    assert moved.causes["moving-observer"] > 0
    assert moved.unexplained == 0
    assert moved.verdict == "not ok"
    other.apply(disable_observer)
    assert "held at their present state too" not in " ".join(compare(model, other, [X]).notes)


def test_a_model_that_only_observes_is_no_conversion() -> None:
    model = prepared()
    off = prepared(qat=True)
    off.apply(disable_fake_quant)
    for other in (copy.deepcopy(model), off):
        with pytest.raises(PairingError, match="quantizes nothing at some sites") as info:
            compare(model, other, [X])
        assert "pass fxqfix.freeze(it)" in str(info.value)
    assert compare(model, freeze(model), [X]).ok

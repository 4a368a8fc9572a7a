"""What the models return: a row each, equal to the bit or explained, in every container."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import fxqfix
from fxqfix._torch import quiet
from fxqfix.errors import PairingError

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


class Containers(nn.Module):
    """Floats, integers and a quantized value, in a dict with a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.a(x)
        return {"part": y[:, :3], "rest": (self.b(y), y.argmax(-1)), "soft": y.softmax(-1)}


def prepared(net: nn.Module, x: Tensor = X, *, qat: bool = False) -> Any:
    torch.manual_seed(0)
    with quiet():
        if qat:
            model = prepare_qat_fx(net.train(), tq.get_default_qat_qconfig_mapping("fbgemm"), (x,))
        else:
            model = prepare_fx(net.eval(), tq.get_default_qconfig_mapping("fbgemm"), (x,))
        model(x)
    return model.eval()


def outputs(report: fxqfix.Report) -> list[Any]:
    return [row for row in report.rows if row.kind == "output"]


def test_every_tensor_in_every_container_has_a_row() -> None:
    model = prepared(Containers())
    frozen = fxqfix.freeze(model)
    deployed = fxqfix.to_int8(frozen, engine="fbgemm")
    report = fxqfix.compare(frozen, deployed, [X, 2 * X], engine="fbgemm")
    rows = outputs(report)
    assert [row.name for row in rows] == [f"output {i}" for i in range(4)]
    assert [row.cumulative.elements for row in rows] == [24, 32, 8, 64]
    assert [row.inputs for row in rows] == [("a",), ("b",), ("a",), ("a",)]
    assert report.exact
    found, wanted = ({str(k): v for k, v in m(2 * X).items()} for m in (deployed, frozen))
    assert torch.equal(found["rest"][1], wanted["rest"][1])


def test_an_unpaired_tail_shows_at_the_output() -> None:
    """An output that was scaled by hand: all sites are equal, and the report is not."""
    model = prepared(Containers())
    frozen = fxqfix.freeze(model)
    deployed = fxqfix.to_int8(frozen, engine="fbgemm")
    output = next(n for n in deployed.graph.nodes if n.op == "output")
    first = output.all_input_nodes[0]
    with deployed.graph.inserting_before(output):
        scaled = deployed.graph.call_function(torch.mul, (first, 1.001))
    output.replace_input_with(first, scaled)
    deployed.recompile()
    report = fxqfix.compare(frozen, deployed, [X], engine="fbgemm")
    assert all(row.exact for row in report.rows if row.kind != "output")
    row = report.row("output 0")
    assert row.causes == {"unexplained": row.differing}
    assert row.differing > 0
    assert report.verdict == "not ok"
    assert not report.exact


@pytest.mark.parametrize("attribute", [True, False])
def test_outputs_behind_differing_codes_are_inherited(attribute: bool) -> None:
    model = prepared(Containers(), qat=True)
    with quiet():
        converted = convert_fx(copy.deepcopy(model))
    report = fxqfix.compare(model, converted, [3 * X], engine="fbgemm", attribute=attribute)
    for row in outputs(report):
        assert row.local is not None
        assert row.local.exact
        expected = {"upstream": row.cumulative.differing} if row.cumulative.differing else {}
        assert row.causes == (expected if attribute else {})
    assert report.verdict == "not ok"


def test_an_output_less_is_a_fault() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.fc(x)
            return y, y + 1.0

    frozen = fxqfix.freeze(prepared(Two()))
    deployed = fxqfix.to_int8(frozen, engine="fbgemm")
    output = next(n for n in deployed.graph.nodes if n.op == "output")
    output.args = (output.args[0][0],)
    deployed.recompile()
    report = fxqfix.compare(frozen, deployed, [X], engine="fbgemm")
    assert any("the converted model does not return it" in why for why in report.faults)
    assert report.faults[0].startswith("output [1]: ")
    assert report.verdict == "not ok"
    output.args = ((output.args[0], output.args[0], output.args[0]),)  # one more is none less
    deployed.recompile()
    more = fxqfix.compare(frozen, deployed, [X], engine="fbgemm")
    assert any("returns 2 tensors, the converted one 3" in why for why in more.left_out)
    assert (more.verdict, more.coverage.lacking) == ("not judged", ())


def test_a_tensor_less_in_what_one_op_returns_is_a_fault() -> None:
    """The graph has one value, at run time a tuple of tensors."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Any:
            return self.fc(x).split(2, -1)

    frozen = fxqfix.freeze(prepared(Parts()))
    deployed = fxqfix.to_int8(frozen, engine="fbgemm")
    split = next(n for n in deployed.graph.nodes if n.target == "split")
    split.args = (split.args[0], 4, -1)
    deployed.recompile()
    report = fxqfix.compare(frozen, deployed, [X], engine="fbgemm")
    assert report.verdict == "not ok"
    assert "outputs: the prepared model returns 2 tensors, the converted one 1" in report.faults


@pytest.mark.parametrize(
    "tail", [(nn.AvgPool2d(2), nn.Flatten()), (nn.AdaptiveAvgPool2d(1),), (nn.MaxPool2d(2),)]
)
def test_a_tail_that_eager_mode_does_not_observe(tail: tuple[nn.Module, ...]) -> None:
    """Averages round to their input's grid; the cause says so, and max pools stay exact."""
    torch.manual_seed(0)
    net = nn.Sequential(tq.QuantStub(), nn.Conv2d(3, 4, 3), *copy.deepcopy(tail), tq.DeQuantStub())
    net.train().qconfig = tq.get_default_qat_qconfig("fbgemm")
    x = torch.randn(4, 3, 8, 8)
    with quiet():
        model = tq.prepare_qat(net)
        model(x)
    model.eval().apply(tq.disable_observer)
    frozen, deployed = fxqfix.freeze(model), fxqfix.to_int8(model, engine="fbgemm")
    report = fxqfix.compare(frozen, deployed, [x, 3 * x], engine="fbgemm")
    assert report.unexplained == 0
    assert report.exact == torch.equal(frozen(3 * x), deployed(3 * x))
    averages = not isinstance(tail[0], nn.MaxPool2d)
    assert ("requantization" in report.row("output 0").causes) == averages
    assert any("only the converted model rounds at" in note for note in report.notes) == averages
    assert (fxqfix.certificate_of(deployed).verdict == "not judged") == averages


def test_a_weight_behind_the_last_site() -> None:
    """PT2E leaves the last linear's output in float: what its weight does is inherited from it."""
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    torch.manual_seed(0)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    program = torch.export.export(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), (X,))
    with quiet():
        model = pt2e.prepare_qat_pt2e(program.module(), quantizer)
        model(X)
        converted = pt2e.convert_pt2e(copy.deepcopy(model))
    report = fxqfix.compare(model, converted, [X])
    row = report.row("output 0")
    assert report.unexplained == 0
    assert row.local is not None
    weight = [r for r in report.rows if r.kind == "weight"][-1]
    assert bool(row.local.differing) == bool(weight.cumulative.noise)
    assert fxqfix.compare(fxqfix.freeze(model), fxqfix.to_decomposed(model), [X, 3 * X]).exact


def test_float_placeholders_are_no_sites() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 4)
            self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.dequant(self.head(self.quant(self.embed(ids) * mask)))

    torch.manual_seed(0)
    net = Tagger().eval()
    net.qconfig = tq.get_default_qconfig("fbgemm")
    net.embed.qconfig = tq.float_qparams_weight_only_qconfig
    ids, mask = torch.randint(0, 50, (6, 7)), torch.ones(6, 7, 1)
    with quiet():
        model = tq.prepare(net)
    model(ids, mask)
    frozen = fxqfix.freeze(model)
    deployed = fxqfix.to_int8(model, engine="fbgemm")
    report = fxqfix.compare(frozen, deployed, [(ids, mask)], engine="fbgemm")
    assert report.exact == torch.equal(frozen(ids, mask), deployed(ids, mask))
    assert report.exact


def test_random_ops_are_not_certified_without_data() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.fc(x), 0.5, True)

    certificate = fxqfix.certificate_of(fxqfix.to_int8(prepared(Dropping()), engine="fbgemm"))
    assert certificate.verdict == "not judged"
    assert any("draws random numbers" in reason for reason in certificate.left_out)


def test_kernels_that_quantize_at_run_time_are_not_judged() -> None:
    """A dynamic linear quantizes its input per batch; the prepared model computes in float."""
    with quiet():
        mapping = tq.QConfigMapping().set_global(tq.default_dynamic_qconfig)
        model = prepare_fx(nn.Sequential(nn.Linear(8, 4)).eval(), mapping, (X,))
        converted = convert_fx(copy.deepcopy(model))
    report = fxqfix.compare(model, converted, [X])
    row = report.row("output 0")
    assert row.differing > 0
    assert report.unexplained == 0
    assert "quantizes in its kernel" in row.problems[0]
    assert report.verdict == "not judged"


class Returned(nn.Module):
    """A value that a quantized op reads, and that is returned too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(8, 8), nn.LeakyReLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.act(self.a(x))
        return self.b(y), y


def test_an_output_that_only_the_deployed_model_quantizes() -> None:
    """The activation has no qconfig: training returned it in float, torch returns its codes."""
    with quiet():
        mapping = tq.get_default_qat_qconfig_mapping("fbgemm").set_module_name("act", None)
        model = prepare_qat_fx(Returned().train(), mapping, (X,))
        model(X)
    frozen = fxqfix.freeze(model.eval())
    deployed = fxqfix.to_int8(frozen, engine="fbgemm")
    assert deployed(X)[1].is_quantized
    certificate = fxqfix.certificate_of(deployed)
    assert certificate.verdict == "not judged"
    assert ("output 1", "quantized, as act is; in training in float") in certificate.unchecked
    row = outputs(fxqfix.compare(frozen, deployed, [X, 3 * X], engine="fbgemm"))[1]
    assert row.causes == {"requantization": row.differing}  # values beyond the range included
    assert row.differing > 0
    assert "'act' is rounded to" in row.evidence["requantization"]


class Keyed(nn.Module):
    """Two values under keys."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"u": self.a(x), "v": self.b(x)}


@pytest.mark.parametrize(
    ("edit", "verdict", "exact", "said"),
    [
        (lambda a: {"v": a["v"], "u": a["u"]}, "ok", True, ""),  # another order
        (lambda a: {"v": a["u"], "u": a["v"]}, "not ok", False, ""),  # each under the other's key
        (lambda a: {"w": a["u"], "v": a["v"]}, "not ok", False, "returns {'w': a value"),
        (lambda a: {"v": a["v"]}, "not ok", False, "output ['u']: the converted model does not"),
        (lambda a: {**a, "n": 3}, "not judged", False, "'n': 3}"),
    ],
)
def test_values_under_keys_are_compared_key_by_key(
    edit: Any, verdict: str, exact: bool, said: str
) -> None:
    frozen = fxqfix.freeze(prepared(Keyed()))
    deployed = fxqfix.to_int8(frozen, engine="fbgemm")
    output = next(n for n in deployed.graph.nodes if n.op == "output")
    output.args = (edit(output.args[0]),)
    deployed.recompile()
    report = fxqfix.compare(frozen, deployed, [X], engine="fbgemm")
    assert (report.verdict, report.exact) == (verdict, exact)
    reasons = " ".join(report.reasons).replace("the converted one {", "returns {")
    assert said in reasons
    assert bool(report.coverage.lacking) == ("does not return it" in reasons)
    assert fxqfix.Report.from_json(report.to_json()).faults == report.faults
    assert report.merge(report).coverage == report.coverage
    if not said:
        assert [row.inputs for row in outputs(report)] == [("a",), ("b",)]


def test_another_constant_that_is_returned_is_told() -> None:
    frozen = fxqfix.freeze(prepared(Keyed()))
    deployed = fxqfix.to_int8(frozen, engine="fbgemm")
    for model, value in ((frozen, 3), (deployed, 4)):
        output = next(n for n in model.graph.nodes if n.op == "output")
        output.args = ({**output.args[0], "n": value},)
        model.recompile()
    report = fxqfix.compare(frozen, deployed, [X], engine="fbgemm")
    assert report.faults == ("output ['n']: the converted model returns 4, 3 is due",)
    assert any("'n': 3}, the converted one" in why for why in report.left_out)


class Wide(nn.Module):
    """Values of two shapes, in containers in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"u": self.a(x), "more": (self.b(x), {"v": self.a(x)})}


def test_the_places_of_outputs_of_other_shapes_are_named() -> None:
    frozen = fxqfix.freeze(prepared(Wide()))
    deployed = fxqfix.to_int8(frozen, engine="fbgemm")
    output = next(n for n in deployed.graph.nodes if n.op == "output")
    found = output.args[0]
    output.args = ({**found, "more": (found["u"], {"v": found["more"][0]})},)
    deployed.recompile()
    with pytest.raises(PairingError, match="different shapes") as info:
        fxqfix.compare(frozen, deployed, [X], engine="fbgemm")
    assert "output 1, returned at ['more'][0]" in str(info.value)
    assert "compared by key, else by position: are two of them swapped?" in str(info.value)

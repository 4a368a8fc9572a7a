"""certify: what it counts, what it refuses, and that it sees what a deployment gets wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxqfix
from fxqfix import Certificate, certify
from fxqfix.errors import DataError, DialectError, RouteError, UnknownNameError
from fxqfix.passes import CutSites
from fxqfix.routes import Deployed, Route, SiteView, _registry, registry
from tests.routes import nets
from tests.states import fingerprint


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Registers a route under the name "planted"; the one planted last is found."""

    def plant(deploy: Any, **fields: Any) -> str:
        route = Route("planted", "of a test", deploy=deploy, **fields)
        monkeypatch.setattr(_registry, "ROUTES", {**_registry.ROUTES, route.name: route})
        return route.name

    return plant


def as_it_is(graph_module: fx.GraphModule, batch: Any, dynamic: bool) -> Deployed:
    """The graph itself, whose outputs are tensors or a tuple of them."""

    def run(*inputs: Any) -> tuple[Tensor, ...]:
        found = graph_module(*inputs)
        return found if isinstance(found, tuple) else (found,)

    return Deployed(run)


@pytest.mark.parametrize("name", nets.NETS)
def test_a_saved_program_keeps_every_bit(name: str) -> None:
    found = certify(nets.decomposed(name), "export", nets.batches())
    assert found.exact, str(found)
    assert found.pinned == found.narrow > 0
    assert found.batches == 3
    assert {s.name for s in found.sites} == {
        s.name for s in fxqfix.inspect(nets.decomposed(name)) if s.kind == "activation"
    }


def test_any_batch_size_keeps_every_bit() -> None:
    data = [nets.image(batch) for batch in (4, 1, 7)]
    found = certify(nets.prepared("residual"), "export", data, dynamic_batch=True)
    assert found.exact
    assert not any("several sizes" in note for note in found.notes)
    anew = certify(nets.prepared("residual"), "export", data)
    assert anew.exact
    assert "batches of several sizes: each was deployed anew" in anew.notes


@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack", "onednn", "x86"])
def test_int8_routes(engine: str) -> None:
    found = certify(nets.prepared("residual"), f"int8:{engine}", nets.batches())
    assert found.ok, str(found)
    assert found.out_of_range == 0
    assert dict(found.kernels)["quantized.conv2d_relu"] == 2
    assert found.integer_kernels >= 5
    assert json.loads(found.to_json())["route"] == f"int8:{engine}"


# ------------------------------------------------------------------------ it sees what is wrong


def _dropped(graph_module: fx.GraphModule) -> fx.GraphModule:
    """As exporters do: quantize to the dtype's whole range."""
    dropped = copy.deepcopy(graph_module)
    for node in dropped.graph.nodes:
        if "quantized_decomposed.quantize_per_tensor" in str(node.target):
            node.args = (*node.args[:3], 0, 255, *node.args[5:])
    dropped.recompile()
    return dropped


def test_a_lost_range_is_seen_and_named(planted: Callable[..., str]) -> None:
    def deploy(graph_module: fx.GraphModule, batch: Any, dynamic: bool) -> Deployed:
        return as_it_is(_dropped(graph_module), batch, dynamic)

    route = planted(deploy)
    plain = certify(nets.decomposed("residual", pinned=False), route, nets.batches())
    assert not plain.ok
    assert plain.causes == {"range-lost": plain.differing}
    assert 0 < plain.differing == sum(s.found.out_of_range for s in plain.sites)
    assert plain.pinned == 0
    pinned = certify(nets.decomposed("residual"), route, nets.batches())
    assert pinned.exact


def test_a_wrong_kernel_is_unexplained(planted: Callable[..., str]) -> None:
    def deploy(graph_module: fx.GraphModule, batch: Any, dynamic: bool) -> Deployed:
        wrong = copy.deepcopy(graph_module)
        relu = next(n for n in wrong.graph.nodes if n.name == "relu")
        with wrong.graph.inserting_after(relu):
            more = wrong.graph.call_function(torch.mul, (relu, 1.25))
        relu.replace_all_uses_with(more, delete_user_cb=lambda user: user is not more)
        wrong.recompile()
        return as_it_is(wrong, batch, dynamic)

    found = certify(nets.decomposed("residual"), planted(deploy), nets.batches())
    assert not found.ok
    assert [s.name for s in found.sites if s.found.differing] == ["relu"]
    assert found.unexplained > 0
    assert found.unexplained + found.causes.get("rounding", 0) == found.differing


def test_rounding_and_the_routes_own_integers(planted: Callable[..., str]) -> None:
    """A value nudged by float32's last bits flips ties only; a known arithmetic takes its codes."""

    def deploy(graph_module: fx.GraphModule, batch: Any, dynamic: bool) -> Deployed:
        nudged = copy.deepcopy(graph_module)
        for node in list(nudged.graph.nodes):
            if node.name.endswith("_clamp"):
                with nudged.graph.inserting_before(node):
                    moved = nudged.graph.call_function(torch.mul, (node.args[0], 1 + 2**-22))
                node.replace_input_with(node.args[0], moved)
        nudged.recompile()
        return as_it_is(nudged, batch, dynamic)

    # Half steps of the input's grid, so that many values are ties.
    model = nets.decomposed("residual")
    scale = fxqfix.inspect(model).site("x").used.scale
    data = [(torch.arange(4 * 3 * 256).reshape(4, 3, 16, 16) % 120 + 0.5) * scale]
    rounded = certify(model, planted(deploy), data)
    assert rounded.ok
    assert 0 < rounded.differing == rounded.causes["rounding"]

    def arithmetic(view: SiteView) -> Tensor | None:
        assert torch.equal(view.wanted, view.codes[view.tap.node])
        return view.found if view.tap.site.name == "x" else None

    known = certify(model, planted(deploy, arithmetic=arithmetic), data)
    assert known.causes["requantization"] == known.sites[0].found.differing > 0


def test_what_stays_float_is_judged_too(planted: Callable[..., str]) -> None:
    from torch.ao.quantization import QConfigMapping, get_default_qconfig
    from torch.ao.quantization.quantize_fx import prepare_fx

    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval()
    mapping = QConfigMapping().set_module_name("0", get_default_qconfig("fbgemm"))
    x = torch.linspace(-1, 1, 32).reshape(4, 8)
    prepared = prepare_fx(net, mapping, (x,))
    prepared(x)

    def deploy(factor: float) -> Any:
        def inner(graph_module: fx.GraphModule, batch: Any, dynamic: bool) -> Deployed:
            form = as_it_is(graph_module, batch, dynamic)
            return Deployed(lambda *a: (*form.run(*a)[:-1], form.run(*a)[-1] * factor))

        return inner

    near = certify(prepared, planted(deploy(1 + 2**-23)), [x])
    assert near.outputs[0].grid is None
    assert near.ok
    assert near.outputs[0].found.differing > 0
    assert set(near.causes) == {"rounding"}
    far = certify(prepared, planted(deploy(1.01)), [x])
    assert not far.ok
    assert far.unexplained > 0
    assert "floats differ, by at most" in str(far)


# ------------------------------------------------------------------------ what goes in


def test_an_exported_program_is_taken() -> None:
    program = torch.export.export(nets.decomposed("plain"), (nets.image(),))
    assert certify(program, "export", [nets.image(seed=1)]).exact


def test_two_inputs_come_before_what_is_given() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x) - self.b(y)

    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    x = torch.linspace(-1, 1, 32).reshape(4, 8)
    prepared = prepare_fx(Two().eval(), get_default_qconfig_mapping("fbgemm"), (x, x))
    prepared(x, x.square())
    model = fxqfix.to_decomposed(prepared)
    names = [n.name for n in CutSites()(model).graph_module.graph.nodes if n.op == "placeholder"]
    assert names[:2] == ["x", "y"]
    assert all(name.endswith("_codes") for name in names[2:])
    assert certify(model, "export", [(x, x.square())]).exact


def test_keywords_and_labels() -> None:
    name = next(iter(nets.decomposed("plain").graph.nodes)).name
    assert certify(nets.decomposed("plain"), "export", [{name: nets.image()}]).exact
    labelled = certify(nets.decomposed("plain"), "export", [(nets.image(), torch.zeros(4))])
    assert labelled.exact
    assert "labels?" in labelled.notes[0]


def test_nothing_is_perturbed() -> None:
    model, data = nets.prepared("residual"), nets.batches()
    before, copies, state = fingerprint(model), [b.clone() for b in data], torch.get_rng_state()
    read: list[int] = []

    def once() -> Iterator[Tensor]:
        for index, batch in enumerate(data):
            read.append(index)
            yield batch

    certify(model, "export", once())
    assert read == [0, 1, 2]
    assert fingerprint(model) == before
    assert all(torch.equal(a, b) for a, b in zip(data, copies, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------ bad input


def test_unknown_routes_and_bad_data() -> None:
    with pytest.raises(UnknownNameError, match="int8:qnnpack"):
        certify(nets.decomposed("plain"), "tflite", [nets.image()])
    with pytest.raises(DataError, match="certify, route export: data holds no batch"):
        certify(nets.decomposed("plain"), "export", [])
    with pytest.raises(DialectError, match="pass the prepared model"):
        certify(nets.decomposed("plain"), "int8:fbgemm", [nets.image()])
    with pytest.raises(DialectError):
        certify(nn.Linear(2, 2), "export", [torch.ones(1, 2)])


def test_a_route_that_fails_says_so(planted: Callable[..., str]) -> None:
    def fails(graph_module: fx.GraphModule, batch: Any, dynamic: bool) -> Deployed:
        raise ValueError("no kernel for frobnicate\nand a long trace")

    with pytest.raises(RouteError, match="can't lower this graph: ValueError: no kernel") as info:
        certify(nets.decomposed("plain"), planted(fails), [nets.image()])
    assert "long trace" not in str(info.value)


def test_sites_that_can_t_be_looked_at_are_said(planted: Callable[..., str]) -> None:
    def whole_only(graph_module: fx.GraphModule, batch: Any, dynamic: bool) -> Deployed:
        if len(batch) > 1:
            raise ValueError("too many inputs")
        return as_it_is(graph_module, batch, dynamic)

    found = certify(nets.decomposed("plain"), planted(whole_only), [nets.image()])
    assert found.sites == ()
    assert found.unchecked[0][0] == "all sites"
    assert "too many inputs" in str(found)


def test_without_a_look_inside_nothing_is_judged(planted: Callable[..., str]) -> None:
    """Sites explain what differs at the end; where none was seen, not even equality is exact."""

    def deploy(factor: float) -> Any:
        def inner(graph_module: fx.GraphModule, batch: Any, dynamic: bool) -> Deployed:
            if len(batch) > 1:
                raise ValueError("too many inputs")
            form = as_it_is(graph_module, batch, dynamic)
            return Deployed(lambda *a: [value * factor for value in form.run(*a)])

        return inner

    for factor in (1.0, 0.5):
        found = certify(nets.decomposed("plain"), planted(deploy(factor)), [nets.image()])
        assert found.sites == ()
        assert found.out_of_range == 0
        assert found.outputs[0].found.exact == (factor == 1.0)
        assert found.verdict == "not judged"
        assert not found.exact


def test_outputs_of_another_shape_are_refused(planted: Callable[..., str]) -> None:
    def deploy(graph_module: fx.GraphModule, batch: Any, dynamic: bool) -> Deployed:
        form = as_it_is(graph_module, batch, dynamic)
        return Deployed(lambda *a: [form.run(*a)[0][None]])

    with pytest.raises(RouteError, match="can't give what the graph gives: ValueError: it gives"):
        certify(nets.decomposed("plain"), planted(deploy), [nets.image()])


def test_json_is_for_strict_parsers() -> None:
    """An exact value has an infinite SQNR, which JSON has no number for."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = certify(nets.decomposed("plain"), "export", [nets.image()])
    read = json.loads(found.to_json(), parse_constant=refuse)
    assert read["outputs"][0]["found"]["sqnr_db"] == "inf"
    assert read["ok"] is True


def test_registry_rows() -> None:
    assert all(r.summary and (r.deploy or r.certify) for r in registry().values())
    assert isinstance(certify(nets.decomposed("plain"), "export", [nets.image()]), Certificate)


def test_cut_sites_gives_each_site_from_the_codes_before_it() -> None:
    model = nets.decomposed("mobile")
    cut = CutSites()(model).graph_module
    codes: list[Tensor] = []
    quantize = [n for n in model.graph.nodes if ".quantize_per_tensor" in str(n.target)]

    class Codes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in quantize:
                codes.append(value)
            return value

    wanted = Codes(model).run(nets.image())
    found = cut(nets.image(), *codes)
    assert all(torch.equal(a, b) for a, b in zip(codes, found[: len(codes)], strict=True))
    assert len(found) == len(codes)  # the output is the last site's
    wrong = [c.clone().fill_(0) for c in codes]
    assert not torch.equal(cut(nets.image(), *wrong)[-1], found[-1])
    assert wanted.shape[0] == 4
    with pytest.raises(DialectError, match="to_decomposed"):
        CutSites()(nets.prepared("plain"))


class Late(nn.Module):
    """Its second input is first used behind the first one's quantize op."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.matmul(x, y)


def test_inputs_may_stand_where_they_are_used() -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    x, y = torch.rand(2, 3), torch.rand(3, 4)
    prepared = prepare_fx(Late().eval(), get_default_qconfig_mapping("fbgemm"), (x, y))
    prepared(x, y)
    model = fxqfix.to_decomposed(prepared)
    late = next(n for n in model.graph.nodes if n.name == "y")
    place = next(n for n in model.graph.nodes if n.name == "x_dequantize")
    if place.next is not late:
        place.append(late)
    model.recompile()
    found = certify(model, "export", [(x, y), (3 * x, y)])
    assert found.exact
    assert len(found.sites) == 3


def test_what_draws_random_numbers_draws_the_same(planted: Callable[..., str]) -> None:
    model = copy.deepcopy(nets.decomposed("plain"))
    relu = next(n for n in model.graph.nodes if n.name == "body_0_0")
    with model.graph.inserting_after(relu):
        drop = model.graph.call_function(torch.nn.functional.dropout, (relu, 0.5, True))
    relu.replace_all_uses_with(drop, delete_user_cb=lambda user: user is not drop)
    model.recompile()
    assert certify(model, planted(as_it_is), [nets.image()]).exact

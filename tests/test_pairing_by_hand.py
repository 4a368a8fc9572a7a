"""Pairing of readings made by hand: one rule at a time, in milliseconds."""

from __future__ import annotations

import itertools
import operator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxqfix.dialects import Reading, Tap
from fxqfix.dialects.site import Site
from fxqfix.dialects.weights import WeightView
from fxqfix.errors import PairingError
from fxqfix.pairing import Pairing, _is_lowered, _takes_number, pair
from fxqfix.qparams import QParams

GRID = QParams(0.5, 0, 0, 255, torch.quint8)
KERNEL = QParams(0.5, 0, -128, 127, torch.qint8)


class Model:
    """A graph with a site per node, as a reader gives it."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.taps: list[Tap] = []
        self.nodes: dict[str, fx.Node] = {}

    def add(self, name: str, op: str, *inputs: Any, target: Any = torch.relu, **more: Any) -> Tap:
        """An activation; inputs are names, or numbers."""
        if op == "input":
            node = self.graph.placeholder(name)
        else:
            args = tuple(self.nodes[i] if isinstance(i, str) else i for i in inputs)
            node = self.graph.call_function(target, args)
            node.name = name
        self.nodes[name] = node
        quantizer = node
        if more.pop("observed", False):
            quantizer = self.nodes[name] = self.graph.call_function(torch.clone, (node,))
        used = more.pop("used", GRID)
        source = more.pop("source", "")
        site = Site(name, "activation", "", op, used, source=source)
        self.taps.append(Tap(site, quantizer, node, **more))
        return self.taps[-1]

    def weight(
        self,
        name: str,
        at: str,
        values: list[float] | None = None,
        *,
        shape: tuple[int, ...] | None = None,
        op: str = "linear",
        garbled: bool = False,
        **more: Any,
    ) -> Tap:
        view = None
        if values is not None:
            view = WeightView(torch.tensor(values).to(torch.int8), KERNEL, garbled=garbled)
        site = Site(name, "weight", "", op, KERNEL, shape=shape)
        read = None if view is None else lambda: view
        node = self.nodes[at]
        self.taps.append(Tap(site, node, node, weight=read, **more))
        return self.taps[-1]

    @property
    def reading(self) -> Reading:
        if not any(node.op == "output" for node in self.graph.nodes):
            self.graph.output(None)
        return Reading(fx.GraphModule(nn.Module(), self.graph), "by hand", tuple(self.taps))


def found(mine: Model, theirs: Model) -> dict[str, tuple[str, str]]:
    return named(pair(mine.reading, theirs.reading))


def named(pairing: Pairing) -> dict[str, tuple[str, str]]:
    return {p.prepared.site.name: (p.converted.site.name, p.how) for p in pairing.pairs}


def chain(*names: str, **more: Any) -> Model:
    """An input and linears in a row."""
    made = Model()
    made.add(names[0], "input")
    for before, name in itertools.pairwise(names):
        made.add(name, "linear", before, **more)
    return made


def test_what_the_conversion_recorded_comes_before_names() -> None:
    mine, theirs = chain("x", "a", "b"), chain("x", "b", "a")
    mine.taps[1] = replace(mine.taps[1], origins=frozenset({"observer_1"}))
    theirs.taps[1] = replace(theirs.taps[1], origins=frozenset({"observer_1", "other"}))
    assert found(mine, theirs) == {
        "x": ("x", "name"),
        "a": ("b", "origin"),
        "b": ("a", "dataflow"),  # its name is taken
    }


def test_of_two_made_from_one_the_first_is_the_partner() -> None:
    mine, theirs = chain("x", "a"), chain("x", "p", "q")
    mine.taps[1] = replace(mine.taps[1], origins=frozenset({"o"}))
    for i in (1, 2):
        theirs.taps[i] = replace(theirs.taps[i], origins=frozenset({"o"}))
    assert found(mine, theirs)["a"] == ("p", "origin")


def test_weights_by_their_origin_by_name_and_by_what_they_feed() -> None:
    mine, theirs = chain("x", "a", "b", "c"), chain("x", "a", "b", "c")
    for name in "abc":
        mine.weight(f"{name}.weight", name)
    mine.taps[4] = replace(mine.taps[4], origins=frozenset({"o"}))
    theirs.weight("b.weight", "a", origins=frozenset({"o"}))
    theirs.weight("c.weight", "c")
    theirs.weight("other.weight", "b")
    assert found(mine, theirs) == {
        **{name: (name, "name") for name in "xabc"},
        "a.weight": ("b.weight", "origin"),
        "b.weight": ("other.weight", "dataflow"),
        "c.weight": ("c.weight", "name"),
    }


def test_weights_that_feed_one_site_are_told_by_their_shapes() -> None:
    mine, theirs = chain("x", "a"), chain("x", "a")
    for model, names in ((mine, "pqr"), (theirs, "stu")):
        shapes = [(4, 8), (8, 2), (4, 8)]
        if model is theirs:
            shapes = [(8, 2), (4, 8), (4, 8)]
        for name, shape in zip(names, shapes, strict=True):
            model.weight(name, "a", shape=shape)
    pairs = found(mine, theirs)
    assert {name: pairs[name] for name in "pqr"} == {
        "p": ("t", "dataflow"),
        "q": ("s", "dataflow"),
        "r": ("u", "dataflow"),
    }


def test_a_weight_that_feeds_the_very_same_sites_comes_first() -> None:
    """One feeds a and b, one feeds b alone; both feed b."""
    mine, theirs = Model(), Model()
    for model in (mine, theirs):
        model.add("x", "input")
        model.nodes["w"] = model.graph.call_function(torch.neg, (model.nodes["x"],))
        model.add("a", "linear", "w")
        model.add("b", "linear", "w")
    mine.weight("one", "b", shape=(2, 2))
    theirs.weight("both", "w", shape=(2, 2))
    theirs.weight("single", "b", shape=(2, 2))
    assert found(mine, theirs)["one"] == ("single", "dataflow")


def test_a_weight_of_another_op_is_no_partner() -> None:
    mine, theirs = chain("x", "a"), chain("x", "a")
    mine.weight("p", "a", op="linear")
    theirs.weight("q", "a", op="conv2d")
    assert "p" not in found(mine, theirs)
    theirs.taps[-1] = replace(theirs.taps[-1], site=replace(theirs.taps[-1].site, op="linear_relu"))
    assert found(mine, theirs)["p"] == ("q", "dataflow")


def test_a_name_alone_is_not_enough() -> None:
    """An op of another kind; an input stands for any."""
    mine, theirs = chain("x", "a"), chain("x")
    theirs.add("a", "conv2d", "x")
    assert set(found(mine, theirs)) == {"x"}
    theirs.taps[-1] = replace(theirs.taps[-1], site=replace(theirs.taps[-1].site, op="input"))
    assert found(mine, theirs)["a"] == ("a", "name")


def test_lowered_kernels_have_new_names() -> None:
    """A kernel called as another prepared op is: its name is asked behind the dataflow."""
    mine, theirs = Model(), Model()
    for model in (mine, theirs):
        model.add("x", "input")
    mine.add("add", "add", "x", 1, target=operator.add)
    mine.add("add_1", "add", "add", "x", target=operator.add)
    theirs.add("add_1", "add", "x", 1, target=torch.ops.quantized.add)
    theirs.add("add", "add", "add_1", "x", 0.5, 3, target=torch.ops.quantized.add)
    assert found(mine, theirs) == {
        "x": ("x", "name"),
        "add": ("add_1", "dataflow"),
        "add_1": ("add", "dataflow"),
    }


@pytest.mark.parametrize(
    ("target", "args", "number"),
    [
        (operator.add, ("x", 1), True),
        (operator.add, (1, "x"), True),
        (operator.mul, ("x", 0.5), True),
        (operator.sub, ("x", 2), True),
        (operator.iadd, ("x", 2), True),
        (torch.add, ("x", 2), True),
        (torch.ops.aten.add.Tensor, ("x", 2), True),
        (torch.ops.quantized.add_scalar, ("x", 2), True),
        (torch.ops.quantized.add_scalar_relu, ("x", 2), True),
        (operator.add, ("x", "y"), False),
        (torch.ops.quantized.add, ("x", "y", 0.5, 3), False),  # scale and zero point
        (operator.add, ("x", "x"), False),
        (operator.add, (1, 2), False),
        (operator.truediv, ("x", 2), False),
        (torch.flatten, ("x", 1), False),
    ],
)
def test_which_ops_take_a_number(target: Any, args: tuple[Any, ...], number: bool) -> None:
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in "xy"}
    node = graph.call_function(target, tuple(nodes.get(a, a) for a in args))
    assert _takes_number(node) == number


def test_a_module_named_add_takes_no_number() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert not _takes_number(graph.call_module("add", (x, 1)))
    assert _takes_number(graph.call_method("add_", (x, 1)))


def test_which_kernels_are_lowered() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    quantized = torch.ops.quantized
    for target in (quantized.add, quantized.mul, quantized.matmul, quantized.add_relu):
        assert _is_lowered(graph.call_function(target, (x, x)))
    assert not _is_lowered(graph.call_function(quantized.cat, ([x, x], 0.5, 3)))
    assert not _is_lowered(graph.call_function(operator.add, (x, x)))
    assert not _is_lowered(graph.call_module("quantized.add", (x, x)))


def test_a_number_tells_two_that_are_fed_alike() -> None:
    mine, theirs = Model(), Model()
    for model, names in ((mine, "pq"), (theirs, "st")):
        model.add("x", "input")
        model.add(names[0], "add", "x", 1, target=operator.add)
        model.add(names[1], "add", "x", "x", target=operator.add)
    assert found(mine, theirs) == {
        "x": ("x", "name"),
        "p": ("s", "dataflow"),
        "q": ("t", "dataflow"),
    }


@pytest.mark.parametrize("fused", ["one", "two"])
def test_a_number_in_front_of_a_relu_tells_two_that_are_fed_alike(fused: str) -> None:
    """The prepared graph has the relu apart, the int8 kernel inside."""
    mine, theirs = Model(), Model()
    for model in (mine, theirs):
        model.add("x", "input")
    for name, other in (("p", 1), ("q", "x")):
        inner = mine.graph.call_function(
            operator.add, (mine.nodes["x"], 1 if other == 1 else mine.nodes["x"])
        )
        mine.nodes["inner"] = inner
        mine.add(name, "add_relu", "inner")
    both = [("s", (1,)), ("t", ("x", 0.5, 3))]
    for name, rest in both if fused == "one" else reversed(both):
        theirs.add(
            name, "add_relu", "x", *rest, target=torch.ops.quantized.add_relu, inherited=name == "s"
        )
    pairs = found(mine, theirs)
    assert (pairs["p"], pairs["q"]) == (("s", "dataflow"), ("t", "dataflow"))


def test_two_that_are_fed_alike_are_not_guessed() -> None:
    mine, theirs = chain("x", "p"), chain("x", "s")
    mine.add("q", "linear", "x")
    theirs.add("t", "linear", "x")
    assert found(mine, theirs) == {"x": ("x", "name")}
    left = pair(mine.reading, theirs.reading).unpaired
    reason = "its name or its inputs"
    assert [(tap.site.name, side) for tap, side, why in left if reason in why] == [
        ("p", "prepared"),
        ("q", "prepared"),
        ("s", "converted"),
        ("t", "converted"),
    ]


def test_an_inherited_value_is_a_site_where_its_op_is_the_same() -> None:
    """The converted value keeps its input's grid: it has a row only if training observed it."""
    mine, theirs = chain("x", "a"), chain("x")
    theirs.add("b", "linear", "x", inherited=True)
    assert found(mine, theirs)["a"] == ("b", "dataflow")
    theirs.taps[-1] = replace(theirs.taps[-1], site=replace(theirs.taps[-1].site, op="linear_relu"))
    assert found(mine, theirs)["a"] == ("b", "dataflow")
    theirs.taps[-1] = replace(theirs.taps[-1], site=replace(theirs.taps[-1].site, op="input"))
    assert "a" not in found(mine, theirs)
    # It is left out without a word.
    assert [side for _, side, _ in pair(mine.reading, theirs.reading).unpaired] == ["prepared"]


def test_what_is_behind_an_inherited_value_is_found() -> None:
    """Of those that keep their grids the nearest one is taken, and then what reads it."""
    mine, theirs = chain("x"), chain("x")
    for name, op, before in (("a", "cat", "x"), ("b", "linear", "a"), ("c", "mean", "b")):
        mine.add(name, op, before)
    theirs.add("s", "cat", "x", inherited=True)
    theirs.add("t", "linear", "s")
    theirs.add("u", "mean", "t", inherited=True)
    assert found(mine, theirs) == {
        "x": ("x", "name"),
        "a": ("s", "dataflow"),
        "b": ("t", "dataflow"),
        "c": ("u", "dataflow"),
    }


def test_a_value_that_keeps_its_grid_and_has_the_name() -> None:
    mine, theirs = chain("x", "a", "b"), chain("x")
    theirs.add("a", "linear", "x", inherited=True)
    theirs.add("t", "linear", "a")
    assert found(mine, theirs)["b"] == ("t", "dataflow")


def test_a_site_without_a_partner_stands_between() -> None:
    """What is behind a quantize that only the converted model has reads other codes."""
    mine, theirs = chain("x", "a"), chain("x")
    theirs.add("extra", "conv2d", "x")
    theirs.add("t", "linear", "extra")
    assert found(mine, theirs) == {"x": ("x", "name")}


def test_reasons_of_what_has_no_partner() -> None:
    mine, theirs = chain("x", "gone"), chain("x")
    mine.add("ids", "input", used=None, source="placeholder for torch.float32")
    mine.add("dynamic", "linear", "x", used=None, source="chosen at run time")
    mine.add("kept", "linear", "x")
    node = theirs.graph.call_function(torch.relu, (theirs.nodes["x"],))
    node.name = "kept"
    left = {
        (tap.site.name, side): why for tap, side, why in pair(mine.reading, theirs.reading).unpaired
    }
    assert left == {
        ("gone", "prepared"): "no site of the converted model has its name or its inputs",
        ("dynamic", "prepared"): "not quantized to integers: chosen at run time",
        ("kept", "prepared"): "node 'kept' of the converted model is not quantized",
    }


def refused(mine: Model, theirs: Model, match: str) -> None:
    with pytest.raises(PairingError, match=match):
        pair(mine.reading, theirs.reading)


def test_models_without_a_site_in_common() -> None:
    mine, theirs = Model(), Model()
    mine.add("a", "linear")
    theirs.add("y", "conv2d")
    refused(mine, theirs, "next to no site in common")
    # A weight alone is none of static activations, and all there is of dynamic ones.
    mine.weight("w", "a")
    theirs.weight("w", "y")
    refused(mine, theirs, "next to no site in common")
    dynamic = Model()
    dynamic.add("x", "relu", used=None, source="dynamic")
    dynamic.weight("w", "x")
    assert found(dynamic, theirs) == {"w": ("w", "name")}
    theirs.taps.pop()
    refused(dynamic, theirs, "next to no site in common")
    # Where nothing is known to be quantized, nothing has to be found.
    plain = Model()
    plain.add("x", "relu", used=None, source="dynamic")
    assert found(plain, theirs) == {}


def test_inputs_alone_make_no_pair_of_models() -> None:
    mine, theirs = chain("x", "a"), chain("x", "b")
    mine.weight("a.weight", "a", shape=(4, 8), op="conv2d")
    theirs.weight("b.weight", "b", shape=(4, 8), op="linear")
    pairs = found(mine, theirs)
    assert pairs["x"] == ("x", "name")  # the same shapes: it may be one model all the same
    theirs.taps[-1] = replace(theirs.taps[-1], site=replace(theirs.taps[-1].site, shape=(2, 8)))
    refused(mine, theirs, "next to no site in common")
    # One side without weights: nothing says that they are strangers.
    theirs.taps.pop()
    assert found(mine, theirs)["x"] == ("x", "name")


def test_partners_of_other_shapes() -> None:
    mine, theirs = chain("x", "a"), chain("x", "a")
    mine.weight("w", "a", shape=(4, 8))
    theirs.weight("w", "a", shape=(4, 4))
    refused(mine, theirs, "weight shapes differ")
    theirs.taps[-1] = replace(theirs.taps[-1], site=replace(theirs.taps[-1].site, shape=None))
    assert found(mine, theirs)["w"] == ("w", "name")


@pytest.mark.parametrize(
    ("first", "second", "related"),
    [
        ([4, 0], [4, 0], True),
        ([4, 0], [2, 2], True),  # 45 degrees
        ([2, 0], [2, 4], False),  # 63 degrees
        ([4, 0], [0, 4], False),
        ([4, 0], [-4, 0], False),
        ([4, 0], [0, 0], True),  # nothing to compare
        ([0, 0], [4, 0], True),
        ([4, 0], [4, 0, 4], True),  # another layout
        ([4, 0], None, True),
        (None, [4, 0], True),
        ([2, 0, 0, 0], [1, 1, 1, 1], False),  # a cosine of 1/2
    ],
)
def test_weights_of_another_training(first: Any, second: Any, related: bool) -> None:
    mine, theirs = chain("x", "a"), chain("x", "a")
    mine.weight("w", "a", first)
    theirs.weight("w", "a", second)
    if related:
        assert found(mine, theirs)["w"] == ("w", "name")
    else:
        refused(mine, theirs, "it has other weights")


def test_one_weight_that_is_related_is_enough() -> None:
    mine, theirs = chain("x", "a", "b"), chain("x", "a", "b")
    for name, values in (("a", [4, 0]), ("b", [0, 4])):
        mine.weight(f"{name}.weight", name, [4, 0])
        theirs.weight(f"{name}.weight", name, values)
    assert len(found(mine, theirs)) == 5


@pytest.mark.parametrize("side", [0, 1])
def test_a_weight_that_can_t_be_unpacked_says_nothing(side: int) -> None:
    mine, theirs = chain("x", "a"), chain("x", "a")
    mine.weight("w", "a", [4, 0], garbled=side == 0)
    theirs.weight("w", "a", [0, 4], garbled=side == 1)
    assert found(mine, theirs)["w"] == ("w", "name")


def test_reads_behind_an_in_place_op() -> None:
    """By dataflow the reader takes the value from before the write, or what was written."""

    def made(names: str, read: int) -> Model:
        model = Model()
        first, write, end = names
        model.add(first, "input")
        model.nodes["inner"] = model.graph.call_function(torch.neg, (model.nodes[first],))
        model.add(write, "relu", "inner", target=torch.relu_, observed=True)
        model.add(end, "linear", ("inner", write)[read], observed=True)
        return model

    mine = made("xyz", 0)
    for read in (0, 1):
        theirs = made("abc", read)
        theirs.nodes["a"].name = "x"
        theirs.taps[0] = replace(theirs.taps[0], site=replace(theirs.taps[0].site, name="x"))
        pairs = found(mine, theirs)
        assert (pairs["y"], pairs["z"]) == (("b", "dataflow"), ("c", "dataflow"))


def test_pairs_stand_in_the_order_of_the_prepared_graph() -> None:
    mine, theirs = chain("x", "a", "b"), chain("x", "a", "b")
    weight = mine.weight("b.weight", "b")
    mine.taps = [mine.taps[0], mine.taps[1], weight, mine.taps[2]]
    theirs.weight("b.weight", "b")
    assert list(found(mine, theirs)) == ["x", "a", "b.weight", "b"]

"""Which prepared site belongs to which converted one, also where names were lost."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import fxqfix
from fxqfix import compare, freeze
from fxqfix.dialects import read
from fxqfix.errors import DialectError, PairingError
from fxqfix.pairing import Pairing, pair
from tests.dialects.nets import (
    EAGER,
    Plain,
    decomposed,
    fx_ptq,
    fx_qat,
    image,
    int8,
    reference,
    torchs_decomposed,
)
from tests.states import fingerprint


def paired(prepared: nn.Module, converted: nn.Module) -> Pairing:
    return pair(read(prepared), read(converted))


def names(pairing: Pairing) -> dict[str, tuple[str, str]]:
    """Prepared name -> (converted name, how)."""
    return {p.prepared.site.name: (p.converted.site.name, p.how) for p in pairing.pairs}


def left(pairing: Pairing) -> dict[tuple[str, str], str]:
    """(name, side) -> reason."""
    return {(tap.site.name, side): reason for tap, side, reason in pairing.unpaired}


CONVERSIONS: dict[str, Callable[[fx.GraphModule], nn.Module]] = {
    "int8": int8,
    "reference": reference,
    "decomposed": decomposed,
    "torch's decomposed": torchs_decomposed,
    "frozen": freeze,
    "itself": lambda model: model,
}


@pytest.mark.parametrize("make", [fx_qat, fx_ptq])
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_every_site_has_its_partner(
    conversion: str, make: Callable[[nn.Module], fx.GraphModule]
) -> None:
    """All by name, but add + relu, which lowering renames: by dataflow."""
    prepared = make(Plain())
    found = paired(prepared, CONVERSIONS[conversion](prepared))
    assert found.unpaired == ()
    expected = {s.name: (s.name, "name") for s in read(prepared).inspection}
    if conversion == "int8":
        expected["relu_1"] = ("add_relu", "dataflow")
    assert names(found) == expected
    order = [p.prepared.site.name for p in found.pairs]
    assert order == [s.name for s in read(prepared).inspection]


@pytest.mark.parametrize("name", EAGER)
def test_eager(name: str) -> None:
    prepared = EAGER[name]()
    for converted in (int8(prepared), decomposed(prepared)):
        found = paired(prepared, converted)
        assert not [side for _, side in left(found) if side == "prepared"]
        entry = names(found)["quant"]
        assert entry in (("quant", "name"), ("x", "dataflow"), ("input_1", "dataflow"))


def test_values_that_keep_their_inputs_qparams() -> None:
    """cat and mean have no quantize of their own in an int8 graph; they are paired all the same."""
    prepared = fx_qat(Plain())
    found = paired(prepared, int8(prepared))
    inherited = [p.converted.site.name for p in found.pairs if p.converted.inherited]
    assert inherited == ["cat", "mean"]


# --- renamed and edited graphs -------------------------------------------------------------------


def renamed(model: fx.GraphModule, prefix: str) -> fx.GraphModule:
    """Every node has another name, as after another export."""
    for i, node in enumerate(model.graph.nodes):
        node.name = f"{prefix}{i}"
    model.recompile()
    return model


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_all_names_lost(conversion: str) -> None:
    """Dataflow alone finds each partner, weights included; sites fed alike are told by their op."""
    prepared = fx_qat(Plain())
    converted = CONVERSIONS[conversion](prepared)
    wanted = [(p.prepared.site, p.converted.node) for p in paired(prepared, converted).pairs]
    own = copy.deepcopy(converted)
    nodes = {n.name: f"q{i}" for i, n in enumerate(own.graph.nodes)}
    again = paired(prepared, renamed(own, "q"))
    found = {p.prepared.site.name: p.converted.node.name for p in again.pairs}
    assert found == {s.name: nodes[n.name] for s, n in wanted}
    assert again.unpaired == ()
    assert {how for _, how in names(again).values()} == {"dataflow"}


def test_one_renamed_node() -> None:
    prepared = fx_qat(Plain())
    converted = int8(prepared)
    node = next(n for n in converted.graph.nodes if n.name == "act")
    node.name = "my_activation"
    converted.recompile()
    assert names(paired(prepared, converted))["act"] == ("my_activation", "dataflow")


def test_extra_node_between_two_sites() -> None:
    """A copy in the converted graph: its value has no partner and takes none away."""
    prepared = fx_qat(Plain())
    converted = int8(prepared)
    node = next(n for n in converted.graph.nodes if n.name == "act")
    with converted.graph.inserting_after(node):
        new = converted.graph.call_method("clone", (node,))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    converted.recompile()
    found = paired(prepared, converted)
    assert found.unpaired == ()  # it keeps its input's qparams: no site of its own
    assert names(found)["act"] == ("act", "name")
    assert names(found)["relu_1"] == ("add_relu", "dataflow")
    report = compare(prepared, converted, [image()], noise_floor=False)
    sites = {r.name for r in report.rows if r.kind != "output"}
    assert sites == {s.name for s in read(prepared).inspection}


def test_extra_quantize() -> None:
    """A quantize that only the converted model has is listed on its side."""
    prepared = fx_qat(Plain())
    converted = reference(prepared)
    graph = converted.graph
    node = next(n for n in graph.nodes if n.name == "sigmoid")
    with graph.inserting_before(node):
        codes = graph.call_function(
            torch.quantize_per_tensor, (node.args[0], 0.01, 3, torch.quint8)
        )
        value = graph.call_method("dequantize", (codes,))
        twice = graph.call_function(torch.neg, (value,))
        codes = graph.call_function(torch.quantize_per_tensor, (twice, 0.01, 3, torch.quint8))
        value = graph.call_method("dequantize", (codes,))
    node.args = (value,)
    converted.recompile()
    found = left(paired(prepared, converted))
    assert ("neg", "converted") in found
    assert all(side == "converted" for _, side in found)
    assert found["neg", "converted"] == "no site of the prepared model has its name or its inputs"


def test_removed_quantize() -> None:
    """The prepared site is listed with the reason that its node is not quantized any more."""
    prepared = fx_qat(Plain())
    converted = reference(prepared)
    graph = converted.graph
    act = next(n for n in graph.nodes if n.name == "act")
    (codes,) = act.users
    (value,) = codes.users
    value.replace_all_uses_with(act)
    graph.erase_node(value)
    graph.erase_node(codes)
    converted.recompile()
    found = left(paired(prepared, converted))
    assert found == {
        ("act", "prepared"): "node 'act' of the converted model is not quantized",
    }
    report = compare(prepared, converted, [image()])
    (entry,) = report.coverage.unpaired
    assert (entry.name, entry.side) == ("act", "prepared")
    assert "not quantized" in str(report)
    assert not report.exact


def test_removed_op() -> None:
    """A prepared site whose node is gone altogether."""
    prepared = fx_qat(Plain())
    converted = decomposed(prepared)
    graph = converted.graph
    act = next(n for n in graph.nodes if n.name == "act")
    act.replace_all_uses_with(act.args[0])
    graph.erase_node(act)
    converted.recompile()
    found = paired(prepared, converted)
    assert names(found)["twice_1"][0] == "twice_1"
    assert left(found)["act", "prepared"] == (
        "no site of the converted model has its name or its inputs"
    )


class Twins(nn.Module):
    """Two convs on one input: by dataflow alone they can't be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], 1)


def test_ambiguous_sites_are_not_guessed() -> None:
    prepared = fx_qat(Twins())
    converted = renamed(reference(prepared), "n")
    found = paired(prepared, converted)
    assert set(names(found)) == {"x"}
    assert {n for n, side in left(found) if side == "prepared"} == {
        "a",
        "a.weight",
        "b",
        "b.weight",
        "cat",
    }
    # One name is enough: the other is then the only one left.
    again = reference(prepared)
    node = next(n for n in again.graph.nodes if n.name == "b")
    node.name = "other"
    again.recompile()
    assert names(paired(prepared, again)) == {
        "x": ("x", "name"),
        "a.weight": ("a.weight", "name"),
        "a": ("a", "name"),
        "b.weight": ("other.weight", "dataflow"),
        "b": ("other", "dataflow"),
        "cat": ("cat", "name"),
    }


# --- models that don't belong together -----------------------------------------------------------


class Other(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, channels, 3, padding=1), nn.Linear(channels, 2)

    def forward(self, y: Tensor) -> Tensor:
        return self.fc(self.conv(y).mean([2, 3]))


def test_weights_of_other_shapes() -> None:
    with pytest.raises(PairingError, match="weight shapes differ") as info:
        compare(fx_qat(Plain()), int8(fx_qat(Other(4))), [image()])
    text = str(info.value)
    assert "site 'conv.weight'" in text
    assert "converted (4, 3, 3, 3)" in text
    assert "prepared (8, 3, 3, 3)" in text
    assert "To do: pass the prepared model and what was converted from it" in text


@pytest.mark.parametrize("conversion", ["int8", "reference", "decomposed"])
def test_same_architecture_with_other_weights(conversion: str) -> None:
    first, second = fx_qat(Plain()), fx_qat(Plain())
    with pytest.raises(PairingError, match="it has other weights"):
        compare(first, CONVERSIONS[conversion](second), [image()])


def test_later_checkpoint_of_the_same_model_is_compared() -> None:
    """Weights that moved a little are a discrepancy to report, not another model."""
    prepared = fx_qat(Plain())
    converted = decomposed(prepared)
    with torch.no_grad():
        for p in prepared.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    report = compare(prepared, converted, [image()])
    assert not report.exact
    assert report.row("conv.weight").local.differing > 0


def test_nothing_in_common() -> None:
    with pytest.raises(PairingError, match=r"no site in common|other weights|shapes differ"):
        compare(fx_qat(nn.Sequential(nn.Conv2d(3, 2, 1))), int8(fx_qat(Twins())), [image()])


@pytest.mark.parametrize("conversion", ["int8", "reference", "decomposed"])
def test_swapped(conversion: str) -> None:
    prepared = fx_qat(Plain())
    converted = CONVERSIONS[conversion](prepared)
    before = fingerprint(prepared), fingerprint(converted)
    with pytest.raises(PairingError, match="are the arguments swapped") as info:
        compare(converted, prepared, [image()])
    assert isinstance(info.value, ValueError)
    assert "compare(prepared, converted, data)" in str(info.value)
    assert (fingerprint(prepared), fingerprint(converted)) == before


def test_float_model_in_either_place() -> None:
    prepared = fx_qat(Plain())
    for arguments in ((Plain(), int8(prepared)), (prepared, Plain())):
        with pytest.raises(DialectError, match="Plain holds no observer"):
            compare(*arguments, [image()])


class Scalars(nn.Module):
    """An operator on a number, and the same one behind it: conversion gives both new names."""

    def __init__(self, twice: str) -> None:
        super().__init__()
        self.conv, self.twice = nn.Conv2d(3, 4, 1), twice
        self.gain = nn.Parameter(torch.rand(1, 4, 1, 1) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        if self.twice == "add":
            return (y + 1) + y
        if self.twice in ("relu", "gain relu"):  # fused with the operator on a number
            return torch.relu(y + 1) + y if self.twice == "relu" else torch.relu(y * 2) * self.gain
        return (y * 2) * self.gain if self.twice == "gain" else y * 2 + y * y


@pytest.mark.parametrize("twice", ["add", "gain", "both", "relu", "gain relu"])
def test_operators_on_numbers(twice: str) -> None:
    prepared = fx_qat(Scalars(twice))
    found = paired(prepared, int8(prepared))
    assert found.unpaired == ()
    frozen = fxqfix.freeze(prepared)
    deployed = fxqfix.to_int8(prepared, engine="fbgemm")
    assert fxqfix.certificate_of(deployed).ok
    assert compare(frozen, deployed, [image()], engine="fbgemm").exact

"""Which ops a region has, and how: read off small graphs, one rule at a time."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.ao.nn import intrinsic

from fxqfix.engines import Call
from fxqfix.evidence.structure import Op, computing, counted, otherwise
from fxqfix.inserted import round_to_grid


def region(*calls: tuple[Any, ...], root: nn.Module | None = None) -> fx.GraphModule:
    """A graph of calls in a row: (target, further arguments ...)."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    for target, *rest in calls:
        make = graph.call_module if isinstance(target, str) else graph.call_function
        value = make(target, (value, *rest))
    graph.output(value)
    return fx.GraphModule(root or nn.Module(), graph)


def ops_of(*calls: tuple[Any, ...], root: nn.Module | None = None) -> tuple[Op, ...]:
    model = region(*calls, root=root)
    return computing(model.graph, model)


@pytest.mark.parametrize(
    ("calls", "wanted"),
    [
        ([(torch.relu,), (torch.relu,)], {"relu": 1}),
        ([(torch.sin,), (torch.sin,)], {"sin": 2}),
        ([(operator.add, 1), (torch.add, 2)], {"add": 2}),
        ([(F.relu6,), (F.hardtanh,), (torch.clamp, 0, 6)], {"clamp": 3}),
        ([(torch.flatten, 1), (round_to_grid, 0.5, 0, 0, 255), (operator.getitem, 0)], {}),
        ([(torch.sub, 1), (F.avg_pool2d, 2)], {"sub": 1, "avg_pool2d": 1}),
    ],
)
def test_ops_are_counted_by_what_they_compute(
    calls: list[tuple[Any, ...]], wanted: dict[str, int]
) -> None:
    assert counted(ops_of(*calls)) == Counter(wanted)


def test_a_fused_module_is_its_layer_and_a_relu() -> None:
    root = nn.Module()
    root.fused = intrinsic.ConvReLU2d(nn.Conv2d(2, 2, 3, padding=1, stride=2), nn.ReLU())
    (op,) = ops_of(("fused",), root=root)
    assert counted((op,)) == Counter(conv2d=1, relu=1)
    assert (op.options["padding"], op.options["stride"]) == ((1, 1), (2, 2))


def test_an_emulated_node_is_the_call_that_it_came_from() -> None:
    model = region((torch.relu,), (torch.relu,))
    first, second = (n for n in model.graph.nodes if n.op == "call_function")
    first.name, second.name = "emulated_pool", "plain"
    (x,) = model.graph.find_nodes(op="placeholder")
    x.name = "emulated_before"
    known = {
        "pool": Call("pool", "fbgemm", "avg_pool2d", arguments={"kernel_size": 3}),
        "before": Call("before", "fbgemm", "sigmoid"),
        "plain": Call("plain", "fbgemm", "tanh"),
    }
    found = computing(model.graph, model, known)
    assert counted(found) == Counter(avg_pool2d=1, relu=1)  # where a region begins is another site


def sentences(mine: list[tuple[Any, ...]], theirs: list[tuple[Any, ...]]) -> list[str]:
    return list(otherwise(ops_of(*mine), ops_of(*theirs)))


@pytest.mark.parametrize(
    ("mine", "theirs", "said"),
    [
        ([(F.leaky_relu, 0.1)], [(F.leaky_relu, 0.1)], []),
        (
            [(F.leaky_relu, 0.1)],
            [(F.leaky_relu, 0.2)],
            ["leaky_relu has negative_slope 0.2, 0.1 is due"],
        ),
        ([(F.leaky_relu,)], [(F.leaky_relu, 0.2)], ["leaky_relu has negative_slope 0.2, its defa"]),
        ([(F.leaky_relu, 0.1, True)], [(F.leaky_relu, 0.1, False)], []),  # in place or not
        ([(operator.add, 0.5)], [(torch.add, 0.5)], []),
        ([(operator.add, 0.5)], [(torch.add, 0.25)], ["add has number (0.25,), (0.5,) is due"]),
        ([(torch.mul, 2)], [(torch.mul, 2.0)], []),
        ([(F.elu, 0.5)], [(F.leaky_relu, 0.2)], []),  # another op: `counted` says so
        ([(F.elu, 0.5)], [(F.elu, 0.6), (F.elu, 0.5)], []),  # nobody knows which is which
        ([(F.elu, 0.5), (F.elu, 0.6)], [(F.elu, 0.5), (F.elu, 0.7)], ["elu has alpha 0.7, 0.6 "]),
        ([(F.relu6,)], [(torch.clamp, 0, 6)], []),  # spelled otherwise: what both name counts
    ],
)
def test_options_that_differ(
    mine: list[tuple[Any, ...]], theirs: list[tuple[Any, ...]], said: list[str]
) -> None:
    found = sentences(mine, theirs)
    assert len(found) == len(said)
    assert all(text.startswith(start) for text, start in zip(found, said, strict=True))


def test_padding_by_name_is_no_other_padding() -> None:
    roots = []
    for padding in ("same", 1):
        root = nn.Module()
        root.conv = nn.Conv2d(2, 2, 3, padding=padding)
        roots.append(root)
    mine, theirs = (ops_of(("conv",), root=root) for root in roots)
    assert "padding" not in mine[0].options
    assert mine[0].options["kernel_size"] == (3, 3)
    assert [s for s in otherwise(mine, theirs) if "kernel" in s] == []

"""Another op in the converted model is no arithmetic of its kernels, however little it moves."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao import quantization as tq
from torch.ao.quantization import disable_observer, get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

import fxqfix
from fxqfix._torch import quantized_engine, quiet

BATCH = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A sum and an average, whose kernels round in their own way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.first(x))
        return torch.sigmoid(F.avg_pool2d(a + self.second(a), 2))


def models() -> tuple[fx.GraphModule, fx.GraphModule]:
    torch.manual_seed(0)
    with quantized_engine("fbgemm"), quiet():
        model = prepare_qat_fx(Net().train(), get_default_qat_qconfig_mapping("fbgemm"), (BATCH,))
        model(BATCH)
        model.eval().apply(disable_observer)
        return model, fxqfix.to_int8(model, averages="kernel")


def insert(function: Callable[..., Tensor], *values: float) -> Callable[[fx.Graph], None]:
    def edit(graph: fx.Graph) -> None:
        (x,) = graph.find_nodes(op="placeholder")
        (user,) = x.users
        with graph.inserting_after(x):
            user.replace_input_with(x, graph.call_function(function, (x, *values)))

    return edit


def hold(graph: fx.Graph) -> None:
    node = next(n for n in graph.nodes if n.name == "first_hold")
    node.args = (node.args[0], 1, 126)


def scale_term(graph: fx.Graph) -> None:
    (node,) = graph.find_nodes(op="call_function", target=torch.ops.quantized.add)
    with graph.inserting_before(node):
        scaled = graph.call_function(torch.ops.quantized.mul, (node.args[0], 1.02))
    node.args = (scaled, *node.args[1:])


def pool(graph: fx.Graph) -> None:
    node = next(n for n in graph.nodes if n.name.startswith("avg_pool"))
    node.target, node.args, node.kwargs = F.max_pool2d, (node.args[0], 2), {}


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (insert(torch.mul, 1.02), "computes mul here"),
        (insert(torch.sub, 0.01), "computes sub here"),
        (insert(torch.sin), "computes sin here"),
        (hold, "holds its codes in [1, 126]"),
        (scale_term, "computes mul here"),
        (pool, "computes max_pool2d here"),
    ],
)
def test_another_op_is_not_requantization(edit: Callable[[fx.Graph], None], named: str) -> None:
    mine, theirs = models()
    assert fxqfix.compare(mine, theirs, [BATCH]).ok
    edited = copy.deepcopy(theirs)
    edit(edited.graph)
    edited.recompile()
    report = fxqfix.compare(mine, edited, [BATCH])
    assert not report.ok
    assert "requantization" not in report.causes
    assert any(named in row.evidence.get("unexplained", "") for row in report.rows)


class Options(nn.Module):
    """Ops whose options move values a little."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.act = nn.LeakyReLU(0.6)

    def forward(self, x: Tensor) -> Tensor:
        y = F.elu(self.act(F.leaky_relu(self.first(x), 0.4)), 0.8) + 0.5
        y = F.avg_pool2d(y, 3, 1, 1) * 0.75
        y = F.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=False)
        return torch.sigmoid(self.second(y) + y)


@functools.cache
def with_options() -> tuple[fx.GraphModule, fx.GraphModule]:
    torch.manual_seed(0)
    with quantized_engine("fbgemm"), quiet():
        mapping = get_default_qat_qconfig_mapping("fbgemm")
        model = prepare_qat_fx(Options().train(), mapping, (BATCH,))
        model(BATCH)
        model.eval().apply(disable_observer)
        model = fxqfix.freeze(model)
        return model, convert_fx(copy.deepcopy(model))


def named(graph: fx.Graph, name: str) -> fx.Node:
    return next(n for n in graph.nodes if n.name.startswith(name) and n.op != "get_attr")


def option(name: str, **options: object) -> Callable[[fx.GraphModule], None]:
    def edit(model: fx.GraphModule) -> None:
        node = named(model.graph, name)
        node.kwargs = {**node.kwargs, **options}

    return edit


def number(name: str, value: float) -> Callable[[fx.GraphModule], None]:
    def edit(model: fx.GraphModule) -> None:
        node = named(model.graph, name)
        node.args = (node.args[0], value)

    return edit


def fuse(model: fx.GraphModule) -> None:
    nodes = model.graph.find_nodes(op="call_function", target=torch.ops.quantized.add)
    nodes[-1].target = torch.ops.quantized.add_relu


def behind(name: str) -> Callable[[fx.GraphModule], None]:
    """A relu of its own behind an op."""

    def edit(model: fx.GraphModule) -> None:
        node = named(model.graph, name)
        with model.graph.inserting_after(node):
            relu = model.graph.call_function(torch.relu, (node,))
        node.replace_all_uses_with(relu, delete_user_cb=lambda user: user is not relu)

    return edit


def leak(model: fx.GraphModule) -> None:
    model.act.negative_slope = 0.62


def dilate(model: nn.Module) -> None:
    model.first.dilation = model.first.padding = (2, 2)
    model.first.set_weight_bias(model.first.weight(), model.first.bias())


EDITS: dict[str, tuple[Callable[[fx.GraphModule], None], str]] = {
    "slope of a function": (option("leaky_relu", negative_slope=0.41), "negative_slope 0.41, 0.4 "),
    "slope of a module": (leak, "leaky_relu has negative_slope 0.62, 0.6"),
    "alpha": (option("elu", alpha=0.9), "elu has alpha 0.9, 0.8"),
    "added": (number("add_2", 0.52), "add has number (0.52,), (0.5,) is due"),
    "times": (number("mul", 0.76), "mul has number (0.76,), (0.75,) is due"),
    "zeros of the padding": (option("avg_pool", count_include_pad=False), "count_include_pad"),
    "taps of a convolution": (dilate, "conv2d has dilation (2, 2), (1, 1) is due"),
    "relu in the kernel": (fuse, "computes relu here"),
    "relu apart": (behind("leaky_relu"), "computes relu here"),
}


@pytest.mark.parametrize("name", EDITS)
def test_other_options_are_not_requantization(name: str) -> None:
    mine, theirs = with_options()
    edit, said = EDITS[name]
    edited = copy.deepcopy(theirs)
    edit(edited)
    edited.recompile()
    before = fxqfix.compare(mine, theirs, [BATCH], engine="fbgemm")
    assert before.unexplained == 0
    report = fxqfix.compare(mine, edited, [BATCH], engine="fbgemm")
    assert report.verdict == "not ok"
    rows = [row for row in report.rows if said in row.evidence.get("unexplained", "")]
    assert rows, report
    for row in rows:
        assert "requantization" not in row.causes, row


class Eager(nn.Module):
    """The same kind in eager mode, convolution and relu fused."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.first, self.relu, self.act = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(),
            nn.LeakyReLU(0.6),
        )
        self.second = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.act(self.second(self.relu(self.first(self.quant(x))))))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda model: None, ""),
        (leak, "leaky_relu has negative_slope 0.62, 0.6 is due"),
        (dilate, "conv2d has dilation (2, 2), (1, 1) is due"),
    ],
)
def test_other_options_in_eager_mode(edit: Callable[[nn.Module], None], said: str) -> None:
    torch.manual_seed(0)
    net = tq.fuse_modules(Eager().eval(), [["first", "relu"]])
    net.qconfig = tq.get_default_qconfig("fbgemm")
    with quantized_engine("fbgemm"), quiet():
        model = tq.prepare(net)
        model(BATCH)
        converted = tq.convert(model)
    edit(converted)
    report = fxqfix.compare(model, converted, [BATCH], engine="fbgemm")
    found = [r.evidence["unexplained"] for r in report.rows if "unexplained" in r.causes]
    assert len(found) == bool(said)
    assert all(said in text for text in found)

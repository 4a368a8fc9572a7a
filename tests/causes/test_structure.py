"""Another op in the converted model is no arithmetic of its kernels, however little it moves."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.quantization import disable_observer, get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx

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

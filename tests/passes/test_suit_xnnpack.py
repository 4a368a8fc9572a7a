"""suit-xnnpack: every value stays, to the bit, and what executorch can't lower is gone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

from fxqfix import dialects, to_decomposed
from fxqfix._torch import quiet
from fxqfix.dialects.decomposed import is_dequantize, is_pin
from fxqfix.errors import DialectError
from fxqfix.passes import SuitXnnpack
from fxqfix.passes.signed_codes import is_unsigned
from tests.dialects.nets import fx_ptq
from tests.routes import nets
from tests.states import fingerprint


def suited(model: fx.GraphModule) -> fx.GraphModule:
    found: fx.GraphModule = SuitXnnpack()(model).graph_module
    return found


def float_weights(model: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in model.graph.nodes if str(n.target).endswith("_float")]


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("name", nets.NETS)
def test_every_value_stays(name: str, pinned: bool) -> None:
    model = nets.decomposed(name, pinned)
    before = fingerprint(model)
    found = suited(model)
    assert fingerprint(model) == before
    with torch.no_grad():
        for batch in nets.batches():
            assert torch.equal(found(batch), model(batch))
    assert not any(is_unsigned(n) for n in found.graph.nodes)
    assert all(len(n.users) == 1 for n in found.graph.nodes if is_dequantize(n))
    for tap in dialects.read(found).activations:
        source = tap.node.all_input_nodes[0]
        assert not is_pin(source) or is_dequantize(source.all_input_nodes[0])
    assert SuitXnnpack()(found).edits == ()


def test_zero_points_of_weights_are_not_handed_over() -> None:
    """mobile has one channel of one sign, and the fused fake-quant gives it a zero point."""
    model = nets.decomposed("mobile")
    crooked = [
        t.site.name
        for t in dialects.read(model).weights
        if t.site.used is not None and any(t.site.used.zero_points)
    ]
    assert crooked == ["squeeze_3.weight"]
    assert float_weights(suited(model)) == ["squeeze_3_weight_dequantize_float"]
    assert float_weights(suited(nets.decomposed("residual"))) == []


def test_a_module_called_twice_gets_two_biases() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x))

    model = to_decomposed(fx_ptq(Twice()))
    found = suited(model)
    calls = [n for n in found.graph.nodes if "conv2d" in str(n.target)]
    assert len(calls) == 2
    first, second = (getattr(found, str(n.args[2].target)) for n in calls)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


def test_an_op_whose_result_stays_float_gets_a_float_weight() -> None:
    model = copy.deepcopy(nets.decomposed("plain"))
    ends = next(n for n in model.graph.nodes if n.op == "output")
    head = next(n for n in model.graph.nodes if n.name == "head")
    ends.args = (head,)  # not quantized any more
    model = fx.GraphModule(model, model.graph)
    model.graph.eliminate_dead_code()
    found = suited(model)
    assert len(float_weights(found)) == 1
    with torch.no_grad():
        assert torch.equal(found(nets.image()), model(nets.image()))


def test_weight_only_graphs_become_float() -> None:
    grid = (0.05, 0, -128, 127, torch.int8)
    dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor

    class WeightOnly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.arange(12, dtype=torch.int8).reshape(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, dequantize(self.weight, *grid))

    with quiet():
        model = torch.export.export(WeightOnly(), (torch.ones(2, 3),)).module()
    found = suited(model)
    assert not any(is_dequantize(n) for n in found.graph.nodes)
    x = torch.linspace(-1, 1, 6).reshape(2, 3)
    assert torch.equal(found(x), model(x))


def test_only_decomposed_graphs() -> None:
    with pytest.raises(DialectError, match="suit-xnnpack: only decomposed graphs"):
        SuitXnnpack()(nets.prepared("plain"))

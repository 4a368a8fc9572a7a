"""pin-ranges: clamps on values, on codes, and moved from one to the other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_fx

import fxqfix
from fxqfix import compare, extract_parameters, to_decomposed
from fxqfix.errors import UnknownNameError
from fxqfix.passes import PinRanges
from tests.routes import nets


def clamps(model: fx.GraphModule) -> int:
    return sum(node.target is torch.clamp for node in model.graph.nodes)


def edges(model: fx.GraphModule) -> list[tuple[str, list[str]]]:
    """What each node calls, and what the nodes that it reads call."""
    nodes = model.graph.nodes
    return [(str(n.target), [str(m.target) for m in n.all_input_nodes]) for n in nodes]


def test_where_a_clamp_stands_changes_no_bit_and_no_site() -> None:
    prepared = nets.prepared("residual")
    plain = to_decomposed(prepared, pin_ranges=False)
    values, codes = to_decomposed(prepared), to_decomposed(prepared, pin_ranges="codes")
    moved = PinRanges(where="codes")(values).graph_module
    back = PinRanges()(codes).graph_module
    for model in (values, codes, moved, back):
        assert clamps(model) == 8
        assert fxqfix.inspect(model) == fxqfix.inspect(plain)
        for x in nets.batches():
            assert torch.equal(model(x), plain(x))
    assert edges(moved) == edges(codes)
    assert edges(back) == edges(values)
    for model, where in ((values, "values"), (codes, "codes")):
        assert not PinRanges(where=where)(model).modified


def test_clamps_on_codes_are_read_everywhere() -> None:
    codes = to_decomposed(nets.prepared("residual"), pin_ranges="codes")
    assert compare(nets.prepared("residual"), codes, nets.batches()).exact
    assert extract_parameters(codes) == extract_parameters(nets.decomposed("residual"))
    program = torch.export.export(codes, (nets.image(),))
    assert fxqfix.certify(program, "export", nets.batches()).pinned == 8


def test_a_repair_moves_them_with_the_range() -> None:
    codes = to_decomposed(nets.prepared("residual"), pin_ranges="codes")
    for node in codes.graph.nodes:
        if node.name in ("stem_0_quantize", "stem_0_dequantize"):
            source, scale, *rest = node.args
            node.args = (source, 3 * scale, rest[0], rest[1], 100, rest[-1])
        if node.name == "stem_0_clamp":
            node.args = (node.args[0], 0, 100)
    codes.recompile()
    mended = fxqfix.repair(nets.prepared("residual"), codes, data=nets.batches()).graph_module
    right = nets.decomposed("residual")
    assert not all(torch.equal(codes(x), right(x)) for x in nets.batches())
    assert all(torch.equal(mended(x), right(x)) for x in nets.batches())
    clamp = next(n for n in mended.graph.nodes if n.name == "stem_0_clamp")
    assert clamp.args[1:] == (0, 127)


def test_an_unknown_place() -> None:
    with pytest.raises(UnknownNameError, match="values, codes"):
        PinRanges(where="weights")(nets.decomposed("residual"))


def test_what_only_picks_codes_needs_no_clamp() -> None:
    """A max pool on its input's grid; in another range it does."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mapping = get_default_qconfig_mapping("fbgemm")
    prepared = prepare_fx(net.eval(), mapping, (x,))
    prepared(x)
    plain = to_decomposed(prepared, pin_ranges=False)
    picks = [s.name for s in fxqfix.inspect(plain) if s.op in ("max_pool2d", "flatten")]
    assert picks
    for where in ("values", "codes"):
        result = PinRanges(where=where)(plain)
        activations = [s for s in fxqfix.inspect(plain) if s.kind == "activation"]
        assert clamps(result.graph_module) == len(activations) - len(picks)
        assert not any(name in edit for name in picks for edit in result.edits)
        assert torch.equal(result.graph_module(3 * x), plain(3 * x))
    wide = copy.deepcopy(plain)
    pool = next(
        n
        for n in wide.graph.nodes
        if "quantize_per_tensor" in str(n.target) and n.all_input_nodes[0].name == picks[0]
    )
    pool.args = (*pool.args[:3], 0, 100, *pool.args[5:])
    wide.recompile()
    clamped = [edit for edit in PinRanges()(wide).edits if edit.startswith(picks[0])]
    assert len(clamped) == 1


@pytest.mark.parametrize(
    ("op", "held"),
    [
        (nn.ReLU6(), True),
        (nn.Hardtanh(-0.25, 0.5), True),
        (lambda x: nn.functional.hardtanh(x, min_val=-2.0, max_val=0.0), True),
        (nn.Hardtanh(0.25, 0.5), False),
        (lambda x: nn.functional.hardtanh(x, 0.25, 0.5), False),
        (nn.Hardswish(), False),
    ],
    ids=["relu6", "around zero", "up to zero", "above zero", "above zero, args", "hardswish"],
)
def test_what_moves_codes_towards_zero_needs_no_clamp(op: Any, held: bool) -> None:
    """On its input's grid, where zero is a code; no other op, no other grid."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = op

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                x = ops.quantize_per_tensor(x, 0.03, 60, 0, 127, torch.uint8)
                x = ops.dequantize_per_tensor(x, 0.03, 60, 0, 127, torch.uint8)
                x = self.op(x)
            return ops.quantize_per_tensor(x, 0.03, 60, 0, 100, torch.uint8)

    ops = torch.ops.quantized_decomposed
    plain = fx.symbolic_trace(Net())
    pinned = PinRanges()(plain)
    # The input and the last, whose range is another, always; the one in between where it has to.
    assert len(pinned.edits) == (2 if held else 3)
    x = torch.linspace(-9, 9, 4096)
    wanted = plain(x)
    assert torch.equal(pinned.graph_module(x), wanted)
    bare = pinned.graph_module
    for node in bare.graph.nodes:  # as exporters drop them: the clamps alone hold the ranges
        if "quantized_decomposed.quantize_per_tensor" in str(node.target):
            node.args = (*node.args[:3], 0, 255, node.args[-1])
    bare.recompile()
    assert torch.equal(bare(x), wanted)

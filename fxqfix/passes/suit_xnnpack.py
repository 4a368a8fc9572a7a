"""suit-xnnpack: a decomposed graph in the form that ExecuTorch's XNNPACK backend runs on integers.

Every edit keeps each value of the graph, to the bit. Without them, executorch 1.5.1 was seen to
refuse such graphs, to run their ops on floats, or to lower them to something else:

* A clamp between an op and its quantize op keeps a convolution off the int8 kernels; where it is
  lowered all the same, raw codes are read as floats.
* Unsigned codes are not taken, or are read as signed ones.
* A value that an int8 op and a float op both read is lowered as codes for both.
* A bias that two calls share is rounded to the first call's steps for both (28% of the codes off,
  by up to 11).
* Ops that move codes (cat, max pool, reshapes) fail to load where the grid changes.
* Zero points of weights are dropped: a fused fake-quant gives a channel of one sign its own, and
  such a channel was off by 17 codes.
* The integer weight of an op whose result stays float is left behind.
* A 1d convolution with a float weight is refused where its input is dequantized.
* What only hands codes on (dropout in eval mode, identity) is refused where it stands alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxqfix import dialects, ops
from fxqfix.dialects import Reading, Tap
from fxqfix.dialects._base import modules_of
from fxqfix.dialects._constants import constant
from fxqfix.dialects._modes import drops
from fxqfix.dialects.decomposed import (
    is_dequantize,
    is_pin,
    is_quantize,
    only_picks,
    qparams_of_op,
)
from fxqfix.errors import DialectError, PassError
from fxqfix.passes._base import Pass, Rewriter
from fxqfix.passes._forms import quantize_node
from fxqfix.passes.float_weights import to_float
from fxqfix.passes.own_readers import OwnReaders
from fxqfix.passes.signed_codes import SignedCodes

__all__ = ["FUSED", "SuitXnnpack"]

_IDLE = ("dropout", "identity")
_ORDER = ("input", "weight", "bias", "stride", "padding")
_AS_2D: dict[str, tuple[Any, tuple[str, ...]]] = {
    "conv1d": (torch.nn.functional.conv2d, (*_ORDER, "dilation", "groups")),
    "conv_transpose1d": (
        torch.nn.functional.conv_transpose2d,
        (*_ORDER, "output_padding", "groups", "dilation"),
    ),
}
_FIRST = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1}  # of the axis of size 1
FUSED = ("relu", "relu6", "hardtanh")  # what XNNPACK's kernels do on the way out


@dataclass(frozen=True)
class SuitXnnpack(Pass):
    """Rewrite a decomposed graph so that ExecuTorch lowers it to XNNPACK's int8 kernels.

    A pinned range becomes a clamp of codes behind the quantize op, which XNNPACK fuses into the
    kernel. What does nothing (dropout in eval mode) is removed. An op that moves codes gets them on
    the grid of its result. Weights with zero points, and those of ops whose result stays float,
    become float. Last come the passes `signed-codes` and
    `own-readers`. No value changes.

    Raises:
        DialectError: The graph has no decomposed ops.

    Example:
        >>> from fxqfix.passes import SuitXnnpack
        >>> SuitXnnpack().name
        'suit-xnnpack'
    """

    name: ClassVar[str] = "suit-xnnpack"
    requires: ClassVar[tuple[str, ...]] = (
        "decompose-quantize",
        "pin-ranges",
    )

    def rewrite(self, rewriter: Rewriter) -> None:
        """Make the edits, each where it is needed."""
        reading = dialects.read(rewriter.graph_module)
        if not reading.carries_ranges:
            raise DialectError(
                "only decomposed graphs are lowered",
                where=self.name,
                found=f"a model of dialect {reading.dialect}",
                remedy="call fxqfix.to_decomposed(model) first",
            )
        _drop_idle(rewriter)
        reading = dialects.read(rewriter.graph_module)
        for tap in reading.activations:
            _requantize_before(rewriter, tap, reading)
            if is_pin(tap.node.all_input_nodes[0]):
                _clamp_codes(rewriter, tap)
        for tap in reading.weights:
            if not _on_integers(tap, reading):
                to_float(rewriter, tap)
                _in_2d(rewriter, tap, reading)
        SignedCodes().rewrite(rewriter)
        OwnReaders().rewrite(rewriter)

    def ensures(self, after: nn.Module) -> None:
        """No narrow range is pinned before its quantize op."""
        assert isinstance(after, fx.GraphModule)
        for node in filter(is_quantize, after.graph.nodes):
            source = node.all_input_nodes[0]
            if is_pin(source) and not is_dequantize(source.all_input_nodes[0]):
                raise PassError("a clamp stands before a quantize op", where=self.name)


def _drop_idle(rewriter: Rewriter) -> None:
    """Remove ops that do nothing, and the quantize ops that then only repeat one before them."""
    graph_module = rewriter.graph_module
    modules = modules_of(graph_module)
    for node in list(rewriter.graph.nodes):
        found = ops.match_node(node, modules)
        if found is None or found.key not in _IDLE or not isinstance(node.args[0], fx.Node):
            continue
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        drawing = drops(node) if module is None else module.training and found.key == "dropout"
        if not drawing:
            rewriter.replace(node, node.args[0], f"{node.name}: does nothing")
    for node in list(filter(is_quantize, rewriter.graph.nodes)):
        before = node.all_input_nodes[0]
        if not is_dequantize(before) or before.args[1:] != node.args[1:] or before.kwargs:
            continue
        if all(is_dequantize(user) and user.args[1:] == node.args[1:] for user in node.users):
            for user in list(node.users):
                rewriter.replace(user, before, f"{node.name}: the same codes as before")
        elif before.all_input_nodes[0].op == "placeholder":  # of a graph cut at its sites
            rewriter.replace(node, before.all_input_nodes[0], f"{node.name}: the same codes")


def _in_2d(rewriter: Rewriter, tap: Tap, reading: Reading) -> None:
    """A 1d convolution with a float weight as the 2d one that ATen makes of it."""
    graph_module, node = rewriter.graph_module, tap.node
    found = ops.match_node(node, modules_of(reading.graph_module))
    if found is None or found.key not in _AS_2D or node.op != "call_function":
        return
    given: dict[str, Any] = dict(zip(_AS_2D[found.key][1], node.args, strict=False)) | node.kwargs
    source, weight = given["input"], given["weight"]
    if not is_dequantize(source) or weight.op != "get_attr":
        return
    for name in given.keys() & _FIRST.keys():
        value = given[name]
        if not isinstance(value, str):  # of padding: "same", "valid"
            given[name] = [_FIRST[name], *(value if isinstance(value, (list, tuple)) else [value])]
    aten = torch.ops.aten
    with rewriter.graph.inserting_before(node):
        given["input"] = rewriter.call(aten.unsqueeze.default, (source, 2), f"{node.name}_rows")
        wide = constant(graph_module, weight).unsqueeze(2)
        given["weight"] = rewriter.buffer_node(f"{weight.name}_2d", wide)
        made = rewriter.call(_AS_2D[found.key][0], (), f"{node.name}_2d", **given)
        rows = rewriter.call(aten.squeeze.dim, (made, 2), f"{node.name}_row")
    rewriter.replace(node, rows, "as the 2d convolution that it is")


def _requantize_before(rewriter: Rewriter, tap: Tap, reading: Reading) -> None:
    """Give an op that only picks codes those of its result's grid: it does not matter when."""
    found = ops.match_node(tap.producer, modules_of(reading.graph_module))
    if not only_picks(found):
        return
    grid = tap.site.used
    for node in tap.producer.all_input_nodes if grid is not None else ():
        own = qparams_of_op(node, reading.graph_module) if is_dequantize(node) else None
        if grid is None or own is None or own.axis is not None or own.same_grid(grid):
            continue
        with rewriter.graph.inserting_before(tap.producer):
            wide = grid.with_range(*grid.container)
            moved = quantize_node(rewriter, node, wide, f"{node.name}_moved")
        tap.producer.replace_input_with(node, moved)
        rewriter.note(f"{node.name}: quantized to {grid} before {tap.producer.name}")


def _clamp_codes(rewriter: Rewriter, tap: Tap) -> None:
    """Quantize to the whole container, and clamp what that gives."""
    clamp, grid = tap.node.all_input_nodes[0], tap.site.used
    assert grid is not None
    source = clamp.all_input_nodes[0]
    if is_dequantize(source):
        return
    with rewriter.graph.inserting_before(clamp):
        wide = grid.with_range(*grid.container)
        codes = quantize_node(rewriter, source, wide, f"{tap.site.name}_wide")
    clamp.replace_input_with(source, codes)
    rewriter.note(f"{tap.site.name}: its codes are clamped to {grid.range_text}")


def _on_integers(tap: Tap, reading: Reading) -> bool:
    """Whether XNNPACK computes a weight's op on integers: codes in, and codes or dynamic out."""
    modules = modules_of(reading.graph_module)
    found = ops.match_node(tap.node, modules)
    value = tap.node.args[0] if tap.node.args else None
    if found is None or found.spec.family != "weighted" or not isinstance(value, fx.Node):
        return False
    grid = tap.site.used
    if not is_dequantize(value) or grid is None or any(grid.zero_points):
        return False
    if found.spec.dims == 3 or (found.spec.transposed and grid.axis not in (None, 1)):
        return False  # XNNPACK has no such kernel
    if qparams_of_op(value, reading.graph_module) is None:  # chosen at run time: floats come out
        return True
    end = tap.node
    behind = ops.match_node(next(iter(end.users)), modules) if len(end.users) == 1 else None
    if behind is not None and behind.key in FUSED:
        end = next(iter(end.users))
    return len(end.users) == 1 and is_quantize(next(iter(end.users)))

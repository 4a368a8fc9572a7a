"""The parts of a module that the graph does not open, emulated by the same rows as any graph."""

from __future__ import annotations

import torch
from torch import fx, nn

from fxqfix.dialects import int8
from fxqfix.dialects.trace import trace
from fxqfix.engines._base import Call, Kernel, table
from fxqfix.engines.calls import calls
from fxqfix.engines.defects import find
from fxqfix.engines.isa import UNKNOWN
from fxqfix.errors import UnsupportedError
from fxqfix.qparams import QParams

__all__ = ["inner", "row_of"]


def row_of(call: Call) -> Kernel:
    """The row that computes a call.

    Raises:
        UnsupportedError: There is none, or the kernel is wrong in a way that no row follows.

    Example:
        >>> from fxqfix.engines import Call, row_of
        >>> row_of(Call("fc", "fbgemm", "linear")).inexact
        ''
    """
    defect, row = find(call), table().get((call.engine, call.key))
    reason = ""
    if defect is not None and not defect.emulated and defect.present is not False:
        reason = (
            f"{call.engine}'s kernel is wrong in torch {torch.__version__} ({defect.name}): "
            f"{defect.condition}"
        )
    elif row is None:
        reason = f"{call.engine} has no exact arithmetic for {call.key!r}"
    elif UNKNOWN in (call.isa.cpu, call.isa.aten, getattr(call.isa, call.engine, "")):
        reason = f"nobody has measured the kernels of this CPU and build ({call.isa})"
    if row is None or reason:
        raise UnsupportedError(
            f"node can't be emulated: {reason}",
            where=f"node {call.node!r}",
            found=str(call.target if call.module is None else type(call.module).__name__),
            remedy="see `fxqfix engines` for the ops that each engine runs"
            if UNKNOWN not in reason
            else 'say which: emulate(model, isa="vnni") or another level',
        )
    return row


def inner(
    module: nn.Module, grids: tuple[QParams, ...], call: Call
) -> tuple[nn.Module, tuple[QParams, ...]]:
    """A module on codes, and the grids of what it returns.

    Args:
        module: A module on quantized tensors that FX can trace.
        grids: The grids of its arguments.
        call: The op that it is a part of.
    """
    model = trace(module)
    places = [n for n in model.graph.nodes if n.op == "placeholder"]
    given = dict(zip(places, grids, strict=True))
    found = int8.propagate(model, given)
    returned: list[fx.Node] = []
    fx.map_arg(model.graph.output_node().args, returned.append)
    outputs = tuple(found[n] for n in returned)
    done: dict[fx.Node, fx.Node] = {}
    for node, own in calls(model, call.engine, call.isa, call.threads, given=given).items():
        row = row_of(own)
        if row.build is None:
            continue
        name = f"emulated_{node.name}"
        model.add_submodule(name, row.build(own))
        with model.graph.inserting_before(node):
            new = model.graph.call_module(name, tuple(done.get(n, n) for n in own.inputs))
        done[node] = new
        node.replace_all_uses_with(new)
        model.graph.erase_node(node)
    model.delete_all_unused_submodules()
    model.recompile()
    return model, outputs

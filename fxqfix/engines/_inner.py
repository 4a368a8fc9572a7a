"""The parts of a module that the graph does not open, emulated by the same rows as any graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, fx, nn

from fxqfix.dialects import int8
from fxqfix.dialects.trace import trace
from fxqfix.engines._base import Builder, Call, Kernel, table
from fxqfix.engines._moving import Moving
from fxqfix.engines.calls import calls
from fxqfix.engines.defects import Defect, rows
from fxqfix.engines.isa import UNKNOWN
from fxqfix.errors import UnsupportedError
from fxqfix.qparams import QParams

__all__ = ["inner", "row_of"]


def row_of(call: Call, *, as_it_should: bool = False) -> Kernel:
    """The row that computes a call.

    Where only the size of its input tells whether the kernel is wrong, the module that the row
    builds refuses such inputs.

    Args:
        call: The call.
        as_it_should: Whether to go by the op where its kernel is known to be wrong.

    Raises:
        UnsupportedError: There is none, or the kernel is wrong in a way that no row follows.

    Example:
        >>> from fxqfix.engines import Call, row_of
        >>> row_of(Call("fc", "fbgemm", "linear")).native
        False
    """
    row = table().get((call.engine, call.key))
    wrong = [] if as_it_should else [d for d in rows(call) if not d.emulated]
    defect = next((d for d in wrong if d.at is None and d.present is not False), None)
    reason = ""
    if defect is not None:
        reason = defect.refusal(call)
    elif row is None:
        reason = f"{call.engine} has no exact arithmetic for {call.key!r}"
    else:
        reason = call.isa.unmeasured(call.engine)
    if row is None or reason:
        raise UnsupportedError(
            f"node can't be emulated: {reason}",
            where=f"node {call.node!r}",
            found=str(call.target if call.module is None else type(call.module).__name__),
            remedy=_remedy(defect, reason),
        )
    if row.native:
        call.check_native()
    by_size = tuple(d for d in wrong if d.at is not None)
    if by_size and row.build is not None:
        row = replace(row, build=functools.partial(_watched, row.build, by_size))
    if call.present is not None and not call.present.closed and row.build is not None:
        row = replace(row, build=functools.partial(Moving, row.build))
    return row


def _remedy(defect: Defect | None, reason: str) -> str:
    if defect is not None:
        return defect.way_round
    if UNKNOWN in reason:
        return 'say which: emulate(model, isa="vnni") or another level'
    return "see `fxqfix engines` for the ops that each engine runs"


def _watched(build: Builder, defects: tuple[Defect, ...], call: Call) -> nn.Module:
    module = build(call)
    module.register_forward_pre_hook(_Refuse(defects, call.without_graph()))
    return module


class _Refuse:
    """A hook that refuses inputs of sizes for which the kernel is wrong."""

    def __init__(self, defects: tuple[Defect, ...], call: Call) -> None:
        self.names, self.call = {d.name for d in defects}, call

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """See what comes in."""
        shape = tuple(inputs[0].shape)
        for defect in rows(self.call, shape):
            if defect.name in self.names and defect.present is not False:
                raise UnsupportedError(
                    f"this input can't be emulated: {defect.refusal(self.call)}",
                    where=f"node {self.call.node!r}",
                    found=f"an input of {'x'.join(map(str, shape))}",
                    remedy=defect.way_round,
                )


def inner(
    module: nn.Module,
    grids: tuple[QParams, ...],
    call: Call,
    at: Callable[[str], str] = str,
) -> tuple[nn.Module, tuple[QParams, ...]]:
    """A module on codes, and the grids of what it returns.

    Args:
        module: A module on quantized tensors that FX can trace.
        grids: The grids of its arguments.
        call: The op that it is a part of.
        at: From a path in the module to the path in the op's own module.
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
        if call.present is not None and node.op == "call_module":
            own = replace(own, present=call.present.inside(at(str(node.target))))
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

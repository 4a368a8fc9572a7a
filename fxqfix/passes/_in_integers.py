"""An int8 graph, or one woven from it, that runs its emulation: where there are no int8 kernels."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from fxqfix import _torch
from fxqfix.engines import Call, row_of
from fxqfix.passes._weave import PREFIX
from fxqfix.qparams import QParams

__all__ = ["EMULATED", "run_in_integers"]

EMULATED = "emulated_"  # before the name of an int8 node: what emulate-engine puts in its place


def run_in_integers(
    model: fx.GraphModule, emulation: fx.GraphModule, returned: Mapping[str, QParams]
) -> None:
    """Put the emulated modules in place of the int8 ops; nodes keep their names.

    Args:
        model: The int8 graph, or one that has its nodes among others; it is changed.
        emulation: What `emulate-engine` made of that int8 graph; its modules are shared.
        returned: By node the grids of the quantized values that the graph returns: codes are no
            values, and what compares outputs is given these.
    """
    nodes = {node.name: node for node in model.graph.nodes}
    for node in emulation.graph.nodes:
        if not node.name.startswith(EMULATED):
            continue
        own, path = nodes[node.name.removeprefix(EMULATED)], str(node.target)
        model.add_module(path, emulation.get_submodule(path))
        own.op, own.target, own.kwargs = "call_module", path, {}
        own.args = tuple(nodes[n.name.removeprefix(EMULATED)] for n in node.args)
    for name, grid in returned.items():
        _dequantize(model, nodes[name], grid)
    for node in reversed(list(model.graph.nodes)):  # packed weights and scales
        if node.op == "get_attr" and not node.users:
            model.graph.erase_node(node)
    with _torch.quiet():  # some builds warn of packed weights
        model.graph.lint()
    model.recompile()


def _dequantize(model: fx.GraphModule, node: fx.Node, grid: QParams) -> None:
    """Let what takes outputs take the values of a node's codes."""
    build = row_of(Call(node.name, "fbgemm", "dequantize", qparams=(grid,))).build
    assert build is not None  # every engine dequantizes
    path = f"{PREFIX}returned_{node.name}"
    model.add_module(path, build(Call(node.name, "fbgemm", "dequantize", qparams=(grid,))))
    users = [u for u in node.users if u.op == "output" or "probe_outputs" in str(u.target)]
    with model.graph.inserting_after(node):
        value = model.graph.call_module(path, (node,))
    for user in users:
        user.replace_input_with(node, value)

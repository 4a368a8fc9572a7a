"""Which ops compute a site: a converted region that has others computes something else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from operator import getitem

from torch import fx

from fxqfix import ops
from fxqfix.dialects._base import modules_of
from fxqfix.engines import Call

__all__ = ["computing"]

_EMULATED = "emulated_"
# One op in several spellings, and ops that a kernel fuses.
_PARTS = {
    "add_scalar": ("add",),
    "mul_scalar": ("mul",),
    "relu6": ("clamp",),
    "hardtanh": ("clamp",),
    "linear_leaky_relu": ("leaky_relu",),
    "linear_tanh": ("tanh",),
    "conv2d_add": ("add",),
}
_ASIDE = frozenset({"boundary", "shape"})  # families that leave values as they are, or the grid's


def computing(
    graph: fx.Graph, root: fx.GraphModule, calls: Mapping[str, Call] | None = None
) -> Counter[str]:
    """How often a region has which op of the op table; a relu, which kernels fuse, is left out.

    Args:
        graph: The region.
        root: The module that it calls into.
        calls: Of an emulated region: the int8 ops by the names of their nodes.
    """
    modules, found = modules_of(root), Counter[str]()
    for node in graph.nodes:
        call = (calls or {}).get(node.name.removeprefix(_EMULATED))
        match = ops.match_node(node, modules)
        if call is not None and node.name.startswith(_EMULATED):
            key = call.key
        elif match is not None:
            key = match.spec.key
        elif node.op in ("call_function", "call_method") and node.target is not getitem:
            key = str(getattr(node.target, "__name__", node.target))  # in no row, as torch.sin
        else:
            continue
        spec = next((spec for spec in ops.TABLE if spec.key == key), None)
        if key not in _PARTS and spec is not None and spec.family == "weighted":
            continue  # a site of its own: where a region begins before it, the ops are not its own
        if key != "relu" and (spec is None or spec.family not in _ASIDE):
            found.update(_PARTS.get(key, (key,)))
    return found

"""explicit-writes: what reads a value behind an in-place op takes the op's result by name.

After ``y = F.hardswish(x, inplace=True)`` a later reader of x sees y's values. Conversion goes by
dataflow, where it still reads x, and gives it the value from before the write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from fxqfix import ops
from fxqfix.dialects._base import modules_of
from fxqfix.dialects._writes import IN_FLOAT, Overwrite, is_inplace, overwrites
from fxqfix.passes._base import Pass, Rewriter
from fxqfix.passes._frozen import FrozenFakeQuantize
from fxqfix.passes.split_shared import tied

__all__ = ["QUANTIZED", "ExplicitWrites"]

QUANTIZED = "fxqfix_reads_quantized"  # in node.meta: the in-place op whose float result it did read


@dataclass(frozen=True)
class ExplicitWrites(Pass):
    """Let what reads an overwritten value read the result of the op that overwrote it.

    That result is not quantized: its fake-quant stands behind the op and gives a tensor of its
    own. Conversion can't hand it on from an int8 kernel, so the readers get it from a second call
    of the op, on a copy of its input, which conversion leaves in float. Where the fake-quant
    changes no value (a relu on its input's grid), they read behind it.

    Attributes:
        quantized: Whether readers take the fake-quantized value everywhere: int8 kernels can read
            that. The model then differs from what was trained by this rounding.

    Example:
        >>> str(ExplicitWrites.name)
        'explicit-writes'
    """

    name: ClassVar[str] = "explicit-writes"
    requires: ClassVar[tuple[str, ...]] = (
        "freeze-qparams",
        "split-shared",
    )
    quantized: bool = False

    def rewrite(self, rewriter: Rewriter) -> None:
        """Go through the in-place ops in their order: one may write on another's result."""
        modules = modules_of(rewriter.graph_module)
        order = {node: i for i, node in enumerate(rewriter.graph.nodes)}
        twins: dict[fx.Node, fx.Node] = {}
        for use in sorted(overwrites(rewriter.graph, modules), key=lambda use: order[use.op]):
            behind = quantizer(use.op, modules)
            if behind is None:
                source, what = use.op, "its result"
            elif _may_read(use.reader, behind, order, modules) and (
                self.quantized or _changes_nothing(use, behind, modules)
            ):
                source, what = behind, "its result, quantized"
                if not _changes_nothing(use, behind, modules):
                    use.reader.meta[QUANTIZED] = use.op.name
            else:
                if use.op not in twins:
                    twins[use.op] = _twin(rewriter, use.op)
                source, what = twins[use.op], "its result, in float"
            use.reader.replace_input_with(use.value, source)
            rewriter.note(f"{use.reader.name}: reads behind {use.op.name}, in place, {what}")


def quantizer(op: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node | None:
    """The frozen fake-quant behind a node, None without one."""
    for user in op.users:
        if user.op == "call_module" and isinstance(modules[str(user.target)], FrozenFakeQuantize):
            return user
    return None


def _may_read(
    reader: fx.Node,
    behind: fx.Node,
    order: dict[fx.Node, int],
    modules: Mapping[str, nn.Module],
) -> bool:
    """Whether a node stands behind a fake-quant, and would not write on its value."""
    return order[behind] < order[reader] and not is_inplace(reader, modules)


def _changes_nothing(use: Overwrite, behind: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a fake-quant gives back what it is given: values that are on its grid already."""
    found, source = ops.match_node(use.op, modules), use.op.all_input_nodes[0]
    if found is None or found.key != "relu" or source.op != "call_module":
        return False
    before, after = modules.get(str(source.target)), modules[str(behind.target)]
    if not isinstance(before, FrozenFakeQuantize) or not isinstance(after, FrozenFakeQuantize):
        return False
    return before.qparams == after.qparams


def _twin(rewriter: Rewriter, op: fx.Node) -> fx.Node:
    """The op once more, in front of it, on a copy of what it will write over."""
    target = op.all_input_nodes[0]
    with rewriter.graph.inserting_before(op):
        if getattr(op.target, "namespace", "") == "aten":
            copied = rewriter.call(torch.ops.aten.clone.default, (target,), f"{op.name}_copy")
        else:
            copied = rewriter.graph.call_method("clone", (target,))
        twin = rewriter.graph.node_copy(op, lambda n: copied if n is target else n)
    for node in (copied, twin):
        node.meta = {k: v for k, v in op.meta.items() if k == "val"}
    if op.op == "call_module":
        module = rewriter.graph_module.get_submodule(str(op.target))
        twin.target = f"{op.target}{IN_FLOAT}"
        rewriter.set_module(str(twin.target), tied(module), f"what is read behind {op.name}")
    return twin

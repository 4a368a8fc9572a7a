"""Which ops of an int8 graph meet a wrong kernel, or ties that its kernel rounds otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import fx, nn

from fxqfix import ops
from fxqfix.dialects._base import modules_of
from fxqfix.engines import Call, Defect, calls, met

__all__ = ["defects_of", "meeting_ties"]


def defects_of(
    graph_module: fx.GraphModule, engine: str, *, unlikely: bool = False
) -> Iterator[tuple[fx.Node, Defect, tuple[str, ...]]]:
    """The wrong kernels that an int8 graph may run on, and the levels that each strikes at.

    Args:
        graph_module: The graph.
        engine: The engine that it was converted for.
        unlikely: Whether to list those too that only images of one pixel meet, where the graph has
            no pool that makes them.
    """
    for node, call in calls(graph_module, engine, strict=False).items():
        for defect, levels in met(call, engine).items():
            by_pixels = not defect.certain and defect.at is None and defect.cure == "island"
            likely = unlikely or not by_pixels or _has_one_pixel(node, graph_module)
            if likely and not _is_cured(call, defect):
                yield node, defect, levels


def meeting_ties(graph_module: fx.GraphModule, engine: str) -> dict[fx.Node, bool]:
    """Averages that can lie half-way between two codes: those of an even number of codes.

    The value: whether what comes out in float depends on the layout, which training has
    contiguous: a mean over all pixels adds in another order where it is channels-last.
    """
    found = calls(graph_module, engine, strict=False)
    return {
        node: not call.key.startswith("avg_pool")
        for node, call in found.items()
        if call.spec.averages and _even(call)
    }


def _even(call: Call) -> bool:
    """Whether an average may be one of an even number of codes; some tell only at run time."""
    if not call.key.startswith("avg_pool"):
        return True
    kernel, padding = call.option("kernel_size", 2), call.option("padding", 0)
    sizes = kernel if isinstance(kernel, list | tuple) else (kernel,)
    padded = any(padding) if isinstance(padding, list | tuple) else bool(padding)
    varies = call.option("ceil_mode", False) or (
        padded and not call.option("count_include_pad", True)
    )
    divisor = call.option("divisor_override")
    return bool(varies or divisor is not None or any(size % 2 == 0 for size in sizes))


def _is_cured(call: Call, defect: Defect) -> bool:
    # A function has no module that could run over its input's memory: it gets a contiguous one too.
    if defect.cure not in ("contiguous", "memory order") or not call.inputs:
        return False
    source = call.inputs[0]
    return source.op == "call_method" and source.target == "contiguous"


def _has_one_pixel(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    """Whether a global pool stands somewhere before a node."""
    modules = modules_of(graph_module)
    return any(_pools_globally(n, modules) for n in _upstream(node))


def _upstream(node: fx.Node) -> Iterator[fx.Node]:
    queue, seen = list(node.all_input_nodes), set[fx.Node]()
    while queue:
        current = queue.pop()
        if current not in seen:
            seen.add(current)
            queue.extend(current.all_input_nodes)
            yield current


def _pools_globally(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether an op may give images of one pixel."""
    found = ops.match_node(node, modules)
    return found is not None and found.key.startswith(("adaptive_", "mean"))

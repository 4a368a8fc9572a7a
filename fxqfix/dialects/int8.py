"""Dialect "fx-int8": quantized kernels on quantized tensors.

Reads what `convert_fx` returns (lowered), and eager converted models once traced. Which nodes
carry quantized tensors follows from the op table's output rules; no data is run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxqfix import _torch, ops
from fxqfix.dialects._base import Reading, Tap, modules_of, op_name, scope, unique
from fxqfix.dialects.quantizer import qparams_of
from fxqfix.dialects.site import Site
from fxqfix.dialects.weights import WeightView, int8_weight, packed_weight
from fxqfix.qparams import QParams, container_range

__all__ = ["NAME", "matches", "propagate", "read", "weight_of"]

NAME = "fx-int8"


def matches(graph_module: fx.GraphModule) -> bool:
    """True where any node is a kernel that runs on quantized tensors only, or quantizes."""
    modules = modules_of(graph_module)
    for node in graph_module.graph.nodes:
        found = ops.match_node(node, modules)
        if found is not None and found.column in ("int8", "dynamic"):
            return True
        if found is not None and found.key == "quantize" and not _is_decomposed(node):
            return True
    return False


def _is_decomposed(node: fx.Node) -> bool:
    return "quantized_decomposed" in str(node.target)


def read(graph_module: fx.GraphModule) -> Reading:
    """Read every quantized value and every packed weight as a site."""
    modules = modules_of(graph_module)
    qparams = propagate(graph_module)
    taken: set[str] = set()
    taps: list[Tap] = []
    for node in graph_module.graph.nodes:
        weight = weight_of(node, graph_module, modules)
        if weight is not None:
            taps.append(_weight_tap(node, weight, graph_module, modules, taken))
        if node not in qparams:
            continue
        found = ops.match_node(node, modules)
        # A quantize op is named for the value that it quantizes, a kernel for itself.
        is_function = found is not None and found.key == "quantize" and node.op == "call_function"
        producer = node.all_input_nodes[0] if is_function else node
        site = Site(
            name=unique(producer.name, taken),
            kind="activation",
            module=scope(producer, graph_module),
            op="input" if _is_entry(node, found) else op_name(producer, modules),
            used=qparams[node],
            source="kernel's arguments" if found and found.column == "int8" else "graph",
        )
        inherited = found is None or found.spec.output in ("shape", "input", "tuple")
        taps.append(Tap(site, node, producer, inherited=inherited))
    return Reading(graph_module, NAME, tuple(taps))


def _is_entry(node: fx.Node, found: ops.Match | None) -> bool:
    return found is not None and found.key == "quantize" and node.op == "call_module"


def _weight_tap(
    node: fx.Node,
    weight: WeightView,
    graph_module: fx.GraphModule,
    modules: dict[str, nn.Module],
    taken: set[str],
) -> Tap:
    site = Site(
        name=unique(f"{node.name}.weight", taken),
        kind="weight",
        module=scope(node, graph_module),
        op=op_name(node, modules),
        used=weight.qparams,
        source="packed weight",
        shape=tuple(weight.codes.shape),
    )
    return Tap(site, node, node, lambda: weight)


def weight_of(
    node: fx.Node, graph_module: fx.GraphModule, modules: dict[str, nn.Module]
) -> WeightView | None:
    """The integer weight that a node computes with; None where it has none."""
    if node.op == "call_module":
        return int8_weight(modules[str(node.target)])
    for arg in node.all_input_nodes if node.op == "call_function" else ():
        if arg.op == "get_attr":
            value = fetch(graph_module, arg)
            if _torch.is_packed_params(value):
                return packed_weight(value)
    return None


def fetch(graph_module: fx.GraphModule, value: Any) -> Any:
    """The value of a get_attr node; anything else as it is."""
    if not isinstance(value, fx.Node):
        return value
    if value.op != "get_attr":
        return None
    owner, _, name = str(value.target).rpartition(".")
    return getattr(graph_module.get_submodule(owner), name)


def propagate(graph_module: fx.GraphModule) -> dict[fx.Node, QParams]:
    """The qparams of every node that carries a quantized tensor, in graph order."""
    modules = modules_of(graph_module)
    known: dict[fx.Node, QParams] = {}
    for node in graph_module.graph.nodes:
        found = ops.match_node(node, modules)
        if found is not None and found.key == "quantize":
            qparams = _quantize_args(node, graph_module, modules)
        else:
            qparams = _output(node, found, graph_module, modules, known)
        if qparams is not None:
            known[node] = qparams
    return known


def _output(
    node: fx.Node,
    found: ops.Match | None,
    graph_module: fx.GraphModule,
    modules: dict[str, nn.Module],
    known: dict[fx.Node, QParams],
) -> QParams | None:
    source = next((known[n] for n in node.all_input_nodes if n in known), None)
    if source is None or found is None or node.op in ("output", "placeholder"):
        return None
    rule = found.spec.output
    if rule in ("float", "none") or found.column == "dynamic":
        return None
    own = _own_qparams(node, graph_module, modules, source.dtype)
    if own is not None:
        return own
    if rule == "fixed" and found.spec.fixed is not None and source.dtype == torch.quint8:
        scale, point = found.spec.fixed
        return QParams(scale, point, 0, 255, torch.quint8)
    if rule == "scalar":
        return _scalar_qparams(node, found, source)
    return source


def _quantize_args(
    node: fx.Node, graph_module: fx.GraphModule, modules: dict[str, nn.Module]
) -> QParams | None:
    if node.op == "call_module":
        module: Any = modules[str(node.target)]
        low, high = container_range(module.dtype)
        return qparams_of(module.scale, module.zero_point, low, high, module.dtype)
    if node.target is not torch.quantize_per_tensor:
        return None
    names = ("input", "scale", "zero_point", "dtype")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    scale, point = (fetch(graph_module, given[k]) for k in ("scale", "zero_point"))
    dtype: Any = given["dtype"]
    if scale is None or point is None:  # chosen at run time
        return None
    return qparams_of(scale, point, *container_range(dtype), dtype)


def _own_qparams(
    node: fx.Node, graph_module: fx.GraphModule, modules: dict[str, nn.Module], dtype: torch.dtype
) -> QParams | None:
    if node.op == "call_module":
        module: Any = modules[str(node.target)]
        if not type(module).__module__.startswith("torch.ao.nn"):
            return None
        scale, point = getattr(module, "scale", None), getattr(module, "zero_point", None)
    else:
        scale, point = (fetch(graph_module, v) for v in output_arguments(node))
    if scale is None or point is None:
        return None
    return qparams_of(scale, point, *container_range(dtype), dtype)


def output_arguments(node: fx.Node) -> tuple[Any, Any]:
    """The (scale, zero point) arguments of a torch.ops.quantized call; (None, None) without."""
    packet = node.target
    for overload in getattr(packet, "overloads", list)():
        names = [a.name for a in getattr(packet, overload)._schema.arguments]
        scale = next((n for n in names if n.rstrip("_i").endswith("scale")), None)
        point = next((n for n in names if n.rstrip("_i").endswith("zero_point")), None)
        if scale is None or point is None:
            continue
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        if given.get(scale) is not None and given.get(point) is not None:
            return given[scale], given[point]
    return None, None


def _scalar_qparams(node: fx.Node, found: ops.Match, source: QParams) -> QParams | None:
    """quantized.add_scalar / mul_scalar keep codes and move the grid, unless it overflows.

    The kernels' rule depends on the scalar; rather than copy it, run the kernel on one value.
    """
    if len(node.args) < 2 or not isinstance(node.args[1], (int, float)):
        return None
    scale, point = source.scales[0], int(source.zero_points[0])
    probe = torch.quantize_per_tensor(torch.zeros(1), scale, point, source.dtype)
    target: Any = node.target
    value = target(probe, node.args[1])
    return qparams_of(value.q_scale(), value.q_zero_point(), *source.container, source.dtype)

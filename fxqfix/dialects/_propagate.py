"""Which nodes of an int8 graph carry quantized tensors, and on which grid; no data is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxqfix import ops
from fxqfix.dialects._arguments import arguments, bound, fetch, output_arguments
from fxqfix.dialects._base import Modules, modules_of
from fxqfix.dialects.quantizer import qparams_of
from fxqfix.dialects.weights import tensor_weight
from fxqfix.inserted import FloatIsland
from fxqfix.qparams import QParams, container_range

__all__ = ["ROUNDS_SCALE", "misplaced", "propagate", "scalar", "scalar_qparams", "unread"]

ROUNDS_SCALE = "gelu"  # its kernel hands on the input's qparams with the scale in float32


def propagate(
    graph_module: fx.GraphModule, given: Mapping[fx.Node, QParams] | None = None
) -> dict[fx.Node, QParams]:
    """The qparams of every node that carries a quantized tensor, in graph order.

    Args:
        graph_module: An int8 model.
        given: The qparams of placeholders that quantized tensors come in by.
    """
    modules = modules_of(graph_module)
    known: dict[fx.Node, QParams] = dict(given or {})
    tuples: dict[fx.Node, Any] = {}
    for node in graph_module.graph.nodes:
        found = ops.match_node(node, modules)
        qparams: Any
        if found is not None and found.key == "quantize":
            qparams = _quantize_args(node, graph_module, modules)
        elif found is not None and found.spec.output == "tuple":
            qparams = _closed_outputs(node, found, modules, known)
        elif found is not None and found.key == "getitem" and node.args[0] in tuples:
            qparams = tuples[node.args[0]][node.args[1]]
        else:
            qparams = _output(node, found, graph_module, modules, known)
        if isinstance(qparams, QParams):
            known[node] = qparams
        elif qparams is not None:
            tuples[node] = qparams
    return known


def _closed_outputs(
    node: fx.Node,
    found: ops.Match,
    modules: Modules,
    known: Mapping[fx.Node, QParams],
) -> Any:
    """The grids of what a closed int8 module (LSTM, attention) returns, nested as it returns them.

    None where it returns floats.
    """
    source = next((known[n] for n in node.all_input_nodes if n in known), None)
    if source is None or found.column != "int8" or node.op != "call_module":
        return None
    module: Any = modules[str(node.target)]

    def grid(inner: Any) -> QParams:
        low, high = source.container
        return qparams_of(inner.scale, inner.zero_point, low, high, source.dtype)

    if found.key == "multihead_attention":
        return grid(module.out_proj), grid(module.quant_attn_output_weights)

    def cell(layer: int) -> tuple[QParams | None, QParams | None]:
        own = module.layers[layer].layer_fw.cell
        if isinstance(own, fx.GraphModule):  # of the user's own parts
            values = next(n for n in own.graph.nodes if n.op == "output").args[0]
            inner = propagate(own)
            return inner.get(values[0]), inner.get(values[1])
        return grid(own.ogate_cy), grid(own.fgate_cx_igate_cgate)

    # Where tensors of several grids are joined, the first one's counts.
    return cell(-1)[0], cell(0)


def _output(
    node: fx.Node,
    found: ops.Match | None,
    graph_module: fx.GraphModule,
    modules: Modules,
    known: dict[fx.Node, QParams],
) -> QParams | None:
    source = next((known[n] for n in node.all_input_nodes if n in known), None)
    if source is None or found is None or node.op in ("output", "placeholder"):
        return None
    if found.key == "hold_range":
        limits: Any = node.args[1:]
        low, high = limits
        return source.with_range(max(low, source.quant_min), min(high, source.quant_max))
    rule = found.spec.output
    if rule in ("float", "none", "tuple") or found.column == "dynamic":
        return None
    if (
        rule == "shape" and found.key != "stack"
    ):  # also where a kernel takes a scale that it ignores (dropout)
        return source
    own = _own_qparams(node, graph_module, modules, source.dtype)
    if own is not None:
        return own
    if rule == "fixed" and found.spec.fixed is not None and source.storage != torch.int32:
        scale, point = found.spec.fixed
        low, high = source.container
        return QParams(scale, point + low, low, high, source.dtype)
    number = scalar(node, found)
    if number is not None:
        return scalar_qparams(found.key, number, source)
    out = bound(node).get("out")  # written to a tensor that has its qparams already
    if isinstance(out, fx.Node):
        return known[out] if out in known else tensor_weight(fetch(graph_module, out)).qparams
    if source.is_narrow and not _stays(node, found, graph_module, modules, known):
        source = source.with_range(*source.container)
    if found.key == ROUNDS_SCALE:
        return replace(source, scale=float(torch.tensor(source.scales[0]).float()))
    return source


def _stays(
    node: fx.Node,
    found: ops.Match,
    graph_module: fx.GraphModule,
    modules: Modules,
    known: Mapping[fx.Node, QParams],
) -> bool:
    """Whether a kernel on its input's grid gives no code outside of its inputs' range."""
    if found.spec.key in ("cat", "stack"):
        return len({known[n] for n in node.all_input_nodes if n in known}) == 1
    module = modules[str(node.target)] if node.op == "call_module" else None
    given = arguments(node, graph_module) if module is None else vars(module)
    return bool(found.spec.values) and given.get("divisor_override") is None


def _quantize_args(node: fx.Node, graph_module: fx.GraphModule, modules: Modules) -> QParams | None:
    if node.op == "call_module":
        module: Any = modules[str(node.target)]
        low, high = container_range(module.dtype)
        return qparams_of(module.scale, module.zero_point, low, high, module.dtype)
    names: tuple[str, ...] = ("input", "scale", "zero_point", "dtype")
    if node.target is torch.quantize_per_channel:
        names = ("input", "scales", "zero_points", "axis", "dtype")
    elif node.target is not torch.quantize_per_tensor:
        return None
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    scale, point = (fetch(graph_module, given[k]) for k in names[1:3])
    dtype: Any = given["dtype"]
    axis: Any = given.get("axis")
    if scale is None or point is None:  # chosen at run time
        return None
    return qparams_of(scale, point, *container_range(dtype), dtype, axis)


def _own_qparams(
    node: fx.Node,
    graph_module: fx.GraphModule,
    modules: Modules,
    dtype: torch.dtype,
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


def scalar(node: fx.Node, found: ops.Match | None) -> float | None:
    """The number that an int8 kernel adds or multiplies with; None for any other op.

    Args:
        node: A node.
        found: Its row of the op table.
    """
    if found is None or found.column != "int8" or found.spec.family != "element-wise":
        return None
    number = bound(node).get("b")  # the schemas' name for it, on either side
    return number if isinstance(number, (int, float)) else None


def scalar_qparams(key: str, scalar: float, source: QParams) -> QParams:
    """A kernel that adds or multiplies with a number keeps the codes and moves the grid.

    The kernels' rule depends on the scalar; rather than copy it, run the kernel on one value.

    Args:
        key: The kernel's name, "add" or "mul", with "_relu" behind it or not.
        scalar: The number.
        source: The grid of the other value.
    """
    scale, point = source.scales[0], int(source.zero_points[0])
    probe = torch.quantize_per_tensor(torch.zeros(1), scale, point, source.dtype)
    value = getattr(torch.ops.quantized, key)(probe, scalar)
    return qparams_of(value.q_scale(), value.q_zero_point(), *source.container, source.dtype)


def misplaced(graph_module: fx.GraphModule) -> list[tuple[str, str]]:
    """(node, problem) where floats and codes meet what takes the other: such a graph can't run.

    Args:
        graph_module: An int8 model.
    """
    modules, known = modules_of(graph_module), propagate(graph_module)
    unsure, problems = set(unread(graph_module)), []
    for node in graph_module.graph.nodes:
        found = ops.match_node(node, modules)
        if any(n.name in unsure for n in node.all_input_nodes) and node not in known:
            unsure.add(node.name)
            continue
        if found is None:
            continue
        codes = [n.name for n in node.all_input_nodes if n in known]
        island = node.op == "call_module" and isinstance(modules[str(node.target)], FloatIsland)
        if found.key == "quantize":
            if codes:
                problems.append((node.name, f"{node.name} quantizes the codes of {codes[0]}"))
        elif island and codes:
            problems.append((node.name, f"the float island {node.name} reads codes of {codes[0]}"))
        elif found.column == "spelled" and not found.spec.takes_codes and codes:
            said = f"{node.name} has no kernel for the codes of {codes[0]}"
            problems.append((node.name, said))
        elif found.column == "int8" and node in known and not codes:
            problems.append((node.name, f"the int8 kernel {node.name} reads no codes"))
        elif (floats := _float_operand(node, found, graph_module, known)) is not None:
            said = f"the int8 kernel {node.name} reads {floats.name}, which is no codes"
            problems.append((node.name, said))
    return problems


def unread(graph_module: fx.GraphModule) -> list[str]:
    """Names of nodes that read codes and are in no row of the op table.

    Args:
        graph_module: An int8 model.
    """
    modules, known = modules_of(graph_module), propagate(graph_module)
    called = ("call_module", "call_function", "call_method")
    return [
        node.name
        for node in graph_module.graph.nodes
        if node.op in called
        and ops.match_node(node, modules) is None
        and any(n in known for n in node.all_input_nodes)
    ]


def _float_operand(
    node: fx.Node, found: ops.Match, graph_module: fx.GraphModule, known: Mapping[fx.Node, QParams]
) -> fx.Node | None:
    """What an int8 kernel of two values reads that is a float tensor."""
    if found.column != "int8" or found.spec.family != "element-wise":
        return None
    given: list[fx.Node] = []
    fx.map_arg(node.args[: 1 if found.key.startswith("cat") else 2], given.append)
    for other in given:
        value = fetch(graph_module, other) if other.op == "get_attr" else None
        packed = isinstance(value, torch.Tensor) and value.is_quantized
        if other not in known and not packed:
            return other
    return None

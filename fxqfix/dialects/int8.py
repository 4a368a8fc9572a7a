"""Dialect "fx-int8": quantized kernels on quantized tensors.

Reads what `convert_fx` returns (lowered), and eager converted models once traced. Which nodes
carry quantized tensors follows from the op table's output rules; no data is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fxqfix import _torch, ops
from fxqfix.dialects._arguments import arguments, bound, fetch, output_arguments
from fxqfix.dialects._base import Modules, Reading, Tap, modules_of, op_name, scope, unique
from fxqfix.dialects._propagate import ROUNDS_SCALE, propagate, scalar
from fxqfix.dialects.site import Site
from fxqfix.dialects.weights import (
    WeightView,
    int8_weight,
    packed_weight,
    reference_weight,
    tensor_weight,
)
from fxqfix.errors import UnsupportedError
from fxqfix.inserted import round_to_grid
from fxqfix.qparams import QParams

__all__ = [
    "NAME",
    "arguments",
    "bound",
    "constant_weight",
    "declare",
    "declared",
    "fetch",
    "matches",
    "own_ranges",
    "propagate",
    "read",
    "weight_of",
]

NAME = "fx-int8"
PLACE = 50
_RANGES = "fxqfix_ranges"  # in GraphModule.meta: ranges that need no clamp, which no node shows


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
    holds = _holds(graph_module, modules)
    taken: set[str] = set()
    taps: list[Tap] = []
    hidden: list[tuple[Site, str]] = []
    for node in graph_module.graph.nodes:
        hidden += _hidden(node, graph_module, modules, taken)
        try:
            weight = weight_of(node, graph_module, modules)
        except UnsupportedError as error:
            site = Site(unique(f"{node.name}.weight", taken), "weight", *_place(node, graph_module))
            hidden.append((site, error.what))
            weight = None
        if weight is not None:
            taps.append(_weight_tap(node, weight, graph_module, modules, taken))
        if _is_constant(node):
            taps.append(_constant_tap(node, graph_module, modules, taken))
        elif node in qparams and node not in holds.values():
            tap = _value_tap(node, qparams, graph_module, modules, taken)
            taps.append(_held(tap, holds, qparams))
    return Reading(graph_module, NAME, tuple(taps), tuple(hidden), has_kernels=True)


def _is_constant(node: fx.Node) -> bool:
    """Whether a node quantizes a parameter or a buffer that an op takes: ``x * self.gain``."""
    source = node.all_input_nodes[0] if node.all_input_nodes else node
    return node.target is torch.quantize_per_tensor and source.op == "get_attr"


def constant_weight(graph_module: fx.GraphModule, node: fx.Node) -> WeightView:
    """The integer weight that a native quantize op makes of a constant.

    Args:
        graph_module: A reference or int8 model.
        node: A quantize op of it that reads a parameter or a buffer.
    """
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: fetch(graph_module, n))
    target: Any = node.target
    value = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
    found = tensor_weight(target(*args, **kwargs))
    return replace(found, values=None if value is None else value.detach())


def _constant_tap(
    node: fx.Node, graph_module: fx.GraphModule, modules: Modules, taken: set[str]
) -> Tap:
    """The weight that an op without packed weights takes; as in prepared models, named for it."""
    source, user = node.all_input_nodes[0], next(iter(node.users), node)
    weight = constant_weight(graph_module, node)
    site = Site(
        name=unique(f"{user.name}.weight", taken),
        kind="weight",
        module=scope(user, graph_module),
        op=op_name(user, modules),
        used=weight.qparams,
        source="graph",
        shape=tuple(weight.codes.shape),
    )
    return Tap(site, user, source, lambda: weight, quantizer=node)


def _value_tap(
    node: fx.Node,
    qparams: dict[fx.Node, QParams],
    graph_module: fx.GraphModule,
    modules: Modules,
    taken: set[str],
) -> Tap:
    found = ops.match_node(node, modules)
    # A quantize op is named for the value that it quantizes, a kernel for itself.
    is_function = found is not None and found.key == "quantize" and node.op == "call_function"
    producer = node.all_input_nodes[0] if is_function else node
    if producer.target is round_to_grid:
        producer = producer.all_input_nodes[0]
    module, op = _place(producer, graph_module)
    name = unique(producer.name, taken)
    known = declared(graph_module)
    used = qparams[node]
    site = Site(
        name=name,
        kind="activation",
        module=module,
        op="input" if _is_entry(node, found) else op,
        used=used.with_range(*known[name]) if name in known else used,
        source="kernel's arguments" if found and found.column == "int8" else "graph",
    )
    # Kept from the input: `propagate` hands on the very object, or the codes with a moved grid.
    kept = any(qparams.get(n) is qparams[node] for n in node.all_input_nodes)
    kept = kept or (found is not None and found.spec.output == "input" and _widened(node, qparams))
    moved = scalar(node, found) is not None or (found is not None and found.key == ROUNDS_SCALE)
    return Tap(site, node, producer, inherited=kept or moved)


def declare(graph_module: fx.GraphModule, ranges: Mapping[str, tuple[int, int]]) -> None:
    """Write down the ranges of sites that need no clamp to stay in them (restore-range)."""
    graph_module.meta[_RANGES] = {**declared(graph_module), **ranges}


def declared(graph_module: fx.GraphModule) -> dict[str, tuple[int, int]]:
    """What `declare` wrote down: site name -> range."""
    return dict(graph_module.meta.get(_RANGES, {}))


def own_ranges(reading: Reading) -> dict[str, tuple[int, int]]:
    """The ranges that a model holds or declares itself: those that restore-range restored."""
    return declared(reading.graph_module) | {
        tap.site.name: (tap.site.used.quant_min, tap.site.used.quant_max)
        for tap in reading.activations
        if tap.held is not None and tap.site.used is not None
    }


def _holds(graph_module: fx.GraphModule, modules: Modules) -> dict[fx.Node, fx.Node]:
    """Each value that nothing but a `hold_range` takes -> that node: the two are one site."""
    found: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        match = ops.match_node(node, modules)
        if match is not None and match.key == "hold_range" and len(node.args[0].users) == 1:
            found[node.args[0]] = node
    return found


def _widened(node: fx.Node, qparams: dict[fx.Node, QParams]) -> bool:
    """Whether a value is on the grid of a narrower input; its own would have the whole range."""
    ups = [qparams[n] for n in node.all_input_nodes if n in qparams]
    own = any(value is not None for value in output_arguments(node))
    return not own and any(q.is_narrow and q.same_grid(qparams[node]) for q in ups)


def _held(tap: Tap, holds: dict[fx.Node, fx.Node], qparams: dict[fx.Node, QParams]) -> Tap:
    node = tap.node
    while node in holds:
        node = holds[node]
    if node is tap.node:
        return tap
    return replace(tap, site=replace(tap.site, used=qparams[node]), node=node, held=tap.node)


def _place(node: fx.Node, graph_module: fx.GraphModule) -> tuple[str, str]:
    return scope(node, graph_module), op_name(node, modules_of(graph_module))


def _hidden(
    node: fx.Node, graph_module: fx.GraphModule, modules: Modules, taken: set[str]
) -> list[tuple[Site, str]]:
    """Sites that the graph does not show: chosen at run time, or inside a closed module."""
    found = ops.match_node(node, modules)
    place = _place(node, graph_module)
    if found is not None and found.column == "dynamic" and found.spec.family != "embedding":
        name = unique(f"{node.name}.input", taken)
        site = Site(name, "activation", *place, source="dynamic")
        return [(site, "qparams are chosen at run time (dynamic)")]
    if found is None or found.column != "int8" or node.op != "call_module":
        return []
    if found.spec.family not in ("recurrent", "attention"):
        return []
    module = modules[str(node.target)]
    reason = f"inside {type(module).__name__} {node.target!r}, which the graph does not open"
    sites = []
    for path, inner in module.named_modules():
        weight = int8_weight(inner) if path else None
        if weight is not None:
            name, where = unique(f"{node.name}.{path}.weight", taken), f"{node.target}.{path}"
            shape = tuple(weight.codes.shape)
            site = Site(name, "weight", where, found.key, weight.qparams, shape=shape)
            sites.append((site, reason))
    return sites


def _is_entry(node: fx.Node, found: ops.Match | None) -> bool:
    return found is not None and found.key == "quantize" and node.op == "call_module"


def _weight_tap(
    node: fx.Node,
    weight: WeightView,
    graph_module: fx.GraphModule,
    modules: Modules,
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


def weight_of(node: fx.Node, graph_module: fx.GraphModule, modules: Modules) -> WeightView | None:
    """The integer weight that a node computes with; None where it has none."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return int8_weight(module) or reference_weight(module)  # what was not lowered
    for arg in node.all_input_nodes if node.op == "call_function" else ():
        value = fetch(graph_module, arg) if arg.op == "get_attr" else None
        if not _torch.is_packed_params(value):
            continue
        weight = packed_weight(value)
        found = ops.match_node(node, modules)
        if weight is not None and found is not None and found.spec.key.endswith("1d"):
            # Packed as a convolution of two dimensions, the first of size 1.
            return replace(weight, codes=weight.codes.squeeze(2))
        return weight
    return None

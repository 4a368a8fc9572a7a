"""Dialect "fx-reference": torch.quantize_per_tensor / dequantize around float ops.

Reads what `convert_to_reference_fx` returns. The ops of this dialect carry no quant_min /
quant_max, so every site has its dtype's whole range: user report 003 in one sentence.
"""

from __future__ import annotations

import torch
from torch import fx

from fxqfix import _torch, ops
from fxqfix.dialects import int8
from fxqfix.dialects._base import Reading, Tap, modules_of, op_name, scope, unique
from fxqfix.dialects.decomposed import pinned_range
from fxqfix.dialects.site import Site
from fxqfix.dialects.weights import WeightView, reference_weight, tensor_weight
from fxqfix.inserted import FloatIsland

__all__ = ["NAME", "matches", "read"]

NAME = "fx-reference"
PLACE = 40

_DYNAMIC = torch.quantize_per_tensor_dynamic


def matches(graph_module: fx.GraphModule) -> bool:
    """True where values are quantized natively but no kernel runs on quantized tensors.

    The lowered dialect has the same quantize ops, but kernels between them; here every quantized
    value goes straight into a dequantize.
    """
    modules = modules_of(graph_module)
    if any(isinstance(m, FloatIsland) for m in modules.values()):
        return False
    quantizes = [
        node
        for node in graph_module.graph.nodes
        if node.target in (torch.quantize_per_tensor, torch.quantize_per_channel, _DYNAMIC)
    ]
    if not quantizes:
        return any(_torch.is_reference_module(m) for m in graph_module.modules()) and not any(
            "quantized_decomposed" in str(n.target) for n in graph_module.graph.nodes
        )
    if any(
        (found := ops.match_node(n, modules)) is not None and found.column == "int8"
        for n in graph_module.graph.nodes
    ):
        return False
    users = [user for node in quantizes for user in node.users]
    return bool(users) and all(_is_dequantize(user) for user in users)


def _is_dequantize(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "dequantize"


def read(graph_module: fx.GraphModule) -> Reading:
    """Read every native quantize op and every reference module's weight as a site."""
    modules = modules_of(graph_module)
    qparams = int8.propagate(graph_module)
    taken: set[str] = set()
    taps: list[Tap] = []
    hidden: list[tuple[Site, str]] = []
    for node in graph_module.graph.nodes:
        if node.target is _DYNAMIC:
            place = scope(node, graph_module), op_name(node.all_input_nodes[0], modules)
            name = unique(node.all_input_nodes[0].name, taken)
            site = Site(name, "activation", *place, source="dynamic")
            hidden.append((site, "qparams are chosen at run time (dynamic)"))
        if node.op == "call_module":
            weight = reference_weight(modules[str(node.target)])
            if weight is not None:
                taps.append(_weight_tap(graph_module, node, weight, taken))
        if node.target not in (torch.quantize_per_tensor, torch.quantize_per_channel):
            continue
        if node.args[0].op == "get_attr":
            taps.append(_functional_weight(graph_module, node, taken))
        elif node in qparams:
            producer, used = node.all_input_nodes[0], qparams[node]
            limits = None
            if used.axis is None:
                limits = pinned_range(producer, used.scales[0], int(used.zero_points[0]))
            least, most = used.container
            if limits is not None and least <= limits[0] and limits[1] <= most:  # by pin-ranges
                producer, used = producer.all_input_nodes[0], used.with_range(*limits)
            site = Site(
                name=unique(producer.name, taken),
                kind="activation",
                module=scope(producer, graph_module),
                op=op_name(producer, modules),
                used=used,
                source=f"{node.target.__name__} (no quant_min / quant_max)",
            )
            taps.append(Tap(site, node, producer))
    return Reading(graph_module, NAME, tuple(taps), tuple(hidden))


def _weight_tap(
    graph_module: fx.GraphModule, node: fx.Node, weight: WeightView, taken: set[str]
) -> Tap:
    site = Site(
        name=unique(f"{node.name}.weight", taken),
        kind="weight",
        module=scope(node, graph_module),
        op=op_name(node, modules_of(graph_module)),
        used=weight.qparams,
        source="reference module",
        shape=tuple(weight.codes.shape),
    )
    return Tap(site, node, node, lambda: weight)


def _functional_weight(graph_module: fx.GraphModule, node: fx.Node, taken: set[str]) -> Tap:
    given = [int8.fetch(graph_module, a) if isinstance(a, fx.Node) else a for a in node.args]
    weight = tensor_weight(node.target(*given))  # type: ignore[operator]  # a call_function node
    user = next(iter(next(iter(node.users)).users))
    tap = _weight_tap(graph_module, user, weight, taken)
    return Tap(tap.site, user, node, tap.weight)

"""Values that a graph computes from its own parameters and buffers alone: scaled weights, say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxqfix import ops
from fxqfix.dialects.int8 import fetch

__all__ = ["bias_node", "bias_of", "constant", "constants", "reader", "role"]


def constants(graph_module: fx.GraphModule) -> frozenset[fx.Node]:
    """The get_attr nodes, and the functions of nothing but those."""
    found: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        inputs = node.all_input_nodes
        computed = node.op == "call_function" and inputs and found.issuperset(inputs)
        name = str(getattr(node.target, "__name__", "")).partition(".")[0]
        if computed and name.endswith("_"):  # a counter that is counted up in place
            continue
        if node.op == "get_attr" or computed:
            found.add(node)
    return frozenset(found)


def constant(graph_module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The value of one of `constants`, computed now; nothing is stored."""
    with torch.no_grad():
        value: Tensor = _value(graph_module, node)
    return value.detach()


def _value(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    if node.op == "get_attr":
        return fetch(graph_module, node)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _value(graph_module, n))
    target: Any = node.target
    return target(*args, **kwargs)


def reader(node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node:
    """The op that computes with a quantized constant: behind reshapes of it."""
    current = node
    while current.users:
        current = next(iter(current.users))
        found = ops.match_node(current, modules)
        if found is None or found.spec.output != "shape":
            break
    return current


def role(node: fx.Node, user: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """What a constant is to the op that reads it: "weight", "bias", or else "constant"."""
    while user not in node.users and node.users:
        node = next(iter(node.users))
    found = ops.match_node(user, modules)
    family = found.spec.family if found is not None else ""
    places = {"weighted": ("", "weight", "bias"), "embedding": ("weight",)}.get(family, ())
    named = dict(zip(user.args, places, strict=False)) if user.op == "call_function" else {}
    return named.get(node) or "constant"


def bias_of(user: fx.Node, graph_module: fx.GraphModule) -> Tensor | None:
    """The float bias that a convolution or linear of constants takes; None without one.

    One that is quantized is a site of its own.
    """
    node = bias_node(user)
    if node is None or node not in constants(graph_module):
        return None
    value = constant(graph_module, node)
    return value if value.is_floating_point() else None


def bias_node(user: fx.Node) -> fx.Node | None:
    """The argument of a convolution or linear that is its bias; None without one."""
    found = ops.match_node(user, {}) if user.op == "call_function" else None
    if found is None or found.spec.family != "weighted":
        return None
    given = user.args[2] if len(user.args) > 2 else user.kwargs.get("bias")
    return given if isinstance(given, fx.Node) else None

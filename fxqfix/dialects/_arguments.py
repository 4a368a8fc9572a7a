"""The arguments of a node's call by name, whichever way it is spelled, and fetched constants."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxqfix import _torch

__all__ = ["arguments", "bound", "fetch", "output_arguments"]


def fetch(graph_module: fx.GraphModule, value: Any) -> Any:
    """The value of a get_attr node; anything else as it is."""
    if not isinstance(value, fx.Node):
        return value
    if value.op != "get_attr":
        return None
    owner, _, name = str(value.target).rpartition(".")
    return getattr(graph_module.get_submodule(owner), name)


def output_arguments(node: fx.Node) -> tuple[Any, Any]:
    """The (scale, zero point) arguments of a torch.ops.quantized call; (None, None) without."""
    given = bound(node)
    scale = next((v for n, v in given.items() if n.removesuffix("_i").endswith("scale")), None)
    point = next((v for n, v in given.items() if n.removesuffix("_i").endswith("zero_point")), None)
    return (None, None) if scale is None or point is None else (scale, point)


def bound(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by name, under the first signature of its target that takes them.

    Only int8 kernels are asked: {} for modules, methods and float functions.
    """
    if "quantized." not in str(node.target):
        return {}
    for names, required, tensors, _ in _signatures(node.target):
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        fits = len(node.args) <= len(names) and given.keys() <= set(names)
        numbers = [n for n in tensors & given.keys() if isinstance(given[n], (int, float))]
        if fits and required <= given.keys() and not numbers:
            return given
    return {}


def arguments(node: fx.Node, graph_module: fx.GraphModule) -> dict[str, Any]:
    """A call's arguments by name, of any function or method; constants are fetched.

    Values of the graph stay nodes, but for get_attr nodes. {} for a module, and for a function
    whose signature nobody knows.
    """
    given = bound(node) or _python_arguments(node)
    return {
        name: fetch(graph_module, value)
        if isinstance(value, fx.Node) and value.op == "get_attr"
        else value
        for name, value in given.items()
    }


def _python_arguments(node: fx.Node) -> dict[str, Any]:
    """By the signature of a Python function, or of the aten op behind a builtin or a method."""
    if node.op == "call_method":
        target: Any = getattr(torch.ops.aten, str(node.target), None)
    elif node.op == "call_function":
        target = node.target
    else:
        return {}
    dispatched = _dispatched(target)
    if dispatched is not None:
        target = dispatched
    if not hasattr(target, "overloads"):  # an aten op's own signature is (*args, **kwargs)
        with contextlib.suppress(TypeError, ValueError):
            return dict(inspect.signature(target).bind(*node.args, **node.kwargs).arguments)
    target = getattr(torch.ops.aten, getattr(target, "__name__", ""), target)
    for names, required, _, positional in _signatures(target):
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        # The functions say input where the schemas say self.
        given = {"self" if k == "input" and "self" in names else k: v for k, v in given.items()}
        fits = len(node.args) <= positional and required <= given.keys() <= set(names)
        if fits:
            return given
    return {}


def _dispatched(target: Any) -> Any:
    """Of a pool that may return indices: the function without them, which has the signature."""
    name = getattr(target, "__name__", "")
    if "max_pool" not in name or getattr(torch.nn.functional, name, None) is not target:
        return None
    return _torch.resolve(f"torch.nn.functional.{name}_with_indices")


def _signatures(target: Any) -> Iterator[tuple[list[str], set[str], set[str], int]]:
    """(names, those without a default, those of type Tensor, number of positional ones)."""
    for overload in getattr(target, "overloads", list)():
        arguments = getattr(target, overload)._schema.arguments
        names = [a.name for a in arguments]
        required = {a.name for a in arguments if not a.has_default_value()}
        tensors = {a.name for a in arguments if str(a.type) == "Tensor"}
        yield names, required, tensors, sum(not a.kwarg_only for a in arguments)

"""Whether a graph may draw random numbers, so that its branches need streams of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import fx, nn

from fxqfix.dialects._base import modules_of
from fxqfix.dialects._modes import trains

__all__ = ["draws", "draws_in"]

_WORDS = ("dropout", "rand", "bernoulli", "multinomial", "normal_", "rrelu", "attention", "gumbel")
_KNOWN = ("torch", "_operator", "builtins", "math", "fxqfix")


def draws(model: fx.GraphModule) -> bool:
    """True where any node may draw; code that is not torch's own always may.

    Args:
        model: A graph module; train or eval mode of its modules counts.
    """
    return any(True for _ in draws_in(model))


def draws_in(model: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes that may draw."""
    modules = modules_of(model)
    return (node for node in model.graph.nodes if _node_draws(node, modules))


def _node_draws(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        parts = list(modules[str(node.target)].modules())
        foreign = any(not type(m).__module__.startswith(_KNOWN) for m in parts)
        return foreign or any(m.training and _telling(type(m).__name__) for m in parts)
    if node.op == "call_method":
        return _telling(str(node.target))
    if node.op != "call_function":
        return False
    own = str(getattr(node.target, "__module__", None) or "torch")
    name = str(getattr(node.target, "__name__", node.target))
    if getattr(node.target, "namespace", "") == "aten" and "dropout" in name:
        return trains(node)  # ATen's dropout is told, a function's may have its default
    return not own.startswith(_KNOWN) or _telling(name)


def _telling(name: str) -> bool:
    return any(word in name.lower() for word in _WORDS) or name == "normal"

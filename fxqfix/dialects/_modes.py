"""Ops that act as in training, whatever mode the module is in: their call says so."""

from __future__ import annotations

from torch import fx

__all__ = ["trains"]


def trains(node: fx.Node) -> bool:
    """True for a call of dropout or batch_norm that was traced with training=True."""
    name = str(getattr(node.target, "__name__", ""))
    if node.op != "call_function" or not ("dropout" in name or "batch_norm" in name):
        return False
    if "training" in node.kwargs:
        return node.kwargs["training"] is True
    place = 2 if "dropout" in name else 5
    return len(node.args) > place and node.args[place] is True

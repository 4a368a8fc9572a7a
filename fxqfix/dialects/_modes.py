"""Ops that act as in training, whatever mode the module is in: their call says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

__all__ = ["drops", "in_eval", "trains"]

_DROPOUT, _BATCH_NORM = 2, 5  # where the argument stands


def drops(node: fx.Node) -> bool:
    """True for a call of dropout that was traced with training=True."""
    return "dropout" in str(getattr(node.target, "__name__", "")) and trains(node)


def in_eval(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of dropout, with training off."""
    if "training" in kwargs:
        return args, {**kwargs, "training": False}
    return (*args[:_DROPOUT], False, *args[_DROPOUT + 1 :]), dict(kwargs)


def trains(node: fx.Node) -> bool:
    """True for a call of dropout or batch_norm that was traced with training=True."""
    name = str(getattr(node.target, "__name__", ""))
    if node.op != "call_function" or not ("dropout" in name or "batch_norm" in name):
        return False
    if "training" in node.kwargs:
        return node.kwargs["training"] is True
    place = _DROPOUT if "dropout" in name else _BATCH_NORM
    return len(node.args) > place and node.args[place] is True

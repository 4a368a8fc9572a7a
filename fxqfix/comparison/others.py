"""Float constants and layers of a converted model that hold other values than the prepared ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxqfix import _torch
from fxqfix.dialects._base import modules_of

__all__ = ["others"]

_FLOAT = 2.0**-18  # relative: folding BatchNorm in another order moves a bias by less


def others(
    prepared: fx.GraphModule, converted: fx.GraphModule, unfolded: fx.GraphModule
) -> dict[str, Any]:
    """By node of the prepared graph: the converted constant, or the converted layer in float64.

    Only of one name, of one shape and of no integers: what is quantized is a weight, and a site.

    Args:
        prepared: The prepared graph, frozen, BatchNorm folded.
        converted: The converted one.
        unfolded: The prepared one before BatchNorm was folded: what it holds too is compared to
            the bit.
    """
    found: dict[str, Any] = {}
    mine, theirs, before = (modules_of(m) for m in (prepared, converted, unfolded))
    for node in prepared.graph.nodes:
        target = str(node.target)
        if node.op == "get_attr":
            value = _attribute(theirs, target)
            own = _attribute(mine, target)
            if _apart(own, value, _same(own, _attribute(before, target))):
                found[node.name] = value
        elif node.op == "call_module" and target in theirs:
            a, b = mine[target], theirs[target]
            plain = type(a) is type(b) and not any(map(_torch.is_quantizer, a.modules()))
            if plain and _states_apart(a, b, before.get(target)):
                found[node.name] = copy.deepcopy(b).double().eval()
    return found


def _attribute(modules: Mapping[str, nn.Module], target: str) -> Any:
    parent, _, name = target.rpartition(".")
    return getattr(modules.get(parent), name, None)


def _same(mine: Any, before: Any) -> bool:
    return isinstance(mine, Tensor) and isinstance(before, Tensor) and torch.equal(mine, before)


def _apart(mine: Any, theirs: Any, exactly: bool) -> bool:
    if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor) or mine.shape != theirs.shape:
        return False
    if not (mine.is_floating_point() and theirs.is_floating_point()) or mine.is_quantized:
        return False
    a, b = mine.detach().double(), theirs.detach().double().to(mine.device)
    differs = (a != b) & ~(a.isnan() & b.isnan())
    if differs.any() and not exactly:
        differs = (a - b).abs() > _FLOAT * a.abs().max()
    return bool(differs.any())


def _states_apart(mine: nn.Module, theirs: nn.Module, before: nn.Module | None) -> bool:
    a, b, old = (
        {**dict(m.named_parameters()), **dict(m.named_buffers())} if m is not None else {}
        for m in (mine, theirs, before)
    )
    return a.keys() == b.keys() and any(
        _apart(a[name], b[name], _same(a[name], old.get(name))) for name in a
    )

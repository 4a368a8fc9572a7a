"""Asking observers and fake-quants for their qparams, without a change to them."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fxqfix._torch import resolve

__all__ = ["Answers", "answers", "fused_qparams", "light_copy"]

_ASKING = ("FakeQuantize", "FusedMovingAvgObsFakeQuantize")  # their observer
_OBSERVERS = ("MinMaxObserver", "PerChannelMinMaxObserver")

# By id of the module: scale and zero point.
Answers = dict[int, tuple[Tensor, Tensor]]


def light_copy(module: nn.Module) -> nn.Module:
    """A copy with tensors and submodules of its own; a tenth of the time of copy.deepcopy.

    Other attributes are shared: enough for asking observers, which set attributes but don't change
    the objects in them.
    """
    copied = module.__new__(type(module))
    held = dict(module.__dict__)
    for name in ("_buffers", "_parameters"):
        held[name] = {k: v if v is None else _clone(v) for k, v in held[name].items()}
    held["_modules"] = {k: m if m is None else light_copy(m) for k, m in module._modules.items()}
    copied.__dict__ = held
    return copied


def _clone(tensor: Tensor) -> Tensor:
    return (tensor.detach() if tensor.requires_grad else tensor).clone()


def fused_qparams(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and zero point that a fused fake-quant uses: its own kernel picks them.

    The kernel recomputes both from the running min/max at every forward, by rules that differ from
    the Python observer's `calculate_qparams`, so neither the module's buffers nor the observer
    can be asked.

    Args:
        module: A copy of the user's fake-quant; it is changed.
    """
    probe: Any = module
    low: Tensor = probe.activation_post_process.min_val
    shape = [1]
    if probe.is_per_channel:
        axis = int(probe.ch_axis)
        shape = [1] * max(axis + 1, 2)  # the kernel takes no vector here
        shape[axis] = low.numel()
    vars(probe)["training"] = False
    probe.observer_enabled.zero_()
    probe.fake_quant_enabled.fill_(1)
    with torch.no_grad():
        probe(torch.zeros(shape, device=low.device))
    return probe.scale, probe.zero_point


def answers(modules: Iterable[nn.Module]) -> Answers:
    """What `calculate_qparams` of many observers and fake-quants returns, in a few calls.

    torch's formula goes element by element: of observers with the same settings, the ranges go
    through it as the channels of one. Left out is who has another formula, or no range.

    Args:
        modules: Any modules; they are only read.
    """
    observers: dict[int, nn.Module] = {}
    askers: dict[int, int] = {}
    for module in modules:
        if _formula(type(module)) in _formulas(*_OBSERVERS):
            observers[id(module)] = module
        elif _formula(type(module)) in _formulas(*_ASKING):
            askers[id(module)] = id(module.activation_post_process)
    groups: defaultdict[Hashable, list[Any]] = defaultdict(list)
    for observer in observers.values():
        groups[_settings(observer)].append(observer)
    found: Answers = {}
    for group in groups.values():
        found.update(zip(map(id, group), _together(group), strict=False))
    found.update({asker: found[own] for asker, own in askers.items() if own in found})
    return found


def _formula(kind: type) -> tuple[Any, Any]:
    """What a class computes qparams by: equal to torch's own where nothing of it is overridden."""
    return getattr(kind, "calculate_qparams", None), getattr(kind, "_calculate_qparams", None)


@functools.cache
def _formulas(*names: str) -> frozenset[tuple[Any, Any]]:
    kinds = [resolve(f"torch.ao.quantization.{name}") for name in names]
    return frozenset(_formula(kind) for kind in kinds if kind is not None)


def _settings(observer: Any) -> Hashable:
    """All that the formula may depend on, but the range."""
    low: Tensor = observer.min_val
    plain = tuple((k, v) for k, v in vars(observer).items() if k[0] != "_")
    found = type(observer), float(observer.eps), low.numel() > 0, low.dtype, low.device, plain
    try:
        hash(found)
    except TypeError:  # a subclass with attributes of its own
        return id(observer)
    return found


def _together(observers: list[Any]) -> Iterable[tuple[Tensor, Tensor]]:
    """The formula once for all; nothing where a range is none, which torch's formula has to say."""
    sizes = [observer.min_val.numel() for observer in observers]
    low = torch.cat([observer.min_val.detach().reshape(-1) for observer in observers])
    high = torch.cat([observer.max_val.detach().reshape(-1) for observer in observers])
    if not low.numel() or not bool(((low <= high) & low.isfinite() & high.isfinite()).all()):
        return ()
    with torch.no_grad():
        first: Any = light_copy(observers[0])
        scale, point = first._calculate_qparams(low, high)
    return zip(scale.split(sizes), point.split(sizes), strict=True)

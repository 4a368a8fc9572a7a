"""Deep copies of models: what copy.deepcopy makes, in about half of its time."""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

__all__ = ["deep_copy"]

M = TypeVar("M", bound=nn.Module)

# What copy.deepcopy shares, and torch's constants, which it finds out to share by pickling them.
_SHARED = frozenset(
    {
        *(type(None), bool, int, float, str, type, FunctionType, BuiltinFunctionType),
        *(torch.dtype, torch.qscheme, torch.memory_format),
    }
)


def deep_copy(model: M) -> M:
    """What ``copy.deepcopy(model)`` makes.

    A module is some thirty attributes, most of them numbers and empty dicts of hooks, and
    copy.deepcopy asks each anew how it is to be copied. Here the modules are copied first, and
    copy.deepcopy finds them done; it copies whatever is no plain module itself.

    Args:
        model: Any module; it is only read.

    Returns:
        The copy.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> copied = deep_copy(model)
        >>> copied[0].weight is model[0].weight, torch.equal(copied[0].weight, model[0].weight)
        (False, True)
    """
    memo: dict[int, Any] = {}
    try:
        states = {id(module): (module, state) for module, state in _plain_modules(model, set())}
        for key, (module, _) in states.items():
            memo[key] = type(module).__new__(type(module))
        for key, (_, state) in states.items():
            memo[key].__setstate__(_copied(state, memo))
        return copy.deepcopy(model, memo)
    except Exception:
        # Modules that hold their owner want the owner first. What can't be copied at all says so
        # in copy.deepcopy's own words.
        return copy.deepcopy(model)


def _plain_modules(module: nn.Module, seen: set[int]) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """Modules that are copied by their attributes, with those; inner ones first."""
    if id(module) in seen:
        return
    seen.add(id(module))
    graph = getattr(type(module), "__deepcopy__", None) is fx.GraphModule.__deepcopy__
    state = None if graph else _state(module)
    if not graph and state is None:
        return  # it copies itself, and what is inside
    for child in module._modules.values():
        if child is not None:
            yield from _plain_modules(child, seen)
    if state is not None:
        yield module, state


def _state(module: nn.Module) -> dict[str, Any] | None:
    """The attributes, where they are all that a copy is made of."""
    kind: Any = type(module)
    if hasattr(kind, "__deepcopy__") or kind in copyreg.dispatch_table:
        return None
    if "__deepcopy__" in vars(module):
        return None
    made: Any = module.__reduce_ex__(4)
    plain = made[:2] == (copyreg.__newobj__, (kind,))  # type: ignore[attr-defined]  # not in stubs
    return made[2] if plain and type(made[2]) is dict and not any(made[3:]) else None


def _copied(state: dict[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    return {name: _value(value, memo) for name, value in state.items()}


def _value(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _SHARED:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind in (dict, OrderedDict) and all(type(key) is str for key in value):
        made = memo[id(value)] = kind()
        for key, inner in value.items():
            made[key] = _value(inner, memo)
        return made
    if kind is Tensor and _plain_tensor(value):
        memo[id(value)] = made = value.new_empty(0)
        # The memo knows storages too: views of one memory stay that.
        storage = copy.deepcopy(value.untyped_storage(), memo)
        return made.set_(storage, value.storage_offset(), value.size(), value.stride())
    return copy.deepcopy(value, memo)


def _plain_tensor(value: Tensor) -> bool:
    """Whether memory, shape and strides are all that there is."""
    flags = value.requires_grad, value.is_quantized, value.is_complex(), value.is_inference()
    known = value.layout == torch.strided and value.device.type in ("cpu", "cuda")
    return known and not any(flags) and not value.is_neg() and not vars(value)

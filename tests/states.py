"""What a model is, down to its bits, so that a test can tell whether anything touched it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

# Of a module's __dict__, what the fingerprint reads by other means or what is no state.
_ELSEWHERE = {"_parameters", "_buffers", "_modules", "training"}


def bits(value: Tensor) -> tuple[Any, ...]:
    """A tensor as something that only equal bits are equal to (NaN included)."""
    kind = (value.dtype, tuple(value.shape), value.stride(), value.requires_grad)
    if value.is_quantized:
        own = value.int_repr()
        grid: Any = ()
        if value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            grid = (value.q_scale(), value.q_zero_point())
        return (*kind, own.numpy().tobytes(), grid)
    return (*kind, value.detach().clone().contiguous().numpy().tobytes())


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that an analysis must leave alone, by name.

    Parameters and buffers (also those that no state_dict holds), training flags, hooks, plain
    attributes and classes of every module; for a graph module the graph's text and code as well.
    """
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"{path}:class"] = type(module)
        found[f"{path}:training"] = module.training
        for kind in ("_parameters", "_buffers"):
            for name, value in getattr(module, kind).items():
                found[f"{path}.{name}"] = None if value is None else bits(value)
        found[f"{path}:children"] = [(n, id(m)) for n, m in module.named_children()]
        for name, value in vars(module).items():
            if name not in _ELSEWHERE:
                found[f"{path}:{name}"] = _plain(value)
        if isinstance(module, fx.GraphModule):
            found[f"{path}:graph"] = [
                (n.format_node(), n.name, repr(sorted(n.meta, key=str))) for n in module.graph.nodes
            ]
            found[f"{path}:code"] = module.code
    return found


def _plain(value: Any) -> Any:
    """Plain data and tensors by value, containers entry by entry, anything else by identity."""
    if isinstance(value, Tensor):
        return bits(value)
    if isinstance(value, (int, float, str, bool, type(None), torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    return id(value)


def same(a: Any, b: Any) -> bool:
    """Equal outputs: the same nesting, and equal bits of every tensor."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and bits(a)[4:] == bits(b)[4:] and a.shape == b.shape
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


def run(model: nn.Module, *args: Any, seed: int | None = None) -> Any:
    """Run a copy of a model on copies of its inputs, so that neither changes."""
    own = copy.deepcopy(model)
    if seed is not None:
        torch.manual_seed(seed)
    with torch.no_grad():
        return own(*copy.deepcopy(args))

"""What authors of passes need: a pass held to what every pass promises."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxqfix import _rng, _torch
from fxqfix.errors import PassError
from fxqfix.measure import tensors_of
from fxqfix.passes import Pass, PassResult

__all__ = ["check_pass"]


def check_pass(step: Pass, model: nn.Module, *inputs: Any, same_bits: bool = True) -> PassResult:
    """Run a pass, and hold it to what every pass promises.

    Its name is kebab-case, and it equals its copy. The model stays as it is (graph, parameters,
    buffers, modes), and so does the random state. `modified` is whether there are edits. Run on its
    own result, the pass edits nothing. The result computes what the model does, to the bit.

    Args:
        step: The pass.
        model: What it is run on; it is not changed, or the check fails.
        inputs: Positional arguments of the model, of any shape; without any, outputs are not
            compared. Models and inputs are copied before they run.
        same_bits: Whether the pass promises to change no output bit.

    Returns:
        What the pass returned.

    Raises:
        PassError: A promise is broken; the message says which.

    Example:
        >>> from fxqfix.passes import FoldBatchNorm
        >>> result = check_pass(FoldBatchNorm(), fx.symbolic_trace(nn.ReLU()), torch.ones(2))
        >>> result.modified
        False
    """
    _hold(step, bool(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", step.name)), "its name is kebab-case")
    _hold(step, copy.copy(step) == step, "it equals its copy")
    state, random = _state(model), torch.get_rng_state()
    result = step(model)
    _hold(step, _equal(state, _state(model)), "the model that it is given stays as it is")
    _hold(step, torch.equal(random, torch.get_rng_state()), "the random state stays as it is")
    _hold(step, result.modified == bool(result.edits), "modified says whether there are edits")
    again = step(result.graph_module).edits
    _hold(step, not again, "run on its own result, it edits nothing", found=again)
    if inputs and same_bits:
        wanted, found = (_outputs(m, inputs) for m in (model, result.graph_module))
        _hold(step, _equal(wanted, found), "the result computes the same bits")
    return result


def _hold(step: Pass, kept: bool, promise: str, found: object = None) -> None:
    if not kept:
        raise PassError("a promise is broken", where=step.name, expected=promise, found=found)


def _state(model: nn.Module) -> list[Any]:
    """Whatever a pass could change, copied."""
    state: list[Any] = [(path, m.training) for path, m in model.named_modules()]
    tensors = (*model.named_parameters(), *model.named_buffers())
    state += [item for name, value in tensors for item in (name, value.detach().clone())]
    if isinstance(model, fx.GraphModule):
        state += [str(node.format_node()) for node in model.graph.nodes] + [model.code]
    return state


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """What a copy of the model gives for copies of the inputs; the random state is put back."""
    with torch.no_grad(), _rng.same_rng():
        given = _torch.tree_map_tensors(Tensor.clone, inputs)
        return list(tensors_of([copy.deepcopy(model)(*given)]))


def _equal(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if a.is_floating_point():
        return torch.equal(a.nan_to_num(0), b.nan_to_num(0)) and torch.equal(a.isnan(), b.isnan())
    return torch.equal(a, b)

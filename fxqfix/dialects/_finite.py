"""Parameters that are NaN or inf: a quantized model has no code for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxqfix import _torch
from fxqfix.errors import NonFiniteError

__all__ = ["non_finite", "refuse_non_finite"]


def non_finite(model: Any) -> Iterator[tuple[str, str]]:
    """(path, how many values) of parameters with NaN or inf; masks of -inf are none.

    Args:
        model: A module or an exported program; what its observers hold is not looked at.
    """
    for path, tensor, strict in _tensors(model):
        if type(tensor) not in (Tensor, nn.Parameter):  # another tool's, which are refused by name
            continue
        if not tensor.is_floating_point() or tensor.is_quantized or tensor.is_meta:
            continue
        bad = ~torch.isfinite(tensor) if strict else torch.isnan(tensor)
        if bool(bad.any()):
            yield path, f"{int(bad.sum())} of {tensor.numel()} values are NaN or inf"


def _tensors(model: Any) -> Iterator[tuple[str, Tensor, bool]]:
    """Path, value, and whether inf counts: in parameters and in statistics of BatchNorm."""
    if not isinstance(model, nn.Module):
        state = getattr(model, "state_dict", None)  # an exported program's is no method
        for path, tensor in state.items() if isinstance(state, Mapping) else ():
            yield path, tensor, isinstance(tensor, nn.Parameter)
        return
    inside: str | None = None  # a quantizer's own state, which readers judge
    for path, module in model.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        inside = f"{path}." if _torch.is_quantizer(module) else None
        if inside is not None:
            continue
        prefix = f"{path}." if path else ""
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{prefix}{name}", parameter.detach(), True
        for name, buffer in module.named_buffers(recurse=False):
            yield f"{prefix}{name}", buffer, isinstance(module, _torch.BATCH_NORM)


def refuse_non_finite(model: Any, where: str) -> None:
    """Raise where a parameter is NaN or inf.

    Args:
        model: What the call was given.
        where: The call.

    Raises:
        NonFiniteError: The first one by name.
    """
    for path, found in non_finite(model):
        raise NonFiniteError(
            f"{path!r} holds NaN or inf",
            where=where,
            found=found,
            expected="finite weights",
            remedy="go back to a checkpoint from before training diverged; a quantized model has "
            "no code for NaN",
        )

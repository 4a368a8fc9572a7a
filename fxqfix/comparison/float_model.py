"""The float model that a user names, and what a prepared model computes without its quantizers."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxqfix import _torch, dialects
from fxqfix.dialects._wrappers import unwrapped
from fxqfix.errors import DialectError, PairingError, TraceError

__all__ = ["float_model_of", "in_float"]


def float_model_of(model: Any, where: str) -> nn.Module:
    """The float model without its wrappers.

    Args:
        model: What the user named.
        where: Who asks, for messages.

    Raises:
        PairingError: It is no module, or is quantized.
    """
    inner = unwrapped(model)
    if not isinstance(inner, nn.Module):
        raise PairingError(
            "the float model is no module", where=where, found=type(inner).__name__,
            expected="the torch.nn.Module that was given to prepare",
        )  # fmt: skip
    found = next((f"{type(m).__name__} at {p!r}" for p, m in _quantizers(inner)), "")
    if not found:
        try:
            found = f"a model of dialect {dialects.read(inner, where).dialect}"
        except (DialectError, TraceError):  # nothing quantizes, or nobody can look
            return inner
    raise PairingError(
        "the float model is quantized",
        where=where,
        found=found,
        expected="the model that was given to prepare, before it",
    )


def _quantizers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, m) for path, m in model.named_modules() if _torch.is_quantizer(m)]


def in_float(model: fx.GraphModule) -> fx.GraphModule:
    """A copy in eval mode that neither observes nor quantizes.

    Args:
        model: A prepared graph.

    Example:
        >>> import torch
        >>> from torch.ao.quantization import FakeQuantize
        >>> from fxqfix import trace
        >>> plain = in_float(trace(nn.Sequential(FakeQuantize())))
        >>> plain(torch.tensor([0.1234]))
        tensor([0.1234])
    """
    found = _torch.copied(model)
    for module in found.modules():
        module.training = False  # an exported one refuses `eval`
        for name, part in list(module._modules.items()):
            if _torch.is_quantizer(part):  # one can stand under two names
                module._modules[name] = nn.Identity()
    return found

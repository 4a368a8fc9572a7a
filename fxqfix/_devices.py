"""Where a model lies, and copies of it elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from fxqfix.errors import DeviceError, UnsupportedError

__all__ = ["CPU", "check_int8", "device_of", "on_cpu"]

CPU = torch.device("cpu")


def device_of(model: nn.Module, where: str = "") -> torch.device:
    """The device of a model's parameters and buffers; the CPU where it has none.

    Args:
        model: The model.
        where: Who asks, for messages.

    Raises:
        DeviceError: Parts of it lie on several devices.

    Example:
        >>> device_of(nn.Linear(2, 2))
        device(type='cpu')
    """
    found: dict[torch.device, str] = {}
    for name, tensor in _tensors(model):
        # Integers may stay behind: the switches of a fake-quant, which its kernel reads anywhere.
        if tensor.is_floating_point():
            found.setdefault(tensor.device, name)
    if len(found) > 1:
        parts = ", ".join(f"{name!r} on {device}" for device, name in found.items())
        first = next(device for device in found if device != CPU)
        raise DeviceError(
            "the model's parts lie on several devices",
            where=where,
            found=parts,
            expected="one device",
            remedy=f"move all of it: model.to({str(first)!r}), or model.cpu()",
        )
    return next(iter(found), None) or next((t.device for _, t in _tensors(model)), CPU)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def on_cpu(model: nn.Module, where: str = "") -> nn.Module:
    """The model, or a copy of it on the CPU where it lies elsewhere.

    Args:
        model: The model; it is not changed.
        where: Who asks, for messages.

    Raises:
        UnsupportedError: torch can't copy it.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> on_cpu(net) is net
        True
    """
    if device_of(model, where) == CPU:
        return model
    try:
        return copy.deepcopy(model).cpu()
    except RuntimeError as error:
        raise UnsupportedError(
            f"{type(model).__name__} can't be copied: {error}",
            where=where,
            remedy="detach() the tensors that it keeps, or pass model.cpu()",
        ) from error


def check_int8(model: nn.Module, where: str) -> None:
    """Refuse an int8 model that was moved: its kernels, and packed weights, stay on the CPU.

    Raises:
        DeviceError: It is not on the CPU.

    Example:
        >>> check_int8(nn.ReLU(), "emulate")
    """
    there = device_of(model, where)
    if there != CPU:
        raise DeviceError(
            "int8 kernels run on the CPU only",
            where=where,
            found=f"the int8 model's scales on {there}",
            expected="an int8 model on the CPU",
            remedy=f"pass converted.cpu(); fxqfix.emulate(converted.cpu()).to({str(there)!r}) "
            "gives its codes there",
        )

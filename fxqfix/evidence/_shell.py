"""A module of a prepared graph in float64 and eval mode, with the weight that is asked about."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fxqfix import _torch
from fxqfix.dialects.weights import WeightView, holder
from fxqfix.passes import FrozenFakeQuantize
from fxqfix.qparams import QParams, quantize

__all__ = ["Shell", "dequantize_wide", "widened"]


class Shell:
    """A copy of a module that computes in float64 and eval mode, filled with a weight when used.

    Args:
        module: The module; its own weight is not kept, where one is given for each use.
    """

    def __init__(self, module: nn.Module) -> None:
        self._own = module
        self._copy: Any = None

    def filled(self, weight: WeightView | None, values: Tensor | None = None) -> Callable[..., Any]:
        """What to call, with a weight's exact values.

        Args:
            weight: The weight in place of the module's own, and the bias with it.
            values: A weight that has no integers.
        """
        if isinstance(self._own, FrozenFakeQuantize):
            if weight is None:  # a fake-quant inside the region still quantizes float32 values
                return lambda x: self._own(x.float()).double()
            known = dequantize_wide(weight.codes, weight.qparams)  # that of a functional op
            return lambda _: known
        if weight is not None:
            values = dequantize_wide(weight.codes, weight.qparams)
        own = getattr(self._own, "weight_fake_quant", None)
        if values is None and isinstance(own, FrozenFakeQuantize):  # a weight without a partner
            codes = quantize(holder(self._own).weight, own.qparams)
            values = dequantize_wide(codes, own.qparams)
        if self._copy is None:
            self._copy = copy.deepcopy(self._own).double().eval()
            if values is not None and hasattr(self._copy, "weight_fake_quant"):
                self._copy.weight_fake_quant = nn.Identity()
        inner = holder(self._own)
        bias = weight.bias if weight is not None and weight.bias is not None else None
        self._put("weight", getattr(inner, "weight", None), values)
        self._put("bias", getattr(inner, "bias", None), bias)
        called: Callable[..., Any] = self._copy
        return called

    def _put(self, name: str, own: Any, given: Tensor | None) -> None:
        value = own if given is None else given
        if isinstance(value, Tensor):
            value = value.detach().double()
            setattr(holder(self._copy), name, nn.Parameter(value, requires_grad=False))

    def empty(self) -> None:
        """Let go of the weight that it was filled with."""
        if self._copy is not None and isinstance(
            getattr(holder(self._copy), "weight", None), Tensor
        ):
            holder(self._copy).weight = None


def widened(value: Any) -> Any:
    return _torch.tree_map_tensors(
        lambda t: t.double() if t.is_floating_point() else t.clone(), value
    )


def dequantize_wide(codes: Tensor, qparams: QParams) -> Tensor:
    scale, point = qparams.tensors(codes)
    return (codes.double() - point.double()) * scale.double()

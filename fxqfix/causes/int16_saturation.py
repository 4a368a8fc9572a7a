"""int16-saturation: pairs of products overflow 16 bits on CPUs without VNNI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxqfix.causes._base import Cause
from fxqfix.causes._view import View
from fxqfix.dialects.weights import WeightView, holder
from fxqfix.engines import Geometry, saturated_sums
from fxqfix.qparams import QParams

__all__ = ["CAUSE", "Int16Saturation"]


@dataclass(frozen=True)
class Int16Saturation(Cause):
    """The kernel adds u8 x s8 products in pairs, in int16 with saturation.

    Looks at int8 convolutions (1-D, 2-D) and linears. Counterfactual: the converted op's own
    integers with exact sums give other codes; with each pair clamped to int16 they give the codes
    found. Only reduce_range (activations in [0, 127]), another engine or a CPU with VNNI helps.
    """

    def explains(self, view: View) -> Tensor | None:
        """Codes that the converted integers give once pairs saturate."""
        operands = _operands(view)
        if operands is None:
            return None
        asked = view.left & view.differs_locally
        if not bool(asked.any()):
            return None
        values = view.converted.clone()
        values[asked] = _saturated_values(operands, _lift(asked, operands.dim).nonzero())
        return asked & view.agrees(values, view.target, view.raw)

    def evidence(self, view: View) -> str:
        """How large the operands are."""
        found = _operands(view)
        assert found is not None  # it explained something
        low, high = int(found.weight.codes.min()), int(found.weight.codes.max())
        return (
            f"activation codes up to {int(found.codes.max())} times weight codes {low}..{high}: "
            "pairs of products leave int16"
        )


@dataclass(frozen=True)
class _Operands:
    """The integers of one convolution or linear; `dim` is 0 for linear, else 1 or 2."""

    codes: Tensor
    grid: QParams
    weight: WeightView
    geometry: Geometry
    dim: int
    relu: bool


def _operands(view: View) -> _Operands | None:
    """The integers that the converted op multiplies; None where it is no u8 x s8 conv or linear."""
    if view.local is None or view.recompute is None or len(view.local.codes) != 1:
        return None
    inputs, weights = view.local.codes[0], view.recompute.own_weights
    if inputs is None or len(weights) != 1:
        return None
    (path, (_, weight)) = next(iter(weights.items()))
    op = view.pair.converted.site.op
    dim = {"linear": 0, "conv1d": 1, "conv2d": 2}.get(op.removesuffix("_relu"))
    fits = inputs[1].storage == torch.uint8 and weight.qparams.storage == torch.int8
    if dim is None or not fits or weight.codes.dim() != dim + 2:
        return None
    module = holder(view.recompute.graph_module.get_submodule(path))
    geometry = _geometry(module, dim)
    if geometry is None:
        return None
    return _Operands(*inputs, weight, geometry, dim, op.endswith("_relu"))


def _geometry(module: Any, dim: int) -> Geometry | None:
    if dim == 0:
        return Geometry(linear=True)
    zeros = getattr(module, "padding_mode", None) == "zeros"
    if not zeros or isinstance(module.padding, str):
        return None
    front = (1,) * (2 - dim)
    stride, dilation = front + module.stride, front + module.dilation
    padding = (0,) * (2 - dim) + module.padding
    return Geometry(stride, padding, dilation, module.groups)


def _lift(x: Tensor, dim: int) -> Tensor:
    """Any input, weight, or output as the one of a 2-D convolution."""
    if dim == 0:
        return x.reshape(-1, x.shape[-1], 1, 1)
    return x.unsqueeze(2) if dim == 1 else x


def _saturated_values(found: _Operands, at: Tensor) -> Tensor:
    """Real values of the chosen outputs, float64, as `at` orders them; NaN where none saturates."""
    weight = _lift(found.weight.codes, found.dim)
    zx = int(found.grid.zero_points[0])
    onednn = torch.backends.quantized.engine == "onednn"
    raw, activations, saturated = saturated_sums(
        _lift(found.codes, found.dim), zx, weight, found.geometry, at, by_channel=onednn
    )
    o, taps = at[:, 1], weight[0].numel()
    scale, point = (
        t.reshape(-1).expand(len(weight))[o] for t in found.weight.qparams.tensors(weight)
    )
    sums = weight.sum((1, 2, 3), dtype=torch.int64)[o]
    exact = raw - zx * sums - point * activations + taps * zx * point
    values = exact.double() * scale.double() * found.grid.scales[0]
    if found.weight.bias is not None:
        values = values + found.weight.bias.detach().double()[o]
    values = values.clamp(min=0.0) if found.relu else values
    # Where no pair saturates, this cause has nothing to say, whatever else the kernel did.
    return torch.where(saturated, values, torch.nan)


CAUSE = Int16Saturation(
    name="int16-saturation",
    summary="pairs of u8 x s8 products saturate in int16 on CPUs without VNNI",
    repair="",
    advice="use reduce_range (activations in [0, 127]), the qnnpack engine, or a CPU with VNNI",
)

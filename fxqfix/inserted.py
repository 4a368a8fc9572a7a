"""What fxqfix puts into int8 graphs; readers, engines and export see through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxqfix import _torch
from fxqfix.qparams import QParams

__all__ = [
    "FloatIsland",
    "Functional",
    "InMemoryOrder",
    "QuantizedIsland",
    "hold_range",
    "round_to_grid",
]


def as_stored(x: Tensor) -> Tensor:
    """A channels-last tensor as the contiguous one that its memory is; others contiguous."""
    if x.dim() == 4 and x.stride(1) == 1 and x.stride(3) == x.size(1):
        return x.permute(0, 2, 3, 1)
    if x.dim() == 5 and x.stride(1) == 1 and x.stride(4) == x.size(1):
        return x.permute(0, 2, 3, 4, 1)
    return x.contiguous()


def as_shaped(y: Tensor, x: Tensor) -> Tensor:
    """Back from `as_stored(x)`: `y` with the axes of `x` where they were."""
    if x.dim() == 4 and x.stride(1) == 1 and x.stride(3) == x.size(1):
        return y.permute(0, 3, 1, 2)
    if x.dim() == 5 and x.stride(1) == 1 and x.stride(4) == x.size(1):
        return y.permute(0, 4, 1, 2, 3)
    return y


def hold_range(x: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Clamp the codes of a quantized tensor to a declared range; its grid and layout stay.

    A plain function: as a node of a graph it shows the range, and costs less than a module's call.
    Scale and zero point are the tensor's own, so that a loaded state_dict, which may bring other
    scales, is held as well. `torch.jit.trace` sees a clamp.

    Args:
        x: A quantized tensor of any shape.
        quant_min: Lowest code.
        quant_max: Highest code.

    Returns:
        A new quantized tensor.

    Source:
        torch.clamp on a quantized tensor rounds its bounds to codes, and so is exact for bounds
        that are codes' values; asserted for all codes in tests/test_inserted.py. qnnpack's reads a
        channels-last tensor in the order of its memory; see `InMemoryOrder`.

    Example:
        >>> x = torch.quantize_per_tensor(torch.tensor([-9.0, 0.5, 99.0]), 0.5, 3, torch.quint8)
        >>> x.int_repr(), hold_range(x, 2, 127).int_repr()
        (tensor([  0,   4, 201], dtype=torch.uint8), tensor([  2,   4, 127], dtype=torch.uint8))
    """
    if x.qscheme() not in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return _hold_channels(x, quant_min, quant_max)
    scale, point = x.q_scale(), x.q_zero_point()
    low, high = (quant_min - point) * scale, (quant_max - point) * scale
    if _torch.runs_on_qnnpack():
        return as_shaped(torch.clamp(as_stored(x), low, high), x)
    return torch.clamp(x, low, high)


def _hold_channels(x: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """The same with a scale per channel, where torch.clamp has no kernel."""
    scales, points, axis = (
        x.q_per_channel_scales(),
        x.q_per_channel_zero_points(),
        x.q_per_channel_axis(),
    )
    shape = [1] * x.dim()
    shape[axis] = -1
    codes = x.int_repr().clamp(quant_min, quant_max)
    values = (codes - points.reshape(shape)) * scales.reshape(shape)
    return torch.quantize_per_channel(values.float(), scales, points, axis, x.dtype)


def round_to_grid(
    x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int
) -> Tensor:
    """Fake-quantize, in front of a quantize to the same grid, which then meets no tie.

    Some builds of torch quantize with the zero point added before they round, so that an odd one
    sends ties to the other side than in training. The same bits as
    torch.fake_quantize_per_tensor_affine for all numbers, at a third of its time: that one makes a
    mask for its gradient.

    Args:
        x: A float32 tensor.
        scale: The grid's, as float32 holds it.
        zero_point: The grid's.
        quant_min: Lowest code.
        quant_max: Highest code.

    Returns:
        A new float tensor.

    Source:
        ``clamp(rne(f(x * f(1/scale))), quant_min - zp, quant_max - zp) * scale``; asserted in
        tests/test_inserted.py.

    Example:
        >>> x = torch.tensor([0.25, 0.75, 99.0])
        >>> torch.quantize_per_tensor(x, 0.5, 3, torch.quint8).int_repr()
        tensor([  4,   4, 201], dtype=torch.uint8)
        >>> rounded = round_to_grid(x, 0.5, 3, 0, 127)
        >>> torch.quantize_per_tensor(rounded, 0.5, 3, torch.quint8).int_repr()
        tensor([  3,   5, 127], dtype=torch.uint8)
    """
    steps = torch.mul(x, 1.0 / scale).round_()
    return steps.clamp_(quant_min - zero_point, quant_max - zero_point).mul_(scale)


class InMemoryOrder(nn.Module):
    """An element-wise quantized op, run over its input's memory as it lies.

    qnnpack's clamps (relu6, hardtanh) read a channels-last tensor in the order of its memory, and
    take the result for a contiguous one: values are permuted. Handed over as the contiguous tensor
    that its memory is, a view, it comes back right, on any engine.

    Args:
        inner: The op's module.
        reason: Why it is here.

    Example:
        >>> InMemoryOrder(nn.ReLU6(), "")(torch.tensor([-1.0, 9.0]))
        tensor([0., 6.])
    """

    def __init__(self, inner: nn.Module, reason: str) -> None:
        super().__init__()
        self.inner, self.reason = inner, reason

    def forward(self, x: Tensor) -> Tensor:
        """The op."""
        return as_shaped(self.inner(as_stored(x)), x)


class FloatIsland(nn.Module):
    """A float op with its frozen quantized weight, where the engine's own kernel is wrong.

    torch's conversion knows no such module, so that it leaves it in float, between a dequantize
    and a quantize.

    Args:
        inner: The float module; the values of its weight lie on the grid of `weight_qparams`.
        weight_qparams: That grid; None for a module without a quantized weight.
        reason: Why it is here.

    Example:
        >>> import torch
        >>> from fxqfix import QParams
        >>> island = FloatIsland(nn.Linear(2, 3), QParams(0.5, 0, -128, 127, torch.qint8), "")
        >>> island(torch.ones(1, 2)).shape
        torch.Size([1, 3])
    """

    def __init__(self, inner: nn.Module, weight_qparams: QParams | None, reason: str) -> None:
        super().__init__()
        self.inner, self.weight_qparams, self.reason = inner, weight_qparams, reason

    def forward(self, *args: Tensor) -> Tensor:
        """The float op."""
        found: Tensor = self.inner(*args)
        return found


class Functional(nn.Module):
    """A function with a weight (F.conv2d, F.linear) as a module that holds it, for an island.

    Args:
        function: The function.
        weight: The values of its weight.
        bias: Its bias, or None.
        options: Its other arguments by name; they become attributes.

    Example:
        >>> Functional(nn.functional.linear, torch.ones(2, 3), None, {})(torch.ones(1, 3))
        tensor([[3., 3.]])
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        weight: Tensor,
        bias: Tensor | None,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.function, self.names = function, tuple(options)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        for name, value in options.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        """The function of x."""
        options = {name: getattr(self, name) for name in self.names}
        return self.function(x, self.weight, self.bias, **options)


class QuantizedIsland(nn.Module):
    """A float island of an eager model: torch's eager conversion puts nothing around it.

    Args:
        island: The float op.
        output: The grid of the result; None where it stays float.

    Example:
        >>> from fxqfix import QParams
        >>> grid = QParams(0.5, 0, 0, 255, torch.quint8)
        >>> x = torch.quantize_per_tensor(torch.ones(1, 2), 0.5, 0, torch.quint8)
        >>> QuantizedIsland(FloatIsland(nn.Linear(2, 3), grid, ""), grid)(x).is_quantized
        True
    """

    def __init__(self, island: FloatIsland, output: QParams | None) -> None:
        super().__init__()
        self.island, self.output = island, output

    def forward(self, *args: Tensor) -> Tensor:
        """Dequantize, the float op, quantize."""
        if self.output is None:  # of integers (embedding)
            return self.island(*args)  # type: ignore[no-any-return]  # nn.Module
        found = self.island(*(x.dequantize() for x in args))
        scale, point = self.output.scales[0], int(self.output.zero_points[0])
        return torch.quantize_per_tensor(found, scale, point, self.output.dtype)

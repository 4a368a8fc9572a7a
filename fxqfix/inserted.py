"""The modules that fxqfix puts into int8 graphs; readers, engines and export see through them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxqfix.qparams import QParams

__all__ = ["FloatIsland", "HoldRange"]


class HoldRange(nn.Module):
    """Clamp the codes of a quantized tensor to a declared range; its grid stays.

    It holds nothing but the two codes: scale and zero point are the tensor's own, so that a loaded
    state_dict, which may bring other scales, is held as well.

    Args:
        quant_min: Lowest code.
        quant_max: Highest code.

    Source:
        torch.clamp on a quantized tensor rounds its bounds to codes, and so is exact for bounds
        that are codes' values; asserted for all codes in tests/test_inserted.py.

    Example:
        >>> x = torch.quantize_per_tensor(torch.tensor([-9.0, 0.5, 99.0]), 0.5, 3, torch.quint8)
        >>> x.int_repr(), HoldRange(2, 127)(x).int_repr()
        (tensor([  0,   4, 201], dtype=torch.uint8), tensor([  2,   4, 127], dtype=torch.uint8))
    """

    def __init__(self, quant_min: int, quant_max: int) -> None:
        super().__init__()
        self.quant_min, self.quant_max = quant_min, quant_max

    def forward(self, x: Tensor) -> Tensor:
        """Hold a per-tensor quantized tensor of any shape; its memory format stays.

        qnnpack's clamp reads a channels-last tensor in the order of its memory, and takes the
        result for a contiguous one. So such a tensor is handed over as the contiguous one that its
        memory is: a view, whatever engine is in force.
        """
        scale, point = x.q_scale(), x.q_zero_point()
        low, high = (self.quant_min - point) * scale, (self.quant_max - point) * scale
        if x.dim() == 4 and x.stride(1) == 1 and x.stride(3) == x.size(1):
            return torch.clamp(x.permute(0, 2, 3, 1), low, high).permute(0, 3, 1, 2)
        if x.dim() == 5 and x.stride(1) == 1 and x.stride(4) == x.size(1):
            return torch.clamp(x.permute(0, 2, 3, 4, 1), low, high).permute(0, 4, 1, 2, 3)
        return torch.clamp(x.contiguous(), low, high)

    def extra_repr(self) -> str:
        """The range."""
        return f"{self.quant_min}, {self.quant_max}"


class FloatIsland(nn.Module):
    """A float op with its frozen quantized weight, where the engine's own kernel is wrong.

    torch's conversion knows no such module, so that it leaves it in float, between a dequantize
    and a quantize.

    Args:
        inner: The float module; the values of its weight lie on the grid of `weight_qparams`.
        weight_qparams: That grid.

    Example:
        >>> import torch
        >>> from fxqfix import QParams
        >>> island = FloatIsland(nn.Linear(2, 3), QParams(0.5, 0, -128, 127, torch.qint8))
        >>> island(torch.ones(1, 2)).shape
        torch.Size([1, 3])
    """

    def __init__(self, inner: nn.Module, weight_qparams: QParams) -> None:
        super().__init__()
        self.inner, self.weight_qparams = inner, weight_qparams

    def forward(self, *args: Tensor) -> Tensor:
        """The float op."""
        found: Tensor = self.inner(*args)
        return found

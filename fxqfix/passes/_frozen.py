"""The fake-quant with fixed qparams that `freeze` puts in place of every other one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxqfix import _torch
from fxqfix.dialects.quantizer import qparams_of
from fxqfix.qparams import QParams, dequantize, quantize

__all__ = ["FrozenFakeQuantize"]


class FrozenFakeQuantize(nn.Module):
    """Fake-quantize with fixed qparams; torch's conversion bakes exactly these.

    It answers everything that convert_fx, eager convert and convert_pt2e ask of a fake-quant
    (`calculate_qparams`, dtype, qscheme, ranges), and passes their isinstance checks as a virtual
    subclass of FakeQuantizeBase. Gradients pass straight through inside the range.

    Args:
        qparams: The qparams to hold; per-channel where its axis is set.
        device: Where the buffers live.

    Example:
        >>> import torch
        >>> from fxqfix import QParams
        >>> frozen = FrozenFakeQuantize(QParams(0.5, 3, 0, 127, torch.quint8))
        >>> frozen(torch.tensor([-9.0, 0.6, 99.0]))
        tensor([-1.5000,  0.5000, 62.0000])
    """

    scale: Tensor
    zero_point: Tensor
    fake_quant_enabled: Tensor
    observer_enabled: Tensor

    def __init__(self, qparams: QParams, device: torch.device | None = None) -> None:
        super().__init__()
        _torch.register_fake_quant(type(self))
        points = qparams.zero_points
        whole = all(float(z).is_integer() for z in points)
        float_points = qparams.axis is not None and not whole
        point_type = torch.float32 if float_points else torch.int32
        self.register_buffer("scale", torch.tensor(qparams.scales, device=device))
        self.register_buffer("zero_point", torch.tensor(points, dtype=point_type, device=device))
        self.register_buffer("fake_quant_enabled", torch.tensor([1], device=device))
        self.register_buffer("observer_enabled", torch.tensor([0], device=device))
        self.quant_min, self.quant_max = qparams.quant_min, qparams.quant_max
        self.dtype = qparams.dtype
        self.ch_axis = -1 if qparams.axis is None else qparams.axis
        self.is_per_channel = qparams.axis is not None
        self.is_dynamic = False
        self.qscheme: Any = torch.per_tensor_affine
        if self.is_per_channel:
            self.qscheme = torch.per_channel_affine
            if float_points:
                self.qscheme = torch.per_channel_affine_float_qparams

    @property
    def qparams(self) -> QParams:
        """The qparams, read from the buffers, which a loaded state_dict may have changed."""
        axis = self.ch_axis if self.is_per_channel else None
        return qparams_of(
            self.scale, self.zero_point, self.quant_min, self.quant_max, self.dtype, axis
        )

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize x with the fixed qparams."""
        return self.quantized(x) if self.fake_quant_enabled[0] else x

    def quantized(self, x: Tensor) -> Tensor:
        """The same, switched on or not: no branch depends on a tensor."""
        if self.is_per_channel:
            value = torch.fake_quantize_per_channel_affine(
                x, self.scale, self.zero_point, self.ch_axis, self.quant_min, self.quant_max
            )
            if not self.zero_point.is_floating_point():
                return value
            # On fractional zero points that kernel rounds once where dequantize rounds twice. The
            # two are so near that their difference is exact, and so is the sum.
            wanted = dequantize(quantize(x, self.qparams), self.qparams)
            return (value + (wanted - value).detach()).to(x.dtype)
        return torch.fake_quantize_per_tensor_affine(
            x, self.scale, self.zero_point, self.quant_min, self.quant_max
        )

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, as torch's conversion asks for them."""
        return self.scale, self.zero_point

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Switch the fake-quant on (or off), as torch's helpers do."""
        self.fake_quant_enabled[0] = int(enabled)

    def disable_fake_quant(self) -> None:
        """Switch the fake-quant off."""
        self.enable_fake_quant(False)

    def enable_observer(self, enabled: bool = True) -> None:
        """Accept torch's helper; there is nothing to observe."""

    def disable_observer(self) -> None:
        """Accept torch's helper; there is nothing to observe."""

    def extra_repr(self) -> str:
        """The qparams in one line."""
        return str(self.qparams)

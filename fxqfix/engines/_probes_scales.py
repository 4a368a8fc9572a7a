"""Probes of qnnpack's transposed convolutions: which scale a channel gets."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F

from fxqfix import _torch
from fxqfix.engines._probes import _far, _noise, _quantized

__all__ = ["reads_beyond_scales", "takes_input_scales"]


def reads_beyond_scales() -> bool:
    """A scale for each channel of one group, and the kernel wants one for each of all groups."""
    scales, points = torch.full((2,), 1 / 16), torch.zeros(2, dtype=torch.long)
    weight = torch.quantize_per_channel(_noise(4, 2, 1, 1), scales, points, 1, torch.qint8)
    x, ops = _quantized(_noise(1, 4, 3, 3)), cast(Any, torch.ops.quantized)
    options = [1, 1], [0, 0], [0, 0], [1, 1]
    with _torch.quantized_engine("qnnpack"):
        packed = ops.conv_transpose2d_prepack(weight, None, *options, 2)
        try:
            found = ops.conv_transpose2d(x, packed, 1 / 8, 128)
        except RuntimeError:
            return True
    wanted = F.conv_transpose2d(x.dequantize(), weight.dequantize(), groups=2)
    return _far(found, wanted.clamp(-16, 15.875))


def takes_input_scales() -> bool:
    """The scales of the input channels, taken for the output channels."""
    scales, points = torch.tensor([1 / 16, 1 / 4]), torch.zeros(2, dtype=torch.long)
    weight = torch.quantize_per_channel(_noise(2, 2, 1, 1), scales, points, 0, torch.qint8)
    x, ops = _quantized(_noise(1, 2, 3, 3)), cast(Any, torch.ops.quantized)
    with _torch.quantized_engine("qnnpack"):
        packed = ops.conv_transpose2d_prepack(weight, None, [1, 1], [0, 0], [0, 0], [1, 1], 1)
        try:
            found = ops.conv_transpose2d(x, packed, 1 / 8, 128)
        except RuntimeError:
            return True
    return _far(found, F.conv_transpose2d(x.dequantize(), weight.dequantize()).clamp(-16, 15.875))

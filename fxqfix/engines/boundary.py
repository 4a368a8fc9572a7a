"""Quantize, dequantize, and the ops that only move codes: the same on every engine."""

from __future__ import annotations

from torch import Tensor, nn

from fxqfix.engines._base import Call, Exact, kernel, moves_codes
from fxqfix.engines.activations import Clamp
from fxqfix.ops import TABLE
from fxqfix.qparams import QParams, dequantize, quantize_native

_ALL = ("fbgemm", "onednn", "qnnpack")


class Quantize(Exact):
    """torch.quantize_per_tensor: the zero point is added before or behind the rounding."""

    def __init__(self, qparams: QParams, point_first: bool) -> None:
        super().__init__()
        self.qparams, self.point_first = qparams, point_first

    def forward(self, x: Tensor) -> Tensor:
        """Codes of float values."""
        return quantize_native(x, self.qparams, self.point_first).to(self.qparams.storage)

    def extra_repr(self) -> str:
        """The grid."""
        return str(self.qparams)


class Dequantize(Exact):
    """Codes back to float values."""

    def __init__(self, qparams: QParams) -> None:
        super().__init__()
        self.qparams = qparams

    def forward(self, codes: Tensor) -> Tensor:
        """``f(s) * (q - zp)``."""
        return dequantize(codes, self.qparams)

    def extra_repr(self) -> str:
        """The grid."""
        return str(self.qparams)


@kernel("quantize", engines=_ALL)
def _quantize(call: Call) -> nn.Module:
    return Quantize(call.grid, call.point_first)


@kernel("dequantize", engines=_ALL)
def _dequantize(call: Call) -> nn.Module:
    return Dequantize(call.source)


@kernel("hold_range", engines=_ALL)
def _hold_range(call: Call) -> nn.Module:
    return Clamp(call.grid.quant_min, call.grid.quant_max)


@kernel("dropout", engines=_ALL)
def _dropout(call: Call) -> nn.Module:
    return nn.Identity()  # torch's quantized ones never drop anything


moves_codes(
    *(row.key for row in TABLE if row.output == "shape" and row.key not in ("dropout", "stack")),
    engines=_ALL,
    module=__name__,
)

"""Decompose the fake-quants inside modules that the graph does not open (LSTM, attention)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxqfix import _torch
from fxqfix.errors import UnsupportedError
from fxqfix.passes._base import Rewriter
from fxqfix.passes._frozen import FrozenFakeQuantize
from fxqfix.qparams import QParams

__all__ = ["DecomposedFakeQuantize", "decompose_inside"]


class DecomposedFakeQuantize(nn.Module):
    """Quantize and dequantize through the decomposed ops, as a module."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, qparams: QParams, device: torch.device | None = None) -> None:
        super().__init__()
        self.qparams = qparams
        self.register_buffer("scale", torch.tensor(qparams.scales, device=device))
        self.register_buffer("zero_point", torch.tensor(qparams.zero_points, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize x."""
        ops, q = _torch.decomposed(), self.qparams
        given = (q.scale, q.zero_point, q.quant_min, q.quant_max, q.storage)
        if q.axis is None:
            codes = ops.quantize_per_tensor(x, *given)
            return ops.dequantize_per_tensor(codes, *given)  # type: ignore[no-any-return]
        channel = (self.scale, self.zero_point, q.axis, *given[2:])
        codes = ops.quantize_per_channel(x, *channel)
        return ops.dequantize_per_channel(codes, *channel)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """The qparams in one line."""
        return str(self.qparams)


def decompose_inside(rewriter: Rewriter, path: str, module: nn.Module) -> None:
    """Replace every frozen fake-quant inside the module at `path`, and drop idle observers.

    Raises:
        UnsupportedError: A quantizer inside chooses its qparams at run time.
    """
    for name, inner in list(module.named_modules()):
        where = f"{path}.{name}"
        if isinstance(inner, FrozenFakeQuantize):
            new = DecomposedFakeQuantize(inner.qparams, inner.scale.device)
            rewriter.set_module(where, new, f"fake-quant -> decomposed {inner.qparams}")
        elif _torch.is_quantizer(inner) and not _torch.is_dynamic(inner):
            # Freezing leaves those that no forward calls, and placeholders.
            rewriter.set_module(where, nn.Identity(), "idle observer -> nothing")
        elif _torch.is_quantizer(inner):
            raise UnsupportedError(
                "qparams that are chosen at run time can't be decomposed",
                where=f"decompose-quantize, {where}",
                found=type(inner).__name__,
                remedy="quantize statically, or leave this value out of the quantized part",
            )

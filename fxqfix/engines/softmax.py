"""softmax and matmul.

The shared kernels dequantize, call torch's float kernel and quantize. qnnpack's softmax to a scale
of 1/256 is a table of ``t = rint(min(2^32-1 / n, 2^23-1) * exp((q - max) * s))`` for each row of n
codes and ``((t << 8) + (sum t >> 1)) // sum t``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxqfix.engines._arithmetic import real, single
from fxqfix.engines._base import Call, Exact, kernel
from fxqfix.engines._layout import suggested
from fxqfix.qparams import QParams, quantize_native

__all__ = ["Matmul", "QnnSoftmax", "Softmax"]

_SHARED = ("fbgemm", "onednn")
_ALL = (*_SHARED, "qnnpack")


class Softmax(Exact):
    """In float, then quantized."""

    def __init__(self, call: Call, dim: int) -> None:
        super().__init__()
        self.source, self.grid, self.dim = call.source, call.grid, dim
        self.point_first = call.point_first

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        found = torch.softmax(real(codes, self.source), self.dim)
        return quantize_native(found, self.grid, self.point_first).to(self.grid.storage)


class QnnSoftmax(Exact):
    """Rows of the memory, whatever the strides say.

    The kernel reads rows of n codes where the axis lies densely, and stores them in the layout
    that torch suggests: an axis that lies so by chance of a transposition comes out misplaced.
    """

    def __init__(self, source: QParams, dim: int) -> None:
        super().__init__()
        self.scale, self.dim = single(source.scales[0]), dim

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        dim, last = self.dim % codes.dim(), codes.dim() - 1
        if codes.stride(dim) == 1:
            return self._rows(codes, codes.shape[dim])
        if dim == last:
            return self._rows(codes.contiguous(), codes.shape[dim])
        axes = list(range(codes.dim()))
        axes[dim], axes[last] = last, dim
        return self._rows(codes.permute(axes).contiguous(), codes.shape[dim]).permute(axes)

    def _rows(self, codes: Tensor, count: int) -> Tensor:
        memory = codes.as_strided((codes.numel() // count, count), (count, 1))
        distance = memory.long() - memory.long().amax(1, keepdim=True)
        scale = min((2**32 - 1) / count, 8388607.0)
        table = torch.round(scale * torch.exp(distance.double() * self.scale)).long()
        total = table.sum(1, keepdim=True)
        rows = ((table * 256 + total // 2) // total).clamp(max=255).to(codes.dtype)
        found = suggested(codes, codes)
        found.as_strided((codes.numel(),), (1,)).copy_(rows.flatten())
        return found


@kernel("softmax", engines=_SHARED, native=True)
@kernel("softmax", engines=("qnnpack",))
def _softmax(call: Call) -> nn.Module:
    dim: Any = call.option("dim")
    if not isinstance(dim, int):
        raise call.refuse("its axis is not a constant")
    grid = call.grid
    if call.engine == "qnnpack" and (grid.scales[0], grid.zero_points[0]) == (1 / 256, 0):
        return QnnSoftmax(call.source, dim)
    call.check_native()
    return Softmax(call, dim)


class Matmul(Exact):
    """In float, then quantized."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.sources, self.grid = (call.grid_of(0), call.grid_of(1)), call.grid
        self.point_first = call.point_first

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Codes in, codes out."""
        found = torch.matmul(real(a, self.sources[0]), real(b, self.sources[1]))
        return quantize_native(found, self.grid, self.point_first).to(self.grid.storage)


@kernel("matmul", engines=_ALL, native=True)
def _matmul(call: Call) -> nn.Module:
    return Matmul(call)

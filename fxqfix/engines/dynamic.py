"""Dynamic linear and convolution: floats in, a grid chosen for each batch, floats out.

Linear gives what the exact sum ``A`` stands for, as a float (see `_choose` for grid and codes):

* fbgemm: ``fma(A, f(f(xs) * f(ws)), b)``
* qnnpack: ``f(f(A * f(f(xs) * f(ws))) + b)``
* onednn: ``f(f(A * f(X * W)) + b)`` or ``f(f(f(A * X) * W) + b)``, by the rows of `onednn`; X and
  W, which are xs and ws inverted there and back, as in `_requantize`.

A convolution runs the static kernel with the batch's grid for its output too, and dequantizes: what
lies beyond the input's range is lost. fbgemm finds min and max in as many floats of memory as the
input has elements, which is wrong for inputs with gaps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxqfix._settings import default_cpu
from fxqfix.engines._accumulate import Accumulator
from fxqfix.engines._arithmetic import fma
from fxqfix.engines._base import Call, Exact, kernel
from fxqfix.engines._choose import choose, codes_of_batch, point_first, there_and_back
from fxqfix.engines._inner import row_of
from fxqfix.engines._lost import Lost
from fxqfix.engines.onednn import Kernels
from fxqfix.engines.weighted import build_linear
from fxqfix.qparams import QParams, dequantize, quantize_native

__all__ = ["DynamicConv", "DynamicLinear", "build_dynamic_linear"]

_ALL = ("fbgemm", "onednn", "qnnpack")
_ANY = QParams(1.0, 0, 0, 255, torch.quint8)  # codes as they are


class DynamicLinear(Exact):
    """A linear layer of float values; see the module's docstring."""

    scale: Tensor
    bias: Tensor | None
    weight_sums: Tensor

    def __init__(
        self, call: Call, accumulate: Accumulator, dims: int, lost: Lost | None = None
    ) -> None:
        super().__init__()
        if call.weight is None:
            raise call.refuse("its weight can't be read")
        self.accumulate, self.lost = accumulate, lost
        self.engine, self.relu = call.engine, call.relu
        self.kernels = Kernels(call) if call.engine == "onednn" else None
        self.reduce_range = bool(call.arguments["reduce_range"]) and call.engine != "qnnpack"
        self.point_first = point_first(call)
        per_channel = call.weight.qparams.axis is not None
        scale = torch.tensor(call.weight.qparams.scales, dtype=torch.float64)
        if self.engine == "onednn":
            scale = there_and_back(scale.float() if per_channel else scale)
        bias = call.weight.bias
        self.register_buffer("scale", scale.float())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("weight_sums", accumulate.weight.double().sum(1))

    def forward(self, x: Tensor) -> Tensor:
        """Floats in, floats out."""
        grid = choose(x, reduce_range=self.reduce_range)
        codes = codes_of_batch(x.contiguous(), grid, self.engine, self.point_first)
        row = self.kernels.row(codes) if self.kernels is not None else None
        raw, offset = self.accumulate(codes).double(), self.weight_sums * int(grid.zero_points[0])
        if row is not None and row.tiles:
            sums = raw.float() - offset.float()
        else:
            loses = self.lost is not None and self.lost.may_lose(codes)
            lost = self.lost(codes) if self.lost is not None and loses else 0
            sums = (raw - offset - lost).float()
        separate = row is not None and row.scales == "separate"
        found = self._values(sums, grid.scales[0], separate=separate)
        return found.relu_() if self.relu else found

    def _values(self, sums: Tensor, of_input: float, *, separate: bool) -> Tensor:
        scale = torch.tensor(of_input, dtype=torch.float64, device=sums.device)
        step = there_and_back(scale) if self.engine == "onednn" else scale.float()
        if separate:
            found = (sums * step) * self.scale
            return found if self.bias is None else found + self.bias
        if self.engine == "fbgemm" and self.bias is not None:
            return fma(sums, step * self.scale, self.bias)
        found = sums * (step * self.scale)
        return found if self.bias is None else found + self.bias


class DynamicConv(Exact):
    """A convolution of float values; see the module's docstring.

    Args:
        call: The convolution on quantized values; its grids are put in for each batch.
        padding: What is put around the input, as `F.pad` takes it.
        mode: How.
    """

    def __init__(self, call: Call, padding: list[int], mode: str) -> None:
        super().__init__()
        self.call, self.padding, self.mode = call, padding, mode
        self.reduce_range = bool(call.arguments["reduce_range"]) and call.engine != "qnnpack"
        self._static(_ANY)  # it refuses now, if at all

    def _static(self, grid: QParams) -> nn.Module:
        call = replace(self.call, qparams=(grid,), output=grid)
        build = row_of(call).build
        assert build is not None  # no convolution only moves codes
        with default_cpu():
            return build(call)

    def forward(self, x: Tensor) -> Tensor:
        """Floats in, floats out."""
        x = F.pad(x, self.padding, mode=self.mode) if self.padding else x
        seen = x.as_strided((x.numel(),), (1,)) if self.call.engine == "fbgemm" else x
        grid = choose(seen, reduce_range=self.reduce_range)
        codes = quantize_native(x, grid, self.call.point_first).to(grid.storage)
        return dequantize(self._static(grid).to(x.device)(codes), grid)


def _reduces(call: Call) -> bool:
    """Whether the kernel is asked for reduce_range."""
    if call.key.startswith("linear") and call.module is not None:
        version = getattr(call.module, "version", 4)
        return version is not None and version >= 4
    return bool(call.arguments.get("reduce_range", call.module is not None))


def _static(call: Call, **arguments: Any) -> Call:
    """The op on quantized values; it holds no module, whose packed weight needs the engine."""
    if call.weight is None or call.weight.qparams.dtype != torch.qint8:
        raise call.refuse("its weight is not qint8")
    return replace(
        call,
        key=call.key.removesuffix("_dynamic"),
        relu=call.relu or "relu" in f"{call.target} {type(call.module).__name__}".lower(),
        arguments={"reduce_range": _reduces(call), **arguments},
        module=None,
        target=None,
        inputs=(),
        qparams=(_ANY,),
        output=_ANY,
    )


@kernel("linear_dynamic", engines=_ALL)
def build_dynamic_linear(call: Call) -> nn.Module:
    """The module of a dynamic linear op."""
    return build_linear(_static(call), DynamicLinear)


@kernel(
    *(f"conv{kind}{dims}d_dynamic" for kind in ("", "_transpose") for dims in (1, 2, 3)),
    engines=_ALL,
)
def _conv(call: Call) -> nn.Module:
    names = ("stride", "padding", "dilation", "groups", "output_padding")
    options: dict[str, Any] = {name: call.option(name) for name in names}
    mode, padding = "zeros", []
    if call.module is not None and call.option("padding_mode", "zeros") != "zeros":
        mode = call.option("padding_mode")
        padding = [n for n in reversed(options["padding"]) for _ in range(2)]
        options["padding"] = [0] * len(options["padding"])
    static = _static(call, **options)
    return DynamicConv(static, padding, mode)

"""The grid that dynamic kernels choose for each batch, and the codes they quantize it to.

With min and max of the batch widened to contain 0, ``s = (max - min) / (qmax - qmin)`` in double
(qmax is 127 with reduce_range, which qnnpack ignores, else 255); a scale of 0 becomes 0.1, one
below 6.1e-5 becomes that. The zero point is ``rne(qmin - min / s)``, or from the other end of the
range where that error bound is smaller.

Codes are ``rne(fma(x, f(1 / f(s)), zp))``, or ``rne(f(x * f(1 / f(s)))) + zp`` where a build adds
the zero point behind the rounding: fbgemm's kernel and native quantize, which is qnnpack's, go by
a rule each. On onednn ``rne(f(f(x * i) + zp))`` with ``i = f(1 / f(1 / f(1 / s)))``, the innermost
in double.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxqfix._torch import quantized_engine, quiet
from fxqfix.engines._arithmetic import single
from fxqfix.engines._base import Call
from fxqfix.qparams import QParams, container_range, quantize_native

__all__ = ["choose", "codes_of_batch", "point_first", "there_and_back"]

_SMALLEST = single(6.1e-5)


def choose(values: Tensor, *, reduce_range: bool) -> QParams:
    """The grid of a batch.

    Args:
        values: Float values.
        reduce_range: Whether codes stay in [0, 127].

    Raises:
        NonFiniteError: A value is infinite or NaN.

    Example:
        >>> print(choose(torch.tensor([-1.0, 4.1]), reduce_range=False))
        scale=0.02 zp=50 [0,255] quint8
    """
    low, high = values.aminmax() if values.numel() else (values.new_zeros(()),) * 2
    least, most = min(low.item(), 0.0), max(high.item(), 0.0)
    top = 127 if reduce_range else 255
    scale = (most - least) / top
    if (1.0 / torch.tensor(scale, dtype=torch.float32, device="cpu")).isinf():  # in float32
        scale = 0.1
    grid = QParams(scale, 0, *container_range(torch.quint8), torch.quint8)  # refuses inf and NaN
    if scale < _SMALLEST:
        least, most = _widened(least, most, _SMALLEST / single(scale), top)
        scale = _SMALLEST
    from_least, from_most = -least / scale, top - most / scale
    # What is smaller in sum is taken for what has the smaller error.
    found = from_least if -abs(least / scale) < top - abs(most / scale) else from_most
    return replace(grid, scale=scale, zero_point=round(min(max(found, 0.0), top)))


def _widened(least: float, most: float, ratio: float, top: int) -> tuple[float, float]:
    """Min and max for the smallest scale; `ratio` is how much larger it is."""
    if least == 0.0:
        return least, single(_SMALLEST * top)
    if most == 0.0:
        return single(-_SMALLEST * top), most
    return single(least * single(ratio)), single(most * single(ratio))


def there_and_back(scale: Tensor) -> Tensor:
    """A scale (float64) as ideep hands it on: ``f(1 / f(1 / s))``."""
    return 1.0 / (1.0 / scale).float()


def point_first(call: Call) -> bool:
    """Whether the kernel of a dynamic linear adds the zero point before it rounds its input."""
    return _fbgemm_point_first() if call.engine == "fbgemm" else call.point_first


@functools.cache
def _fbgemm_point_first() -> bool:
    """Asked of fbgemm's kernel: half a step at zero point 1 gives 1, or 0.

    Without fbgemm: True, as in all builds measured but 2.15.0's.
    """
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return True
    # Whatever the user's default dtype and device are.
    one = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    x = torch.tensor([[-1.0], [0.5], [254.0]], dtype=torch.float32, device="cpu")
    ops: Any = torch.ops.quantized
    with quiet(), quantized_engine("fbgemm"):
        packed = ops.linear_prepack(torch.quantize_per_tensor(one, 1.0, 0, torch.qint8), None)
        return bool(ops.linear_dynamic(x, packed, False)[1].item() == 1.0)


def codes_of_batch(x: Tensor, grid: QParams, engine: str, first: bool) -> Tensor:
    """Codes of float values, as the kernels of dynamic linear quantize their input.

    Args:
        x: The batch.
        grid: Its grid.
        engine: Whose kernel.
        first: Whether it adds the zero point before it rounds (`point_first`); always on onednn.
    """
    if engine != "onednn":
        return quantize_native(x, grid, first).to(grid.storage)
    scale = torch.tensor(grid.scales[0], dtype=torch.float64, device=x.device)
    inverse = 1.0 / there_and_back(scale)
    found = torch.round(x * inverse + int(grid.zero_points[0]))
    return found.clamp(*grid.container).to(grid.storage)

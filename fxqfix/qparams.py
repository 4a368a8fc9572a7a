"""QParams and the exact quantize / dequantize arithmetic, in plain tensor ops.

The two roundings that torch has are both here, because they differ on ties:

* fake-quantize and `quantized_decomposed.quantize_per_*`: ``rne(f(x * f(1/s))) + zp``
* `torch.quantize_per_tensor`: the same in some builds of torch (`zero_point_first` asks this one).
  In others, to 8 bits, ``rne(fma(x, f(1/s), zp))``: the zero point is added before the rounding, so
  an odd zero point flips a tie's parity; to 32 bits and per channel ``rne(f(f(x * f(1/s)) + zp))``.

``f`` rounds to float32 and ``rne`` rounds half to even. Both are asserted against the kernels,
code for code, in ``tests/test_qparams.py``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxqfix._notebook import Shown
from fxqfix.errors import NonFiniteError

__all__ = [
    "FLOOR",
    "QParams",
    "container_range",
    "dequantize",
    "fused_sum",
    "quantize",
    "quantize_native",
    "round_native",
    "unheld",
    "zero_point_first",
]

# Just above the smallest scale that the fused fake-quant's kernel gives an 8-bit grid.
FLOOR = 6.2e-5
# The integer dtype that holds the codes of each quantized dtype.
_STORAGE = {
    torch.quint8: torch.uint8,
    torch.qint8: torch.int8,
    torch.qint32: torch.int32,
    torch.quint4x2: torch.uint8,
    torch.quint2x4: torch.uint8,
}
# Bits of one code in the dtypes that pack several into a byte.
_PACKED = {torch.quint4x2: 4, torch.quint2x4: 2}
# Of a float64: the bits that float32 has no room for, and what they are in the middle of two
# float32 numbers; below the least normal float32 the middles are elsewhere.
_LAST_29, _MIDDLE, _SUBNORMAL = 2**29 - 1, 2**28, 2.0**-126


def container_range(dtype: torch.dtype) -> tuple[int, int]:
    """Return the lowest and the highest code that a dtype can hold.

    Args:
        dtype: A quantized (quint8, qint8, qint32) or an integer dtype.

    Returns:
        (lowest, highest) code.

    Example:
        >>> container_range(torch.quint8), container_range(torch.int8)
        ((0, 255), (-128, 127))
    """
    if dtype in _PACKED:
        return 0, 2 ** _PACKED[dtype] - 1
    info = torch.iinfo(_STORAGE.get(dtype, dtype))
    return int(info.min), int(info.max)


@dataclass(frozen=True)
class QParams(Shown):
    """Quantization parameters of one site.

    Attributes:
        scale: Real value of one code step (one LSB); a tuple with one entry per channel where
            `axis` is set.
        zero_point: The code that stands for 0.0; a tuple per channel likewise. Float only for
            the float-qparams weights of embeddings.
        quant_min: Lowest code that the declared range allows.
        quant_max: Highest code that the declared range allows.
        dtype: The dtype as the model spells it (torch.quint8, torch.int8, ...).
        axis: Channel axis, or None for per-tensor.

    Example:
        >>> q = QParams(0.5, 3, 0, 127, torch.quint8)
        >>> q.is_narrow, q.container
        (True, (0, 255))
        >>> print(q)
        scale=0.5 zp=3 [0,127] quint8
    """

    scale: float | tuple[float, ...]
    zero_point: float | tuple[float, ...]
    quant_min: int
    quant_max: int
    dtype: torch.dtype
    axis: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that no kernel can quantize with."""
        scales, points = self.scales, self.zero_points
        paired = len(scales) == len(points) and min(scales, default=0) > 0
        if paired and math.isfinite(sum(scales) + sum(map(abs, points))):  # NaN and inf stay
            return
        pairs = list(zip(scales, points, strict=True))
        bad = [i for i, (s, z) in enumerate(pairs) if not (0 < s < math.inf and math.isfinite(z))]
        if bad:
            scale, point = pairs[bad[0]]
            found = f"scale={scale}, zero_point={point}"
            if self.axis is not None:
                found = f"{len(bad)} of {len(pairs)} channels, channel {bad[0]}: {found}"
            raise NonFiniteError(
                "qparams are not finite and positive",
                where="QParams",
                found=found,
                expected="finite scale > 0 and finite zero_point",
                remedy="reset the observer, observer.reset_min_max_vals(), and calibrate it on "
                "finite data",
            )

    @property
    def scales(self) -> tuple[float, ...]:
        """All scales, as a tuple of length 1 (per tensor) or channels."""
        return self.scale if isinstance(self.scale, tuple) else (self.scale,)

    @property
    def zero_points(self) -> tuple[float, ...]:
        """All zero points, as a tuple of length 1 (per tensor) or channels."""
        return self.zero_point if isinstance(self.zero_point, tuple) else (self.zero_point,)

    @property
    def container(self) -> tuple[int, int]:
        """Lowest and highest code that the dtype can hold."""
        return container_range(self.dtype)

    @property
    def storage(self) -> torch.dtype:
        """The integer dtype of the codes: torch.uint8 for torch.quint8, and so on."""
        return _STORAGE.get(self.dtype, self.dtype)

    @property
    def bits(self) -> int:
        """Bits that one code takes in memory: 8 for torch.quint8, 4 for torch.quint4x2."""
        return _PACKED.get(self.dtype, 8 * self.storage.itemsize)

    @property
    def is_narrow(self) -> bool:
        """True where the declared range is narrower than the dtype's own."""
        return (self.quant_min, self.quant_max) != self.container

    @property
    def one_byte(self) -> bool:
        """True for one grid for the whole tensor, whose codes take 8 bits or less."""
        return self.axis is None and self.storage.itemsize == 1

    @property
    def whole(self) -> bool:
        """True where every zero point is a whole number."""
        return _whole(self.zero_points)

    def same_grid(self, other: QParams) -> bool:
        """True where equal codes stand for equal values (scale, zero point and axis are equal)."""
        return (
            self.scales == other.scales
            and self.zero_points == other.zero_points
            and (self.axis == other.axis or len(self.scales) == 1)
        )

    def with_range(self, quant_min: int, quant_max: int) -> QParams:
        """The same grid with another declared range."""
        return replace(self, quant_min=quant_min, quant_max=quant_max)

    def tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point, shaped to broadcast against `like`, on its device."""
        point_type = torch.int32
        if not self.whole:
            point_type = torch.float32
        scale = torch.tensor(self.scales, dtype=torch.float32, device=like.device)
        point = torch.tensor(self.zero_points, device=like.device).to(point_type)
        if self.axis is None:
            return scale.reshape(()), point.reshape(())
        shape = [1] * like.dim()
        shape[self.axis] = -1
        return scale.reshape(shape), point.reshape(shape)

    def __str__(self) -> str:
        """Render in one line; a per-channel scale shows as its lowest and highest value."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"scale={_span(self.scales)} zp={_span(self.zero_points)} {self.range_text} {kind}"

    @property
    def range_text(self) -> str:
        """The declared range, as ``[quant_min,quant_max]``."""
        return f"[{self.quant_min},{self.quant_max}]"


@functools.lru_cache(maxsize=4096)
def _whole(points: tuple[float, ...]) -> bool:
    return all(float(point).is_integer() for point in points)


def _span(values: tuple[float, ...]) -> str:
    low, high = min(values), max(values)
    return f"{low:.6g}" if low == high else f"{low:.6g}..{high:.6g}"


def unheld(x: Tensor, qparams: QParams) -> Tensor:
    """What `quantize` clamps: whole numbers as floats, of a grid whose zero points are whole.

    Args:
        x: Float tensor, any shape.
        qparams: The grid.

    Returns:
        ``rne(f(x * f(1/scale))) + zp`` of x's shape.

    Example:
        >>> unheld(torch.tensor([0.25, 99.0]), QParams(0.5, 3, 0, 127, torch.quint8))
        tensor([  3., 201.])
    """
    scale, point = qparams.tensors(x)
    return (x.detach().to(torch.float32) * (1.0 / scale)).round_().add_(point)


def quantize(x: Tensor, qparams: QParams) -> Tensor:
    """Integer codes of float values, by the rule of fake-quantize and the decomposed ops.

    Args:
        x: Float tensor, any shape.
        qparams: The grid and the declared range.

    Returns:
        int32 codes of x's shape: ``clamp(rne(f(x * f(1/scale))) + zp, quant_min, quant_max)``. A
        scale that float32 can't hold is rounded first, as fake-quantize does; the decomposed ops
        divide first, which moves a tie here and there.

    Source:
        torch's fake_quantize kernels; asserted equal in tests/test_qparams.py.

    Example:
        >>> quantize(torch.tensor([-1.0, 0.25, 99.0]), QParams(0.5, 3, 0, 127, torch.quint8))
        tensor([  1,   3, 127], dtype=torch.int32)
    """
    scale, point = qparams.tensors(x)
    if point.dtype == torch.float32:  # float-qparams: zero point is added, then rounded
        codes = (x.detach().to(torch.float32) * (1.0 / scale)).add_(point).round_()
    else:
        codes = unheld(x, qparams)
    return codes.clamp_(qparams.quant_min, qparams.quant_max).to(torch.int32)


@functools.cache
def zero_point_first() -> bool:
    """Whether this torch's native quantize adds the zero point before it rounds; it is asked.

    Builds differ: that of torch 2.13.0 for CPUs does, those of 2.6.0 and 2.15.0 with CUDA don't.
    Half a step at zero point 1 is 1.5, which rounds to 2, or 0 and then 1.

    Example:
        >>> code = torch.quantize_per_tensor(torch.tensor([0.5]), 1.0, 1, torch.quint8).int_repr()
        >>> zero_point_first() == (code.item() == 2)
        True
    """
    # Whatever the user's default dtype and device are.
    half = torch.tensor([0.5], dtype=torch.float32, device="cpu")
    return bool(torch.quantize_per_tensor(half, 1.0, 1, torch.quint8).int_repr().item() == 2)


def round_native(scaled: Tensor, zero_point: int | Tensor, first: bool | None = None) -> Tensor:
    """Whole numbers from float32 values in steps of a grid, as native kernels round one by one.

    Args:
        scaled: Values divided by the scale, float32.
        zero_point: The grid's.
        first: Whether the zero point is added before the rounding; None asks `zero_point_first`.

    Returns:
        ``rne(f(scaled + zp))``, or ``rne(scaled) + zp``: see `zero_point_first`; not clamped.

    Example:
        >>> round_native(torch.tensor([0.75, 1.25]), 3)
        tensor([4., 4.])
    """
    if zero_point_first() if first is None else first:
        return torch.round(scaled + zero_point)
    return torch.round(scaled) + zero_point


def quantize_native(x: Tensor, qparams: QParams, first: bool | None = None) -> Tensor:
    """Integer codes by the rule of `torch.quantize_per_tensor` and `torch.quantize_per_channel`.

    Args:
        x: Float tensor, any shape.
        qparams: The grid; its quant_min / quant_max are ignored, as the kernels do.
        first: Whether the zero point is added before the rounding; None asks `zero_point_first`.

    Returns:
        int32 codes of x's shape, clamped to the container: ``rne(f(x * f(1/scale))) + zp``, or
        where `zero_point_first`, ``rne(fma(x, f(1/scale), zp))``, to 32 bits and per channel
        ``rne(f(f(x * f(1/scale)) + zp))``.

    Example:
        >>> q = QParams(1.0, 1, 0, 127, torch.quint8)
        >>> quantize(torch.tensor([0.75]), q).item()
        2
        >>> quantize_native(torch.tensor([0.5]), q).item() == (2 if zero_point_first() else 1)
        True
    """
    scale, point = qparams.tensors(x)
    first = zero_point_first() if first is None else first
    x = x.detach().to(torch.float32)
    if qparams.axis is not None or qparams.storage == torch.int32:
        codes = round_native(x * (1.0 / scale), point.to(torch.float32), first)
    elif not first:
        codes = _in_int32(torch.round(x * (1.0 / scale)), point)
    else:  # the product is exact in float64
        codes = torch.round(fused_sum(x.double() * (1.0 / scale).double(), point.double()))
    return codes.double().clamp(*qparams.container).to(torch.int32)


def _in_int32(steps: Tensor, point: Tensor) -> Tensor:
    """Steps plus zero point, in int32 as the vectors do it: beyond 2^31 steps the sum wraps."""
    whole = steps.double().clamp(-(2.0**31), 2.0**31 - 128).to(torch.int64)
    return (whole + point.to(torch.int64) + 2**31) % 2**32 - 2**31


def fused_sum(a: Tensor, b: Tensor) -> Tensor:
    """Sum of float64 tensors, rounded to float32 once, as an fma of float32 values does.

    Rounding to float64 and then to float32 would round twice, which moves a sum whose float64 is a
    float32 tie and is not exact. There the first rounding has to be to odd: the error that it makes
    is known exactly, and the last bit, which is even, is moved towards it. Anywhere else both are
    the same.
    """
    total = a + b
    found = total.float()
    ties = (total.view(torch.int64) & _LAST_29) == _MIDDLE
    small = total.abs() < _SUBNORMAL
    # Elsewhere a look at a value waits for the device; what is compiled can't branch on one.
    looks = total.device.type == "cpu" and not torch.compiler.is_compiling()
    if not looks or bool(small.any()):
        ties |= small & (total != 0)
    if looks and not bool(ties.any()):
        return found
    back = total - a
    error = (a - (total - back)) + (b - back)
    ties &= (error != 0) & total.isfinite() & ((total.view(torch.int64) & 1) == 0)
    if not looks:
        beyond = torch.where(error > 0, math.inf, -math.inf).to(total.dtype)
        return torch.where(ties, torch.nextafter(total, beyond).float(), found)
    if bool(ties.any()):  # picking them takes longer than looking for them
        beyond = torch.where(error[ties] > 0, math.inf, -math.inf).to(total.dtype)
        found[ties] = torch.nextafter(total[ties], beyond).float()
    return found


def dequantize(codes: Tensor, qparams: QParams) -> Tensor:
    """Real values of integer codes: ``f(f(scale) * (code - zp))``, as the native kernels have it.

    Per channel ``f(scale * (f(code) - zp))`` with the scale in double. The two are the same for
    codes of up to 24 bits and scales that float32 holds.

    Args:
        codes: Integer tensor, any shape.
        qparams: The grid.

    Returns:
        float32 tensor of the same shape.

    Example:
        >>> dequantize(torch.tensor([1, 3]), QParams(0.5, 3, 0, 127, torch.quint8))
        tensor([-1.,  0.])
    """
    scale, point = qparams.tensors(codes)
    if point.dtype == torch.float32:
        return (codes.to(torch.float32) - point) * scale
    if qparams.axis is None:
        if qparams.storage.itemsize < 3 and abs(qparams.zero_points[0]) < 2**23:  # exact in floats
            return codes.to(torch.float32, copy=True).sub_(point).mul_(scale)
        # int64 only where the difference may leave int32.
        integer = torch.int64 if qparams.storage == torch.int32 else torch.int32
        return (codes.to(integer) - point).to(torch.float32) * scale
    wide = torch.tensor(qparams.scales, dtype=torch.float64, device=codes.device)
    steps = codes.to(torch.float32) - point.to(torch.float32)
    return (steps.double() * wide.reshape(scale.shape)).to(torch.float32)

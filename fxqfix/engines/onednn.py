"""Which of oneDNN's kernels runs a layer, and what it computes, by the level of its instructions.

A kernel is a row: where it runs, how it scales its sums, and which products it adds at 16 bits; the
first row that fits is the one. The conditions are oneDNN's own (3.12), found in its log of kernels
(ONEDNN_VERBOSE=1), and held to the kernels by tests/engines at every level that a CPU has. What
other releases do otherwise is in `_of_release`; `_releases` tells them apart.

* joined: ``f(A * f(X * W))``
* separate: ``f(f(A * X) * W)``
* reference: separate, and the output scale divides
* tiles (AMX): joined, and the zero point is taken off in floats:
  ``A = f(f(raw) - f(f(sum w) * zx))``, both sums over the taps inside the image

The rows of AMX are from measurements on a CPU that has it; what they don't predict is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxqfix.engines._base import Call
from fxqfix.engines._geometry import Geometry, Job, geometry

__all__ = ["ROWS", "Kernels", "Row", "always_gemm", "pairs_of", "row_for"]

_L1 = 43_008  # bytes of the cache that oneDNN reckons with: 7/8 of 48 KiB
_WIDE = 256
_GEMM = 256  # inputs of a group, above which a matrix product may be taken in parts


@dataclass(frozen=True)
class Row:
    """A kernel of oneDNN.

    Attributes:
        name: As oneDNN's log has it.
        kind: "linear", "conv" or "transposed".
        levels: At which levels it runs.
        fits: What it runs.
        scales: "joined", "separate" or "reference"; "" where nobody knows, which is refused.
        tiles: Whether it takes the zero point off in floats.
        gemm: Whether it is a matrix product over all channels of a group.
    """

    name: str
    kind: str
    levels: tuple[str, ...]
    fits: Callable[[Job], bool]
    scales: str
    tiles: bool = False
    gemm: bool = False


def row_for(call: Call, job: Job) -> Row:
    """The row that runs a job.

    Args:
        call: A call of onednn.
        job: It and its input's size.

    Raises:
        UnsupportedError: No row predicts which kernel runs it.
    """
    found = _first(call, job)
    if found is None or not found.scales:
        raise call.refuse(
            f"no row predicts the kernel of oneDNN {call.release} (torch {torch.__version__}) at "
            f"level {call.isa.onednn!r} for inputs of size {job.size}"
            f"{f': {found.name}' if found is not None else ''}"
        )
    return found


def _first(call: Call, job: Job) -> Row | None:
    level, kind = call.isa.onednn, job.shape.kind
    for row in ROWS:  # torch 2.6 compiles no next(rows, None)
        if row.kind == kind and level in row.levels and row.fits(job):
            return _of_release(row, job, call)
    return None


def _of_release(row: Row, job: Job, call: Call) -> Row:
    """A kernel as the release of this call has it; the rows are those of 3.12."""
    release, shape, pointed = call.release, job.shape, any(call.source.zero_points)
    strided = set(shape.stride) != {1}
    if release == "3.5":
        return replace(row, scales="joined" if row.name != "ref" else "")
    if release == "3.10" and row.name in ("jit_deconvolution", "conv:any"):
        plain = shape.in_fours and shape.pointwise and not strided  # run as a plain convolution
        return row if plain else replace(row, scales="joined")
    if release == "3.13" and row.name == "brg_matmul" and pointed:
        return replace(row, name="ref_int8", scales="reference")
    gaps = any(s > e for s, e in zip(shape.stride, shape.extent, strict=True))
    if release == "3.13" and row.kind == "transposed" and (gaps or (strided and row.gemm)):
        return replace(row, name="brgconv_strided or conv:any", scales="", gemm=False)
    return row


class Kernels:
    """Which kernel runs a call, by its input; the last answer is kept.

    Args:
        call: A call of onednn.
    """

    def __init__(self, call: Call) -> None:
        self.shape = geometry(call)
        # No node, module or weight: what holds this can be copied and saved.
        self.call = Call(
            call.node,
            call.engine,
            call.key,
            qparams=call.qparams[:1],
            isa=call.isa,
            threads=call.threads,
            release=call.release,
        )
        self.saturates = bool(pairs_of(call))
        self.last: tuple[Job, Row] | None = None

    def row(self, codes: Tensor) -> Row:
        """The row for an input.

        Raises:
            UnsupportedError: No row predicts which kernel runs it.
        """
        job = Job.of(self.call, self.shape, codes)
        if self.last is None or self.last[0] != job:
            self.last = job, row_for(self.call, job)
            if self.last[1].gemm and self.saturates and self.shape.inputs > _GEMM:
                raise self.call.refuse("no row says in which parts its matrix product is taken")
        return self.last[1]


def always_gemm(call: Call) -> bool:
    """Whether a call runs as a matrix product whatever its input's size, which writes all of it."""
    shape = geometry(call)
    job = Job(shape, call.source.container[0] < 0, call.threads, 1, (1,) * len(shape.kernel))
    found = _first(call, job)
    return found is not None and found.gemm


def pairs_of(call: Call) -> str:
    """Which products of a call its kernel adds at 16 bits.

    Args:
        call: A call of onednn with a weight.

    Returns:
        "channel": neighbouring input channels of a kernel position, padded to a multiple of 4;
        "halves": the same in halves of the inputs; "open": nobody knows; "" for none.
    """
    level, shape = call.isa.onednn, geometry(call)
    signed = call.source.container[0] < 0
    if level not in ("avx2", "avx512") or shape.depthwise:
        deep = level == "avx512" and shape.kind == "conv" and len(shape.kernel) == 3
        return "open" if shape.depthwise and deep else ""
    if shape.kind == "linear":
        plain = signed and (level == "avx512" or any(call.source.zero_points))
        return "" if plain else {"avx2": "halves", "avx512": "channel"}[level]
    if shape.kind == "transposed":
        return "channel"
    if level == "avx2":
        return "channel" if shape.groups == 1 or shape.in_fours else ""
    # CPUs with VBMI move the taps of one channel together.
    return "open" if shape.inputs == 1 and math.prod(shape.kernel) > 1 else "channel"


# --------------------------------------------------------------------------- conditions


def _always(job: Job) -> bool:
    return True


def _tiles_of_linear(job: Job) -> bool:
    rows, inputs, outputs = job.batch, job.shape.inputs, job.shape.outputs
    small = (rows == 1 and inputs == 256) or (rows <= 32 and rows * outputs <= 256)
    return not small and inputs > 16


def _is_signed(job: Job) -> bool:
    return job.signed


def _dilated(shape: Geometry) -> bool:
    return any(d > 1 for d in shape.dilation)


def _deep(job: Job) -> bool:
    """Depthwise in three dimensions."""
    return job.shape.depthwise and len(job.shape.kernel) == 3


def _odd_groups(job: Job) -> bool:
    """AVX2's kernels take groups of a multiple of 4 channels, or depthwise ones of two axes."""
    return _deep(job) or (job.shape.groups > 1 and not (job.shape.depthwise or job.shape.in_fours))


def _deep_dilated(job: Job) -> bool:
    return _deep(job) and _dilated(job.shape)


def _small_groups(job: Job) -> bool:
    """What AVX2-VNNI leaves to AVX2's kernels."""
    shape = job.shape
    return (shape.in_fours and shape.inputs <= 8) or (shape.depthwise and _dilated(shape))


def _depthwise(job: Job) -> bool:
    return job.shape.depthwise


def _unmeasured(job: Job) -> bool:
    """Lines, and images of a few pixels: the tiles' blocking fails on some of them."""
    if set(job.shape.kernel) == {1}:
        return len(job.out) == 1
    return len(job.out) == 1 or min(job.out[-2:]) == 1 or 4 < math.prod(job.out) < 16


def _few_pixels(job: Job) -> bool:
    shape = job.shape
    most = _L1 // 2 if shape.pointwise else _L1
    channels = job.batch * shape.groups * shape.inputs * shape.outputs
    return math.prod(job.out) <= 4 and shape.inputs <= 512 and channels <= most


def _pointwise_apart(job: Job) -> bool:
    """1x1 convolutions that AMX leaves to VNNI, or runs without its unrolled kernel."""
    shape = job.shape
    if not shape.pointwise:
        return False
    if shape.inputs % 4 and (set(shape.stride) == {1} or shape.inputs > 64):
        return True
    high = math.prod(job.out[:-1])
    small = shape.inputs * high <= 28_672 and shape.outputs * high <= 14_336
    return job.threads > 1 and job.batch == 1 and small


def _wide_copied(job: Job) -> bool:
    shape = job.shape
    copied = shape.padding[-1] > 0 or shape.inputs % (64 if shape.inputs > 64 else 4) != 0
    moved = (
        shape.kind == "conv"
        and shape.kernel[-1] > 1
        and shape.dilation[-1] == 1
        and shape.inputs < 32
    )
    return job.out[-1] >= _WIDE and copied and not moved


def _outside(job: Job) -> bool:
    return job.shape.outside


def _brgemm(width: int) -> Callable[[Job], bool]:
    """A transposed convolution of stride 1, run as a plain one.

    Args:
        width: How many sums a register holds.
    """

    def fits(job: Job) -> bool:
        shape = job.shape
        small = shape.depthwise or (shape.in_fours and shape.inputs <= width)
        return set(shape.stride) == {1} and not (small or shape.outside)

    return fits


def _strided(width: int) -> Callable[[Job], bool]:
    """A transposed convolution of a larger stride, which divides the output along each axis.

    Args:
        width: How many sums a register holds.
    """

    def fits(job: Job) -> bool:
        shape = job.shape
        small = shape.in_fours and shape.inputs <= width
        even = not any(n % s for n, s in zip(job.out, shape.stride, strict=True))
        return even and max(shape.stride) > 1 and not (small or shape.outside or _dilated(shape))

    return fits


def _jit(*blocks: tuple[int, int]) -> Callable[[Job], bool]:
    """A kernel of transposed convolutions.

    Args:
        blocks: Channels to a block, and registers, of each of its forms.
    """
    return lambda job: any(_held(job, block, registers) for block, registers in blocks)


def _held(job: Job, block: int, registers: int) -> bool:
    """Whether the registers that hold one stretch of outputs reach as far as the kernel does."""
    shape, width = job.shape, job.out[-1]
    if _deep(job) or shape.outside:
        return False
    if any(d > 1 and s > 1 for d, s in zip(shape.dilation, shape.stride, strict=True)):
        return False
    channels = shape.inputs, shape.outputs
    if shape.groups > 1 and not shape.depthwise and any(n % block for n in channels):
        block = 8 if block == 16 and not any(n % 8 for n in channels) else 4
        if any(n % block for n in channels):
            return False
    blocks, padding, step = -(-shape.outputs // block), shape.padding[-1], shape.stride[-1]
    fits = (n for n in range(min(4, blocks), 1, -1) if blocks % n == 0)
    most = registers // (next((n for n in fits if padding <= registers // (n + 1)), 1) + 1)
    reach = max(0, shape.extent[-1] - 1 - padding) // step * step
    return width < most or any(u % step == 0 and u >= reach for u in range(1, most + 1))


_UNI, _UNI_VNNI = _jit((8, 12), (4, 12)), _jit((8, 14), (4, 14))


def _as_plain(*conditions: Callable[[Job], bool]) -> Callable[[Job], bool]:
    """A condition of convolutions, asked of a transposed one of stride 1 that is run as one."""

    def fits(job: Job) -> bool:
        shape = job.shape
        if set(shape.stride) != {1} or shape.outside or shape.depthwise:
            return False
        padding = tuple(e - 1 - p for e, p in zip(shape.extent, shape.padding, strict=True))
        plain = replace(job, shape=replace(shape, padding=padding))
        return any(condition(plain) for condition in conditions)

    return fits


_AMX_APART = _as_plain(_few_pixels, _pointwise_apart, _wide_copied)
_ODD = "a line, or an image of a few pixels"
_ABOVE = ("avx2_vnni", "avx512", "vnni", "amx")
_BELOW = ("avx2", "avx2_vnni", "avx512", "vnni")

ROWS = (
    Row("gemm:jit", "linear", ("avx2",), _always, "joined"),
    Row("brg_matmul:amx", "linear", ("amx",), _tiles_of_linear, "joined", tiles=True),
    Row("ref_int8", "linear", _ABOVE, _is_signed, "reference"),
    Row("brg_matmul", "linear", _ABOVE, _always, "separate"),
    Row("ref", "conv", ("avx2",), _odd_groups, "reference"),
    Row("jit_uni_int8", "conv", ("avx2",), _always, "joined"),
    Row("ref", "conv", ("avx2_vnni",), _deep_dilated, "reference"),
    Row("jit_uni_int8", "conv", ("avx2_vnni",), _small_groups, "joined"),
    Row("gemm_s8u8s32", "conv", ("avx512",), _deep, "joined"),
    Row("gemm_s8u8s32", "conv", ("vnni", "amx"), _deep_dilated, "joined"),
    Row("brg_conv, jit_int8", "conv", ("avx2_vnni", "avx512", "vnni"), _always, "separate"),
    Row("brdgmm_dw", "conv", ("amx",), _depthwise, "separate"),
    Row(_ODD, "conv", ("amx",), _unmeasured, ""),
    Row("brg_conv:vnni", "conv", ("amx",), _few_pixels, "separate"),
    Row("brgconv_1x1 without uker", "conv", ("amx",), _pointwise_apart, "separate"),
    Row("brg_conv without uker", "conv", ("amx",), _wide_copied, "separate"),
    Row("brg_conv:vnni", "conv", ("amx",), _outside, "separate"),
    Row("brg_conv:amx", "conv", ("amx",), _always, "joined", tiles=True),
    Row("brg_deconv", "transposed", ("avx2_vnni",), _brgemm(8), "separate"),
    Row("brg_deconv", "transposed", ("avx512", "vnni"), _brgemm(16), "separate"),
    Row(_ODD, "transposed", ("amx",), _as_plain(_unmeasured), ""),
    Row("brg_deconv", "transposed", ("amx",), _AMX_APART, "separate"),
    Row("brg_deconv:amx", "transposed", ("amx",), _as_plain(_always), "joined", tiles=True),
    Row("brgconv_strided", "transposed", ("avx2_vnni",), _strided(8), "separate"),
    Row("brgconv_strided", "transposed", ("avx512", "vnni", "amx"), _strided(16), "separate"),
    Row("jit_deconvolution", "transposed", ("avx512",), _jit((16, 28)), "separate"),
    Row("jit_deconvolution", "transposed", ("vnni", "amx"), _jit((16, 30)), "separate"),
    Row("jit_uni_int8", "transposed", ("avx2",), _UNI, "joined"),
    Row("jit_uni_int8", "transposed", ("avx2_vnni",), _UNI_VNNI, "joined"),
    Row("another level's kernel", "transposed", ("avx512", "vnni"), _UNI_VNNI, ""),
    Row("conv:any", "transposed", _BELOW, _always, "reference", gemm=True),
)

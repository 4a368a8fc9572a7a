"""Kernels that are plainly wrong: what, where, when, and the way round; each row can be probed.

A probe runs the kernel on a few values beside the same op in float and says whether it is still
wrong here, so that a torch release which repairs it turns the row off. Nothing of this follows a
version number.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxqfix import _torch
from fxqfix.engines._base import Call

__all__ = ["DEFECTS", "Defect", "find"]


@dataclass(frozen=True)
class Defect:
    """A kernel that computes something else than its op.

    Attributes:
        name: Short name of the row.
        engines: The engines whose kernel it is; x86 dispatches to fbgemm or onednn.
        ops: Keys of the op table's rows.
        condition: When.
        effect: What comes out.
        way_round: What to do instead.
        applies: Whether a call meets the condition, as far as the graph tells.
        probe: Runs the kernel: True where it is wrong on this machine.
        emulated: Whether the effect is arithmetic that `emulate` follows; else it refuses.
    """

    name: str
    engines: tuple[str, ...]
    ops: tuple[str, ...]
    condition: str
    effect: str
    way_round: str
    applies: Callable[[Call], bool]
    probe: Callable[[], bool]
    emulated: bool = False

    @functools.cached_property
    def present(self) -> bool | None:
        """Whether the kernel is wrong here; None where this torch lacks the engine."""
        available = torch.backends.quantized.supported_engines
        if not any(engine in available for engine in self.engines):
            return None
        with _torch.quiet(), _torch.same_rng(), torch.no_grad():
            return self.probe()


def find(call: Call) -> Defect | None:
    """The row that a call meets, whether or not this machine still shows it.

    Args:
        call: An int8 op, its engine dispatched.
    """
    rows = (d for d in DEFECTS if call.engine in d.engines and call.key in d.ops)
    return next((d for d in rows if d.applies(call)), None)


# ------------------------------------------------------------------- when they strike


def _channels(call: Call) -> tuple[int, int]:
    """(input, output) channels of a transposed convolution, per group."""
    if call.weight is None:
        return 0, 0
    return call.weight.codes.shape[0], call.weight.codes.shape[1]


def _permutes(call: Call) -> bool:
    inputs, outputs = _channels(call)
    return inputs != outputs and min(inputs, outputs) > 1


def _small_kernel(call: Call) -> bool:
    inputs, outputs = _channels(call)
    if call.weight is None or inputs % 8 or outputs % 8:
        return False
    kernel = tuple(call.weight.codes.shape[2:])
    strides, padding = call.option("stride"), call.option("padding")
    return kernel[0] == 2 and kernel[1] <= 6 and max(strides) <= 2 and not any(padding)


def _skips_rows(call: Call) -> bool:
    if call.weight is None:
        return False
    kernel = call.weight.codes.shape[2:]
    strides = list(call.option("stride"))[-len(kernel) :]
    return any(s >= k + 2 for s, k in zip(strides[:-1], kernel[:-1], strict=True))


def _per_channel(call: Call) -> bool:
    return call.weight is not None and call.weight.qparams.axis is not None


def _excludes_padding(call: Call) -> bool:
    padding = call.option("padding", 0)
    padded = any(padding) if isinstance(padding, list | tuple) else bool(padding)
    return padded and not call.option("count_include_pad", True)


def _odd_groups(call: Call) -> bool:
    if call.weight is None or call.isa != "avx2":
        return False
    return call.option("groups", 1) == 3 and call.weight.codes.shape[1] == 4


# ---------------------------------------------------------------------------- probes


def _quantized(x: Tensor, scale: float = 1 / 16, point: int = 64) -> Tensor:
    return torch.quantize_per_tensor(x, scale, point, torch.quint8)


def _noise(*shape: int) -> Tensor:
    """Values on a grid of 1/16 in [-2, 2): every step of the probes is exact."""
    count = int(torch.tensor(shape).prod())
    return (torch.arange(count) * 37 % 64 - 32).reshape(shape) / 16.0


def _far(found: Tensor, wanted: Tensor) -> bool:
    """More than 2 codes apart: no rounding is."""
    return bool(((found.dequantize() - wanted).abs() > 2.1 * found.q_scale()).any())


def _transposed(engine: str, inputs: int, outputs: int, kernel: int, stride: int) -> bool:
    x, w = _quantized(_noise(1, inputs, 4, 4)), _noise(inputs, outputs, kernel, kernel)
    weight = torch.quantize_per_tensor(w, 1 / 16, 0, torch.qint8)
    ops: Any = torch.ops.quantized
    steps = [stride, stride], [0, 0], [0, 0], [1, 1]
    with _torch.quantized_engine(engine):
        packed = ops.conv_transpose2d_prepack(weight, None, *steps, 1)
        found = ops.conv_transpose2d(x, packed, 1.0, 128)
    wanted = F.conv_transpose2d(x.dequantize(), weight.dequantize(), stride=stride)
    return _far(found, wanted.clamp(-128, 127))


def _leaves_rows() -> bool:
    """What is never written holds what was there before: each time something else."""
    x = _quantized(_noise(2, 8, 9, 9))
    weight = torch.quantize_per_tensor(_noise(8, 8, 1, 1), 1 / 16, 0, torch.qint8)
    ops: Any = torch.ops.quantized
    with _torch.quantized_engine("onednn"):
        packed = ops.conv_transpose2d_prepack(weight, None, [3, 3], [0, 0], [0, 0], [1, 1], 1)
        size = ops.conv_transpose2d(x, packed, 1.0, 128).numel()
        for filled in range(0, 256, 15):
            before = [torch.full((size,), filled, dtype=torch.uint8) for _ in range(8)]
            del before  # freed memory is what the kernel gets next
            found = ops.conv_transpose2d(x, packed, 1.0, 128).int_repr()
            if bool((found[:, :, 2::3] != 128).any()):
                return True
    return False


def _refuses_per_channel() -> bool:
    weight = torch.quantize_per_channel(
        _noise(2, 2, 2, 2), torch.ones(2), torch.zeros(2, dtype=torch.long), 1, torch.qint8
    )
    ops: Any = torch.ops.quantized
    with _torch.quantized_engine("fbgemm"):
        try:
            ops.conv_transpose2d_prepack(weight, None, [1, 1], [0, 0], [0, 0], [1, 1], 1)
        except RuntimeError:
            return True
    return False


def _counts_padding() -> bool:
    x = _quantized(_noise(1, 2, 4, 4))
    options: Any = {"padding": 1, "count_include_pad": False}
    with _torch.quantized_engine("qnnpack"):
        found = F.avg_pool2d(x, 3, **options)
    return _far(found, F.avg_pool2d(x.dequantize(), 3, **options))


def _relu6_moves() -> bool:
    x = _quantized(_noise(1, 3, 4, 4)).contiguous(memory_format=torch.channels_last)
    with _torch.quantized_engine("qnnpack"):
        found = F.relu6(x)
    return _far(found, F.relu6(x.dequantize()))


def _depthwise_saturates() -> bool:
    """The hottest codes there are, also on CPUs with VNNI."""
    x = torch.full((1, 8, 5, 5), 255.0)
    weight = torch.quantize_per_tensor(torch.full((8, 1, 3, 3), 127.0), 1.0, 0, torch.qint8)
    ops: Any = torch.ops.quantized
    with _torch.quantized_engine("fbgemm"):
        packed = ops.conv2d_prepack(weight, None, [1, 1], [1, 1], [1, 1], 8)
        found = ops.conv2d(_quantized(x, 1.0, 0), packed, 9 * 127.0 * 255 / 250, 0)
    return int(found.int_repr()[0, 0, 2, 2]) != 250


_CRASH = """
import torch
torch.backends.quantized.engine = "fbgemm"
w = torch.quantize_per_tensor(torch.ones(12, 4, 3, 3), 1.0, 0, torch.qint8)
packed = torch.ops.quantized.conv2d_prepack(w, None, [1, 1], [1, 1], [1, 1], 3)
x = torch.quantize_per_tensor(torch.ones(2, 12, 9, 9), 1.0, 0, torch.quint8)
for _ in range(20):
    torch.ops.quantized.conv2d(x, packed, 1.0, 0)
"""


def _crashes() -> bool:
    done = subprocess.run(  # this interpreter, with the text above
        [sys.executable, "-W", "ignore", "-c", _CRASH], capture_output=True, check=False
    )
    return done.returncode < 0


_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")

DEFECTS: tuple[Defect, ...] = (
    Defect(
        "depthwise-saturation",
        ("fbgemm",),
        ("conv2d",),
        "depthwise 3x3 or 5x5 with same padding and channels a multiple of 8, VNNI or not",
        "pairs of taps saturate at 16 bits: up to 79% of the codes on hot full-range input",
        "reduce_range: activations in [0,127] never saturate",
        lambda call: False,  # int16-saturation counts it
        _depthwise_saturates,
        emulated=True,
    ),
    Defect(
        "transposed-permutes",
        ("onednn",),
        _TRANSPOSED,
        "input channels != output channels, both > 1",
        "weights are permuted: SQNR about -3 dB",
        "qnnpack, or a float island",
        _permutes,
        lambda: _transposed("onednn", 2, 3, 3, 1),
    ),
    Defect(
        "transposed-skips-rows",
        ("onednn",),
        _TRANSPOSED,
        "stride >= kernel + 2 along any axis but the last",
        "rows that no input reaches are not written: they hold whatever memory held",
        "a stride of at most kernel + 1, another engine, or a float island",
        _skips_rows,
        _leaves_rows,
    ),
    Defect(
        "transposed-2x2",
        ("fbgemm",),
        ("conv_transpose2d",),
        "kernel height 2, width up to 6, padding 0, channels multiples of 8; stride 2, or several "
        "images",
        "SQNR -10 to -20 dB",
        "qnnpack, or a float island",
        _small_kernel,
        lambda: _transposed("fbgemm", 8, 8, 2, 2),
    ),
    Defect(
        "transposed-per-channel",
        ("fbgemm", "onednn"),
        _TRANSPOSED,
        "per-channel weights",
        "raises",
        "per-tensor weights, or qnnpack",
        _per_channel,
        _refuses_per_channel,
    ),
    Defect(
        "average-counts-padding",
        ("qnnpack",),
        ("avg_pool2d",),
        "count_include_pad=False with padding",
        "the option is ignored: errors up to 119 codes; 1x1 pools raise",
        "pad by hand and divide, or a float island",
        _excludes_padding,
        _counts_padding,
    ),
    Defect(
        "relu6-channels-last",
        ("qnnpack",),
        ("relu6", "hardtanh", "clamp"),
        "a channels-last input, which is what qnnpack's convolutions give",
        "memory is read in its own order: values are permuted (392 of 576 codes wrong)",
        "make the input contiguous first",
        lambda call: True,  # no graph tells the layout
        _relu6_moves,
        emulated=True,
    ),
    Defect(
        "three-groups-crash",
        ("fbgemm",),
        ("conv2d",),
        "3 groups of 4 input channels on CPUs without AVX512",
        "corrupts the heap: the process may die",
        "another number of groups, or qnnpack",
        _odd_groups,
        _crashes,
    ),
)

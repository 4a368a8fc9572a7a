"""When a known-wrong kernel strikes: conditions on a call, some on the size of its input too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxqfix.engines._base import Call
from fxqfix.engines.isa import Isa
from fxqfix.engines.onednn import always_gemm
from fxqfix.engines.saturation import groups_together, runs_grouped
from fxqfix.qparams import container_range

__all__ = [
    "both_signed",
    "clips_slopes",
    "excludes_padding",
    "four_channels",
    "may_lie_outside",
    "narrow",
    "on_amx",
    "on_avx512",
    "one_deep",
    "one_plane",
    "one_wide",
    "output_padding",
    "outside",
    "overruns_groups",
    "pads_rows",
    "per_channel",
    "permutes",
    "remembers",
    "signed",
    "skips_rows",
    "small_kernel",
    "unknown_padding",
    "zero_points",
]


def on_amx(isa: Isa) -> bool:
    """Only oneDNN's kernels with AMX tiles."""
    return isa.onednn == "amx"


def on_avx512(isa: Isa) -> bool:
    """All of oneDNN's kernels with AVX512."""
    return isa.onednn in ("avx512", "vnni", "amx")


def _channels(call: Call) -> tuple[int, int]:
    """(input, output) channels of a group."""
    if call.weight is None:
        return 0, 0
    shape, groups = call.weight.codes.shape, int(call.option("groups", 1))
    if call.spec.transposed:
        return shape[0] // groups, shape[1]
    return shape[1], shape[0] // groups


def _geometry(call: Call) -> dict[str, list[int]]:
    """Kernel, stride, padding and dilation, axis by axis; a packed conv1d has one axis too many."""
    kernel = list(call.weight.codes.shape[2:]) if call.weight is not None else []
    found = {"kernel": kernel}
    for name in ("stride", "padding", "dilation"):
        value = call.option(name, 1 if name != "padding" else 0)
        axes = list(value) if isinstance(value, list | tuple) else [value] * len(kernel)
        found[name] = axes[-len(kernel) :] if kernel else []
    return found


def _whole(call: Call) -> bool:
    """Whether all of the geometry is numbers: padding="same" is none."""
    return all(isinstance(n, int) for axes in _geometry(call).values() for n in axes)


def _depthwise(call: Call) -> bool:
    return call.option("groups", 1) > 1 and _channels(call) == (1, 1)


def _has_zero_point(call: Call) -> bool:
    """Whether the input has one; True where its grid is not known."""
    grid = call.qparams[0] if call.qparams else None
    return grid is None or any(grid.zero_points)


def permutes(call: Call) -> bool:
    """Other input than output channels in a group of a transposed convolution, both several."""
    inputs, outputs = _channels(call)
    return inputs != outputs and min(inputs, outputs) > 1


def small_kernel(call: Call) -> bool:
    """What fbgemm packs for its kernel for 2 x n transposed convolutions."""
    inputs, outputs = _channels(call)
    if call.weight is None or inputs % 8 or outputs % 8 or call.option("groups", 1) != 1:
        return False
    kernel, stride, padding, dilation = _geometry(call).values()
    small = kernel[0] == 2 and kernel[-1] <= 6 and max(stride) <= 2
    return small and not any(padding) and set(dilation) == {1}


def skips_rows(call: Call) -> bool:
    """A stride over rows that no input reaches, and a kernel that doesn't write them."""
    if call.weight is None or not _has_zero_point(call):
        return False
    kernel, stride, padding, dilation = _geometry(call).values()
    axes = list(zip(kernel, stride, padding, dilation, strict=True))
    if call.release == "3.13":  # its kernel for strides, whatever else it fits
        return any(s > d * (k - 1) + 1 for k, s, _, d in axes)
    if any((d > 1 and s > 1) or p >= d * (k - 1) + 1 for k, s, p, d in axes):
        return False  # oneDNN's reference runs, which writes all
    return not always_gemm(call) and any(s >= k + 2 for k, s, _, _ in axes[:-1])


def per_input_channel(call: Call) -> bool:
    """Of a transposed convolution of one group, whose weight has the inputs on axis 0."""
    return (
        call.weight is not None
        and call.weight.qparams.axis == 0
        and (call.option("groups", 1) == 1)
    )


def per_channel(call: Call) -> bool:
    """Scales for each channel."""
    return call.weight is not None and call.weight.qparams.axis is not None


def excludes_padding(call: Call) -> bool:
    """An average that leaves padding out."""
    padding = call.option("padding", 0)
    padded = any(padding) if isinstance(padding, list | tuple) else bool(padding)
    return padded and not call.option("count_include_pad", True)


def overruns_groups(call: Call) -> bool:
    """Groups that are left over where fbgemm's kernel takes several at a time."""
    return runs_grouped(call) and call.option("groups", 1) % groups_together(call) != 0


def zero_points(call: Call) -> bool:
    """A weight that is not symmetric."""
    return call.weight is not None and any(call.weight.qparams.zero_points)


def signed(call: Call) -> bool:
    """A qint8 input."""
    return bool(call.qparams) and call.qparams[0] is not None and call.source.storage == torch.int8


def unknown_padding(call: Call) -> bool:
    """Padding that torch's quantized modules have no form of."""
    known = call.option("padding_mode", "zeros") in ("zeros", "reflect")
    return not known or isinstance(call.option("padding"), str)


def output_padding(call: Call) -> bool:
    """Output padding along any axis."""
    found = call.option("output_padding", 0)
    return any(found) if isinstance(found, list | tuple) else bool(found)


def remembers(call: Call) -> bool:
    """Only a new input scale makes qnnpack set its kernel up again."""
    if not call.qparams or call.qparams[0] is None:
        return False
    mine = call.qparams[0]
    return any(
        g is not None and g.scales == mine.scales and g.zero_points != mine.zero_points
        for g in call.others
    )


def clips_slopes(call: Call) -> bool:
    """Of a float module not told: its grid is chosen in conversion, and its slopes may train on."""
    if isinstance(call.module, nn.PReLU):
        return True
    weight: Any = call.option("weight")
    if not isinstance(weight, Tensor) or not weight.is_quantized:
        return False
    (low, high), point = container_range(weight.dtype), weight.q_zero_point()
    codes = weight.int_repr().int()
    if point == low and bool((codes == low).any()) and int(codes.max()) <= low + 128:
        return True  # a qint8 grid reaches 128, one made for quint8 its end: negative slopes went
    return not low <= point + round(1 / weight.q_scale()) <= high


def both_signed(call: Call) -> bool:
    """Two qint8 inputs."""
    dtypes = [None if q is None else q.dtype for q in call.qparams]
    return dtypes == [torch.qint8, torch.qint8]


# ------------------------------------------------------- what the input's size decides


def may_lie_outside(call: Call) -> bool:
    """Whether there is a width at which every window lies in the padding."""
    if call.weight is None or _depthwise(call) or not _whole(call):
        return False
    if set(_geometry(call)["kernel"]) == {1} and call.option("groups", 1) == 1:
        return False  # oneDNN has a kernel for these
    last = [axes[-1] for axes in _geometry(call).values()]
    _, stride, _, dilation = last
    return any(_all_outside(width, *last) for width in range(1, max(stride, dilation) + 1))


def outside(call: Call, shape: Sequence[int]) -> bool:
    """Whether every window lies in the padding along the width, and only there.

    With one output along it, the sums are right where no zero point has to be corrected.
    """
    axes = list(zip(*_geometry(call).values(), strict=True))
    *others, last = (
        _all_outside(size, *axis) for size, axis in zip(shape[-len(axes) :], axes, strict=True)
    )
    several = _outputs(call, shape)[-1] > 1
    return last and not any(others) and (several or _has_zero_point(call))


def _all_outside(width: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    count = (width + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    taps = (i * stride - padding + j * dilation for i in range(count) for j in range(kernel))
    return count > 0 and not any(0 <= tap < width for tap in taps)


def _outputs(call: Call, shape: Sequence[int]) -> list[int]:
    axes = zip(shape[-len(_geometry(call)["kernel"]) :], *_geometry(call).values(), strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes]


def one_wide(call: Call) -> bool:
    """Steps along the width of a kernel that is wider than one."""
    if call.weight is None or _depthwise(call) or not _whole(call):
        return False
    kernel, stride, _, _ = _geometry(call).values()
    return len(kernel) > 1 and kernel[-1] > 1 and stride[-1] > 1


def points_outside(call: Call) -> bool:
    """A 1x1 convolution of oneDNN 3.5 whose windows can lie in the padding wholly."""
    if call.release != "3.5" or call.weight is None or _depthwise(call):
        return False
    kernel, _, padding, _ = _geometry(call).values()
    return set(kernel) == {1} and any(padding)


def narrow(call: Call, shape: Sequence[int]) -> bool:
    """Whether the result is one wide and has several rows."""
    *rows, width = _outputs(call, shape)
    return width == 1 and any(n > 1 for n in rows)


def pads_rows(call: Call) -> bool:
    """Padding along the height and none along the width, with a zero point."""
    if call.weight is None or _depthwise(call) or not _whole(call) or not _has_zero_point(call):
        return False
    padding = _geometry(call)["padding"]
    return any(padding[:-1]) and not padding[-1]


def four_channels(call: Call) -> bool:
    """The same, of a kernel that steps over an image of four channels."""
    stride = _geometry(call)["stride"]
    return pads_rows(call) and _channels(call)[0] == 4 and max(stride) > 1


def one_plane(call: Call) -> bool:
    """A kernel that is deeper than one, padded along the depth, over less than four channels."""
    if call.weight is None or not _whole(call) or len(_geometry(call)["kernel"]) != 3:
        return False
    kernel, _, padding, _ = _geometry(call).values()
    return kernel[0] > 1 and padding[0] > 0 and _channels(call)[0] < 4


def one_deep(call: Call, shape: Sequence[int]) -> bool:
    """Whether the image has one plane."""
    return shape[-3] == 1

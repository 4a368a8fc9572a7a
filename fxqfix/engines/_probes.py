"""Probes of known-wrong kernels: each runs one beside the same op in float.

True where the kernel is wrong on this machine.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxqfix import _torch
from fxqfix.engines import _apart


def _quantized(x: Tensor, scale: float = 1 / 16, point: int = 64) -> Tensor:
    return torch.quantize_per_tensor(x, scale, point, torch.quint8)


def _noise(*shape: int) -> Tensor:
    """Values on a grid of 1/16 in [-2, 2): every step of the probes is exact."""
    count = int(torch.tensor(shape).prod())
    return (torch.arange(count) * 37 % 64 - 32).reshape(shape) / 16.0


def _far(found: Tensor, wanted: Tensor) -> bool:
    """More than 2 codes apart: no rounding is."""
    return bool(((found.dequantize() - wanted).abs() > 2.1 * found.q_scale()).any())


def transposed(engine: str, inputs: int, outputs: int, kernel: int, stride: int) -> bool:
    x, w = _quantized(_noise(1, inputs, 4, 4)), _noise(inputs, outputs, kernel, kernel)
    weight = torch.quantize_per_tensor(w, 1 / 16, 0, torch.qint8)
    ops: Any = torch.ops.quantized
    steps = [stride, stride], [0, 0], [0, 0], [1, 1]
    with _torch.quantized_engine(engine):
        packed = ops.conv_transpose2d_prepack(weight, None, *steps, 1)
        found = ops.conv_transpose2d(x, packed, 1.0, 128)
    wanted = F.conv_transpose2d(x.dequantize(), weight.dequantize(), stride=stride)
    return _far(found, wanted.clamp(-128, 127))


def leaves_rows() -> bool:
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


def refuses_per_channel() -> bool:
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


def counts_padding() -> bool:
    x = _quantized(_noise(1, 2, 4, 4))
    options: Any = {"padding": 1, "count_include_pad": False}
    with _torch.quantized_engine("qnnpack"):
        found = F.avg_pool2d(x, 3, **options)
    return _far(found, F.avg_pool2d(x.dequantize(), 3, **options))


def relu6_moves() -> bool:
    x = _quantized(_noise(1, 3, 4, 4)).contiguous(memory_format=torch.channels_last)
    with _torch.quantized_engine("qnnpack"):
        found = F.relu6(x)
    return _far(found, F.relu6(x.dequantize()))


def depthwise_saturates() -> bool:
    """The hottest codes there are, also on CPUs with VNNI."""
    x = torch.full((1, 8, 5, 5), 255.0)
    weight = torch.quantize_per_tensor(torch.full((8, 1, 3, 3), 127.0), 1.0, 0, torch.qint8)
    ops: Any = torch.ops.quantized
    with _torch.quantized_engine("fbgemm"):
        packed = ops.conv2d_prepack(weight, None, [1, 1], [1, 1], [1, 1], 8)
        found = ops.conv2d(_quantized(x, 1.0, 0), packed, 9 * 127.0 * 255 / 250, 0)
    return int(found.int_repr()[0, 0, 2, 2]) != 250


_ONES = [1, 1]


def overruns_groups() -> bool | None:
    """5 groups of 4 channels leave one over with AVX512 and without."""
    options: Any = {"kernel": [3, 3], "stride": _ONES, "padding": _ONES, "dilation": _ONES}
    return _apart.ask(engine="fbgemm", shape=[2, 20, 9, 9], outputs=20, groups=5, **options)


def dies_outside() -> bool | None:
    options: Any = {"kernel": [2, 2], "stride": [2, 2], "padding": [1, 3], "dilation": [2, 2]}
    return _apart.ask(engine="onednn", shape=[1, 16, 8, 1], outputs=16, **options)


def corrupts_heap() -> bool | None:
    options: Any = {"kernel": [7, 7], "stride": [2, 2], "padding": [1, 0], "dilation": _ONES}
    return _apart.ask(engine="onednn", shape=[1, 4, 7, 600], outputs=16, times=20, **options)


def mistakes_points_outside() -> bool | None:
    options: Any = {"kernel": [1, 1], "stride": [1, 3], "padding": [0, 2], "dilation": [1, 1]}
    return _apart.ask(engine="onednn", shape=[1, 16, 8, 1], outputs=16, point=0, **options)


def forgets_padded_rows() -> bool | None:
    options: Any = {"kernel": [3, 1], "stride": _ONES, "padding": [1, 0], "dilation": _ONES}
    return _apart.ask(engine="onednn", shape=[1, 16, 20, 100], outputs=16, **options)


def mistakes_one_plane() -> bool | None:
    one = [1, 1, 1]
    options: Any = {"kernel": [3, 7, 7], "stride": one, "padding": [1, 3, 3], "dilation": one}
    return _apart.ask(engine="onednn", shape=[1, 3, 1, 28, 28], outputs=4, **options)


def mistakes_narrow() -> bool | None:
    options: Any = {"kernel": [3, 3], "stride": [2, 2], "padding": [0, 0], "dilation": _ONES}
    return _apart.ask(engine="onednn", shape=[1, 16, 21, 3], outputs=16, **options)


def writes_one_plane() -> bool:
    """What is never written holds what was there before: each time something else."""
    weight = torch.quantize_per_tensor(torch.ones(2, 2, 1, 1, 1), 1.0, 0, torch.qint8)
    x, ops = _quantized(_noise(1, 2, 4, 4, 4)), cast(Any, torch.ops.quantized)
    with _torch.quantized_engine("qnnpack"):
        options = [1] * 3, [0] * 3, [0] * 3, [1] * 3, 1
        packed = ops.conv_transpose3d_prepack(weight, None, *options)
        for filled in range(0, 256, 15):
            before = [torch.full((x.numel(),), filled, dtype=torch.uint8) for _ in range(8)]
            del before  # freed memory is what the kernel gets next
            found = ops.conv_transpose3d(x, packed, 1.0, 128)
            wanted = x.dequantize().sum(1, keepdim=True).expand(x.shape)
            if _far(found, wanted):
                return True
    return False


def keeps_activation() -> bool:
    """The kernel that the first call made is used by the second, relu and all."""
    weight = torch.quantize_per_tensor(_noise(4, 2), 1 / 16, 0, torch.qint8)
    x, ops = _quantized(_noise(3, 2)), cast(Any, torch.ops.quantized)
    with _torch.quantized_engine("onednn"):
        packed = ops.linear_prepack(weight, None)
        ops.linear(x, packed, 1 / 8, 128)
        found = ops.linear_relu(x, packed, 1 / 8, 128)
    return _far(found, F.linear(x.dequantize(), weight.dequantize()).clamp(0, 15.875))


def norm_cancels() -> bool:
    """Squares are added in float32, pixel by pixel: the variance of like codes cancels."""
    codes = torch.arange(4 * 64 * 64).reshape(1, 4, 64, 64) % 3 + 200
    x = _quantized((codes - 64) / 16).contiguous(memory_format=torch.channels_last)
    ops: Any = torch.ops.quantized
    found = ops.instance_norm(x, torch.ones(4), torch.zeros(4), 1e-5, 1 / 16, 128)
    return _far(found, F.instance_norm(x.dequantize(), eps=1e-5))


def norm_skips_images() -> bool:
    """What is never written holds what was there before: each time something else."""
    x = _quantized(_noise(8, 4, 2, 1)).contiguous(memory_format=torch.channels_last)
    ops: Any = torch.ops.quantized
    wanted = F.instance_norm(x.dequantize(), eps=1e-5)
    for filled in range(0, 256, 15):
        before = [torch.full((x.numel(),), filled, dtype=torch.uint8) for _ in range(8)]
        del before
        if _far(ops.instance_norm(x, torch.ones(4), torch.zeros(4), 1e-5, 1 / 16, 128), wanted):
            return True
    return False


def one_pixel_mixes() -> bool:
    """A contiguous image of one pixel is taken for a channels-last one, and the result isn't."""
    x = _quantized(_noise(1, 6, 1, 1))
    return _far(F.interpolate(x, size=(2, 2)), F.interpolate(x.dequantize(), size=(2, 2)))


def softmax_transposes() -> bool:
    """Qnnpack's own kernel writes rows as columns."""
    x = _quantized(_noise(5, 3))
    ops: Any = torch.ops.quantized
    with _torch.quantized_engine("qnnpack"):
        found = ops.softmax(x.t(), 0, 1 / 256, 0)
    return _far(found, torch.softmax(x.t().dequantize(), 0))


def remembers_padding() -> bool:
    """The padding keeps the zero point of the call that set the kernel up."""
    weight = torch.quantize_per_tensor(torch.ones(1, 1, 3, 3), 1.0, 0, torch.qint8)
    ops: Any = torch.ops.quantized
    with _torch.quantized_engine("qnnpack"):
        packed = ops.conv2d_prepack(weight, None, [1, 1], [1, 1], [1, 1], 1)
        for point in (0, 5):
            x = _quantized(torch.ones(1, 1, 4, 4), 1.0, point)
            found = ops.conv2d(x, packed, 1.0, 128)
    return _far(found, F.conv2d(x.dequantize(), weight.dequantize(), padding=1))


def ranges_over_memory() -> bool:
    """The range of a strided input is taken from the memory that it lies in."""
    x = torch.ones(1, 1, 4, 8)
    x[..., 1::2] = 1000.0
    weight = torch.quantize_per_tensor(torch.ones(1, 1, 1, 1), 1.0, 0, torch.qint8)
    ops: Any = torch.ops.quantized
    with _torch.quantized_engine("fbgemm"):
        packed = ops.conv2d_prepack(weight, None, [1, 1], [0, 0], [1, 1], 1)
        found = ops.conv2d_dynamic(x[..., ::2], packed, False)
    return bool((found - 1.0).abs().max() > 0.5)


def bag_sums() -> bool:
    """Torch's conversion drops the mode, and the kernel adds."""
    nnq = _torch.resolve("torch.ao.nn.quantized")
    qconfig = _torch.resolve("torch.ao.quantization.float_qparams_weight_only_qconfig")
    if nnq is None or qconfig is None:
        return False
    bag = nn.EmbeddingBag(5, 8, mode="mean").eval()
    bag.qconfig = qconfig
    indices = torch.tensor([[0, 1, 2], [2, 3, 4]])
    found, wanted = nnq.EmbeddingBag.from_float(bag)(indices), bag(indices)
    return bool(((found - wanted).abs() > 0.5 * wanted.abs().max()).any())


def refuses_zero_points() -> bool:
    weight = torch.quantize_per_tensor(_noise(2, 2, 1, 1), 1 / 16, 3, torch.qint8)
    return _refuses("onednn", "conv2d_prepack", weight, None, [1, 1], [0, 0], [1, 1], 1)


_PACKING = ("fbgemm", "onednn", "qnnpack")  # engines with packed weights of their own


def refuses_signed_conv() -> bool:
    return all(
        _refuses_signed(e, "conv2d", (2, 2, 1, 1), [1, 1], [0, 0], [1, 1], 1) for e in _PACKING
    )


def refuses_signed_linear() -> bool:
    return all(_refuses_signed(engine, "linear", (2, 2)) for engine in ("fbgemm", "qnnpack"))


def _refuses_signed(engine: str, name: str, shape: tuple[int, ...], *options: Any) -> bool:
    """Whether a kernel refuses qint8 activations, where this torch has the engine."""
    if engine not in torch.backends.quantized.supported_engines:
        return True
    ops: Any = torch.ops.quantized
    x, weight = (torch.quantize_per_tensor(_noise(*shape), 1 / 16, 0, torch.qint8) for _ in "xw")
    with _torch.quantized_engine(engine):
        packed = getattr(ops, f"{name}_prepack")(weight, None, *options)
        try:
            getattr(ops, name)(x, packed, 1.0, 0)
        except RuntimeError:
            return True
    return False


def refuses_output_padding() -> bool:
    weight, one = torch.quantize_per_tensor(_noise(2, 2, 3, 3), 1 / 16, 0, torch.qint8), [1, 1]
    options = [2, 2], [0, 0], one, one, 1
    return _refuses("onednn", "conv_transpose2d_prepack", weight, None, *options)


def keeps_packed() -> bool:
    weight = torch.quantize_per_tensor(_noise(2, 2, 1, 1, 1), 1 / 16, 0, torch.qint8)
    ops: Any = torch.ops.quantized
    with _torch.quantized_engine("qnnpack"):
        packed = ops.conv3d_prepack(weight, None, [1] * 3, [0] * 3, [1] * 3, 1)
    try:
        packed.unpack()
    except RuntimeError:
        return True
    return False


def has_no_volume_pool() -> bool:
    with _torch.quantized_engine("qnnpack"):
        try:
            F.max_pool3d(_quantized(_noise(1, 2, 2, 2, 2)), 2)
        except RuntimeError:
            return True
    return False


def refuses_padding() -> bool:
    convolution = _torch.resolve("torch.ao.nn.quantized.Conv2d")
    if convolution is None:
        return False
    try:
        convolution(2, 2, 3, padding=1, padding_mode="circular")
    except (NotImplementedError, ValueError):
        return True
    return False


def clips_slopes() -> bool:
    """Torch's conversion loses signs, the kernel a 1 that is off the slopes' grid."""
    prelu = _torch.resolve("torch.ao.nn.quantized.PReLU")
    qconfig = _torch.resolve("torch.ao.quantization.default_qconfig")
    if prelu is None or qconfig is None:
        return False
    given: Any = nn.PReLU(2)
    given.weight.data = torch.tensor([-0.5, 0.5])
    given.qconfig = qconfig
    given.activation_post_process = qconfig.activation()
    given.activation_post_process(_noise(2, 2))
    if bool((prelu.from_float(given).weight.dequantize() >= 0).all()):
        return True
    x, slope = _quantized(_noise(1, 1, 8)), torch.full((1,), 0.25)
    weight = torch.quantize_per_tensor(slope, 0.25 / 255, 0, torch.quint8)
    ops: Any = torch.ops.quantized
    return _far(ops.prelu(x, weight, 1 / 16, 64), F.prelu(x.dequantize(), slope))


def writes_over() -> bool:
    """The result is written to the memory of what was added, its grid too."""
    channels_last = {"memory_format": torch.channels_last}
    x, added = (_quantized(_noise(1, 2, 3, 3)).contiguous(**channels_last) for _ in range(2))
    weight = torch.quantize_per_tensor(_noise(2, 2, 1, 1), 1 / 16, 0, torch.qint8)
    before, ops = added.dequantize(), cast(Any, torch.ops.quantized)
    with _torch.quantized_engine("onednn"):
        packed = ops.conv2d_prepack(weight, None, [1, 1], [0, 0], [1, 1], 1)
        ops.conv2d_add(x, added, packed, 1 / 8, 100)
    return _far(added, before)


@functools.cache
def xnnpack_takes(op: str) -> bool:
    """Whether "add" (on qnnpack) or "mul" (on any engine) of qint8 is XNNPACK's in this build.

    Its kernels raise where they broadcast a contiguous tensor to a channels-last one; torch's own
    don't.
    """
    if "qnnpack" not in torch.backends.quantized.supported_engines:
        return False
    x, y = (
        torch.quantize_per_tensor(
            torch.zeros(shape, dtype=torch.float32, device="cpu"), 1.0, 0, torch.qint8
        )
        for shape in ((2, 3, 2, 2), (2, 3, 1, 1))
    )
    ops: Any = torch.ops.quantized
    with _torch.quiet(), _torch.quantized_engine("qnnpack"):
        try:
            getattr(ops, op)(x.contiguous(memory_format=torch.channels_last), y, 1.0, 0)
        except RuntimeError:
            return True
    return False


def _refuses(engine: str, prepack: str, *options: Any) -> bool:
    with _torch.quantized_engine(engine):
        try:
            getattr(torch.ops.quantized, prepack)(*options)
        except RuntimeError:
            return True
    return False

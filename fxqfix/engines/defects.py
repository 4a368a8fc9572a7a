"""Kernels that are plainly wrong: what, where, when, and the way round; each row can be probed.

A probe runs the kernel on a few values beside the same op in float and says whether it is still
wrong here, so that a torch release which repairs it turns the row off. Nothing of this follows a
version number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxqfix import _rng, _torch
from fxqfix.engines import _probes
from fxqfix.engines._base import Call
from fxqfix.engines.dispatch import placed
from fxqfix.engines.isa import ISAS
from fxqfix.qparams import container_range

__all__ = ["DEFECTS", "Defect", "find", "met"]


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
        certain: Whether the graph tells the condition; else it may be met, by shape or layout.
        cure: How `to_int8` goes round it: "island" (the float op between dequantize and quantize),
            "contiguous" (a contiguous input), "memory order" (`InMemoryOrder`), or "" (it doesn't).

    Example:
        >>> from fxqfix.engines import DEFECTS
        >>> next(d for d in DEFECTS if d.name == "bag-sums").way_round
        'divide by the size of the bag behind it, or keep it in float'
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
    certain: bool = True
    cure: str = ""

    @functools.cached_property
    def present(self) -> bool | None:
        """Whether the kernel is wrong here; None where this torch lacks the engine."""
        available = torch.backends.quantized.supported_engines
        if not any(engine in available for engine in self.engines):
            return None
        with _torch.quiet(), _rng.same_rng(), torch.no_grad():
            return self.probe()


def find(call: Call) -> Defect | None:
    """The row that a call meets: one that this machine shows, else one that it has repaired.

    Args:
        call: An int8 op, its engine dispatched.

    Example:
        >>> from fxqfix.engines import Call, find_defect
        >>> options = {"padding": 1, "count_include_pad": False}
        >>> find_defect(Call("pool", "qnnpack", "avg_pool2d", arguments=options)).name
        'average-counts-padding'
    """
    rows = (d for d in DEFECTS if call.engine in d.engines and call.key in d.ops)
    found = [d for d in rows if d.applies(call)]
    return next((d for d in found if d.present is not False), found[0] if found else None)


def met(call: Call, engine: str) -> tuple[Defect, ...]:
    """The rows that a call may meet where it is deployed, with or without VNNI.

    Rows that this torch has repaired are left out; those that it can't probe, because it lacks the
    engine, are not.

    Args:
        call: An int8 op.
        engine: The engine that its model was converted for.

    Example:
        >>> from fxqfix.engines import Call, met
        >>> options = {"padding": 1, "count_include_pad": False}
        >>> [d.name for d in met(Call("p", "", "avg_pool2d", arguments=options), "qnnpack")]
        ['average-counts-padding']
    """
    rows = dict.fromkeys(find(placed(call, engine, isa)) for isa in ISAS)
    return tuple(d for d in rows if d is not None and d.present is not False)


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
    if call.weight is None or call.isa.cpu != "avx2":
        return False
    return call.option("groups", 1) == 3 and call.weight.codes.shape[1] == 4


def _zero_points(call: Call) -> bool:
    return call.weight is not None and any(call.weight.qparams.zero_points)


def _signed(call: Call) -> bool:
    return bool(call.qparams) and call.qparams[0] is not None and call.source.storage == torch.int8


def _unknown_padding(call: Call) -> bool:
    known = call.option("padding_mode", "zeros") in ("zeros", "reflect")
    return not known or isinstance(call.option("padding"), str)


def _output_padding(call: Call) -> bool:
    found = call.option("output_padding", 0)
    return any(found) if isinstance(found, list | tuple) else bool(found)


def _remembers(call: Call) -> bool:
    """Only a new input scale makes qnnpack set its kernel up again."""
    if not call.qparams or call.qparams[0] is None:
        return False
    mine = call.qparams[0]
    return any(
        g is not None and g.scales == mine.scales and g.zero_points != mine.zero_points
        for g in call.others
    )


def _clips_slopes(call: Call) -> bool:
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


def _both_signed(call: Call) -> bool:
    dtypes = [None if q is None else q.dtype for q in call.qparams]
    return dtypes == [torch.qint8, torch.qint8]


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
        _probes.depthwise_saturates,
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
        lambda: _probes.transposed("onednn", 2, 3, 3, 1),
        cure="island",
    ),
    Defect(
        "transposed-skips-rows",
        ("onednn",),
        _TRANSPOSED,
        "stride >= kernel + 2 along any axis but the last",
        "rows that no input reaches are not written: they hold whatever memory held",
        "a stride of at most kernel + 1, another engine, or a float island",
        _skips_rows,
        _probes.leaves_rows,
        cure="island",
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
        lambda: _probes.transposed("fbgemm", 8, 8, 2, 2),
        cure="island",
    ),
    Defect(
        "transposed-per-channel",
        ("fbgemm", "onednn"),
        _TRANSPOSED,
        "per-channel weights",
        "raises",
        "per-tensor weights, or qnnpack",
        _per_channel,
        _probes.refuses_per_channel,
        cure="island",
    ),
    Defect(
        "average-counts-padding",
        ("qnnpack",),
        ("avg_pool2d",),
        "count_include_pad=False with padding",
        "the option is ignored: errors up to 119 codes; 1x1 pools raise",
        "pad by hand and divide, or a float island",
        _excludes_padding,
        _probes.counts_padding,
        cure="island",
    ),
    Defect(
        "padding-remembers",
        ("qnnpack",),
        ("conv1d", "conv2d", "conv3d", *_TRANSPOSED),
        "a module called on two inputs of one scale and different zero points",
        "the second is padded with the first one's zero point",
        "fxqfix.freeze, which gives each call a module of its own",
        _remembers,
        _probes.remembers_padding,
    ),
    Defect(
        "relu6-channels-last",
        ("qnnpack",),
        ("relu6", "hardtanh", "clamp"),
        "a channels-last input, which is what qnnpack's convolutions give",
        "memory is read in its own order: values are permuted (392 of 576 codes wrong)",
        "make the input contiguous first",
        lambda call: not call.in_memory_order,  # no graph tells the layout
        _probes.relu6_moves,
        emulated=True,
        certain=False,
        cure="memory order",
    ),
    Defect(
        "three-groups-crash",
        ("fbgemm",),
        ("conv2d",),
        "3 groups of 4 input channels on CPUs without AVX512",
        "corrupts the heap: the process may die",
        "another number of groups, or qnnpack",
        _odd_groups,
        _probes.crashes,
        cure="island",
    ),
    Defect(
        "norm-cancels",
        ("fbgemm", "onednn", "qnnpack"),
        ("instance_norm", "group_norm"),
        "a channels-last input of 512 pixels or more",
        "squares are added in float32 pixel by pixel, so that the variance cancels: up to 68 codes",
        "make the input contiguous first, or a float island",
        lambda call: True,
        _probes.norm_cancels,
        emulated=True,
        certain=False,
        cure="contiguous",
    ),
    Defect(
        "norm-skips-images",
        ("fbgemm", "onednn", "qnnpack"),
        ("instance_norm", "group_norm"),
        "a channels-last input of less than 512 pixels, more images than elements in a group",
        "the last images are not written: they hold whatever memory held",
        "make the input contiguous first, or a float island",
        lambda call: False,  # told at run time, by the shape; the row above stands for both
        _probes.norm_skips_images,
        emulated=True,
        certain=False,
        cure="contiguous",
    ),
    Defect(
        "one-pixel-mixes",
        ("fbgemm", "onednn", "qnnpack"),
        ("interpolate",),
        "a contiguous image of one pixel and several channels (behind a global pool)",
        "channels are mixed up",
        "expand the pixel instead, or a float island",
        lambda call: True,
        _probes.one_pixel_mixes,
        emulated=True,
        certain=False,
        cure="island",
    ),
    Defect(
        "softmax-transposes",
        ("qnnpack",),
        ("softmax",),
        "a transposed tensor, to scale 1/256 and zero point 0",
        "rows are written as columns",
        "make the input contiguous first",
        lambda call: True,
        _probes.softmax_transposes,
        emulated=True,
        certain=False,
        cure="contiguous",
    ),
    Defect(
        "ranges-over-memory",
        ("fbgemm",),
        ("conv1d_dynamic", "conv2d_dynamic", "conv3d_dynamic"),
        "a strided input, such as x[..., ::2]",
        "the input's range is taken over all memory in between: a scale too wide by any factor",
        "make the input contiguous first",
        lambda call: True,
        _probes.ranges_over_memory,
        emulated=True,
        certain=False,
    ),
    Defect(
        "bag-sums",
        ("fbgemm", "onednn", "qnnpack"),
        ("embedding_bag",),
        "mode other than sum (mean is nn.EmbeddingBag's default)",
        "torch's conversion drops the mode: the int8 bag adds",
        "divide by the size of the bag behind it, or keep it in float",
        lambda call: call.option("mode", "sum") != "sum",
        _probes.bag_sums,
        emulated=True,
        cure="island",
    ),
    Defect(
        "weights-with-zero-point",
        ("onednn",),
        ("linear", "conv1d", "conv2d", "conv3d", *_TRANSPOSED),
        "a weight whose zero point is not 0 (a channel of one sign, frozen to the fused kernel's)",
        "raises",
        "symmetric weights, another engine, or a float island",
        _zero_points,
        _probes.refuses_zero_points,
        cure="island",
    ),
    Defect(
        "signed-activations",
        ("fbgemm", "onednn", "qnnpack"),
        ("conv1d", "conv2d", "conv3d", *_TRANSPOSED),
        "qint8 activations",
        "raises",
        "quint8 activations, or a float island",
        _signed,
        _probes.refuses_signed_conv,
        cure="island",
    ),
    Defect(
        "signed-activations-linear",
        ("fbgemm", "qnnpack"),
        ("linear",),
        "qint8 activations",
        "raises",
        "quint8 activations, engine onednn, or a float island",
        _signed,
        _probes.refuses_signed_linear,
        cure="island",
    ),
    Defect(
        "transposed-output-padding",
        ("onednn",),
        _TRANSPOSED,
        "output padding",
        "raises",
        "another engine, or a float island",
        _output_padding,
        _probes.refuses_output_padding,
        cure="island",
    ),
    Defect(
        "three-dimensions-stay-packed",
        ("qnnpack",),
        ("conv3d", "conv_transpose3d"),
        "any",
        "packed weights can neither be unpacked, copied nor saved",
        "another engine, or a float island",
        lambda call: True,
        _probes.keeps_packed,
        emulated=True,
        cure="island",
    ),
    Defect(
        "no-volume-pool",
        ("qnnpack",),
        ("max_pool3d",),
        "any",
        "raises",
        "another engine, or a float island",
        lambda call: True,
        _probes.has_no_volume_pool,
        cure="island",
    ),
    Defect(
        "unknown-padding",
        ("fbgemm", "onednn", "qnnpack"),
        ("conv1d", "conv2d", "conv3d"),
        'padding="same", or a padding mode other than zeros and reflect',
        "torch's conversion raises",
        "pad by a module of its own, or a float island",
        _unknown_padding,
        _probes.refuses_padding,
        cure="island",
    ),
    Defect(
        "slopes-clipped",
        ("fbgemm", "onednn", "qnnpack"),
        ("prelu",),
        "1 beyond the slopes' grid, which ends by default at the largest slope; or negative slopes "
        "on a qint8 grid",
        "positive inputs are multiplied by that end in place of 1, at slopes of 0.25 by 0.25; "
        "torch's conversion stores qint8 slopes as quint8: negative ones become 0",
        "a float island",
        _clips_slopes,
        _probes.clips_slopes,
        emulated=True,
        cure="island",
    ),
    Defect(
        "transposed-grouped-scales",
        ("qnnpack",),
        _TRANSPOSED,
        "per-channel weights with several groups",
        "scales are read beyond their end: raises, or computes with what memory held",
        "per-tensor weights, or a float island",
        lambda call: _per_channel(call) and call.option("groups", 1) > 1,
        _probes.reads_beyond_scales,
        cure="island",
    ),
    Defect(
        "add-writes-over",
        ("onednn",),
        ("conv2d_add",),
        "a channels-last addend (as onednn's convolutions give) that is read again later, or that "
        "the convolution reads itself",
        "the sum is written over the addend: later readers get its codes and its scale",
        "add by an op of its own: a backend config that doesn't fuse it",
        lambda call: bool(call.rereads),
        _probes.writes_over,
        certain=False,
    ),
    Defect(
        "signed-add",
        ("qnnpack",),
        ("add",),
        "two qint8 tensors, in builds of torch with XNNPACK",
        "XNNPACK's kernel rounds in its own way (up to 23% of the codes by 1), and raises where it "
        "broadcasts a contiguous tensor to a channels-last one",
        "quint8 activations, another engine, or a float island",
        _both_signed,
        lambda: _probes.xnnpack_takes("add"),
        cure="island",
    ),
    Defect(
        "signed-mul",
        ("fbgemm", "onednn", "qnnpack"),
        ("mul",),
        "two qint8 tensors, in builds of torch with XNNPACK, on any engine",
        "XNNPACK's kernel reads a contiguous tensor beside a channels-last one as it lies in "
        "memory: off by up to 255 codes; it raises where it broadcasts the one to the other",
        "quint8 activations, or a float island",
        _both_signed,
        lambda: _probes.xnnpack_takes("mul"),
        cure="island",
    ),
)

"""Kernels that are plainly wrong: what, where, when, and the way round; each row can be probed.

A probe runs the kernel on a few values beside the same op in float and says whether it is still
wrong here, so that a torch release which repairs it turns the row off. Nothing of this follows a
version number. Kernels that a process may die of are run in one of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fxqfix import _rng, _torch
from fxqfix.engines import _probes, _probes_scales, _strikes
from fxqfix.engines._base import OWN_KERNELS, Call
from fxqfix.engines.dispatch import placed
from fxqfix.engines.isa import ISAS, Isa, isa_of
from fxqfix.ops import OPS
from fxqfix.registry import Registry

__all__ = ["DEFECTS", "Defect", "find", "met", "rows"]


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
        probe: Runs the kernel: True where it is wrong on this machine, None where that can't be
            asked.
        emulated: Whether the effect is arithmetic that `emulate` follows; else it refuses.
        certain: Whether the graph tells the condition; else it may be met, by shape or layout.
        cure: How `to_int8` goes round it: "island" (the float op between dequantize and quantize),
            "contiguous" (a contiguous input), "memory order" (`InMemoryOrder`), or "" (it doesn't).
        levels: The levels whose kernel it is; None for all. What this process doesn't run, it
            can't ask.
        at: Where the size of the first input decides: whether a call meets the condition on it.

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
    probe: Callable[[], bool | None]
    emulated: bool = False
    certain: bool = True
    cure: str = ""
    levels: Callable[[Isa], bool] | None = None
    at: Callable[[Call, Sequence[int]], bool] | None = None

    @functools.cached_property
    def present(self) -> bool | None:
        """Whether the kernel is wrong in this process, under its caps.

        None where that can't be asked: this torch lacks the engine, or this process runs kernels
        of another level.
        """
        available = torch.backends.quantized.supported_engines
        if not any(engine in available for engine in self.engines):
            return None
        if self.levels is not None and not self.levels(isa_of(None)):
            return None
        with _torch.quiet(), _rng.same_rng(), torch.no_grad():
            return self.probe()

    @property
    def by_size(self) -> bool:
        """Whether only sizes of inputs that few models have make it wrong: nothing is cured."""
        return self.at is not None and not self.cure

    def __str__(self) -> str:
        """What it does, when, and the way round."""
        return f"{self.name}: {self.condition}: {self.effect}; way round: {self.way_round}"

    def meets(self, call: Call, shape: Sequence[int] | None = None) -> bool:
        """Whether a call meets the row, or may meet it where no shape is given.

        Args:
            call: An int8 op, its engine dispatched.
            shape: Of its first input.
        """
        if call.engine not in self.engines or call.key not in self.ops:
            return False
        if (self.levels is not None and not self.levels(call.isa)) or not self.applies(call):
            return False
        return self.at is None or shape is None or self.at(call, shape)

    def refusal(self, call: Call) -> str:
        """Why a call that meets the row is not emulated."""
        return (
            f"{call.engine}'s kernel is wrong in torch {torch.__version__} ({self.name}): "
            f"{self.condition}"
        )


def find(call: Call, shape: Sequence[int] | None = None) -> Defect | None:
    """The row that a call meets: one that this machine shows, else one that it has repaired.

    Args:
        call: An int8 op, its engine dispatched.
        shape: Of its first input; None where it is not known: what a call may meet then counts.

    Example:
        >>> from fxqfix.engines import Call, find_defect
        >>> options = {"padding": 1, "count_include_pad": False}
        >>> find_defect(Call("pool", "qnnpack", "avg_pool2d", arguments=options)).name
        'average-counts-padding'
    """
    found = rows(call, shape)
    return next((d for d in found if d.present is not False), found[0] if found else None)


def rows(call: Call, shape: Sequence[int] | None = None) -> tuple[Defect, ...]:
    """All rows that a call meets; see `find`."""
    return tuple(d for d in DEFECTS if d.meets(call, shape))


def met(call: Call, engine: str) -> dict[Defect, tuple[str, ...]]:
    """The rows that a call may meet where it is deployed, with the levels that each strikes at.

    Rows that this torch has repaired are left out; those that it can't probe, because it lacks the
    engine or runs another level, are not.

    Args:
        call: An int8 op.
        engine: The engine that its model was converted for.

    Example:
        >>> from fxqfix.engines import Call, met
        >>> options = {"padding": 1, "count_include_pad": False}
        >>> [d.name for d in met(Call("p", "", "avg_pool2d", arguments=options), "qnnpack")]
        ['average-counts-padding']
    """
    found: dict[Defect, tuple[str, ...]] = {}
    for isa in ISAS:
        there = placed(call, engine, isa)
        for row in rows(there):
            found[row] = (*found.get(row, ()), isa)
    return {row: levels for row, levels in found.items() if row.present is not False}


_CURES = ("island", "contiguous", "memory order", "")
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
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
        "input channels != output channels of a group, both > 1",
        "weights are permuted: SQNR about -3 dB",
        "qnnpack, or a float island",
        _strikes.permutes,
        lambda: _probes.transposed("onednn", 2, 3, 3, 1),
        cure="island",
    ),
    Defect(
        "transposed-skips-rows",
        ("onednn",),
        _TRANSPOSED,
        "stride >= kernel + 2 along any axis but the last (oneDNN 3.13: a stride beyond the kernel "
        "along any axis), zero point not 0",
        "rows that no input reaches are not written: they hold whatever memory held",
        "a stride of at most kernel + 1, another engine, or a float island",
        _strikes.skips_rows,
        _probes.leaves_rows,
        cure="island",
    ),
    Defect(
        "transposed-2x2",
        ("fbgemm",),
        ("conv_transpose2d",),
        "kernel height 2, width up to 6, padding 0, no groups, channels multiples of 8; stride 2, "
        "or several images",
        "SQNR -10 to -20 dB; at any stride the packed weight gives other codes back than it got",
        "qnnpack, or a float island",
        _strikes.small_kernel,
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
        _strikes.per_channel,
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
        _strikes.excludes_padding,
        _probes.counts_padding,
        cure="island",
    ),
    Defect(
        "padding-remembers",
        ("qnnpack",),
        (*_CONVOLUTIONS, *_TRANSPOSED),
        "a module called on two inputs of one scale and different zero points",
        "the second is padded with the first one's zero point",
        "fxqfix.freeze, which gives each call a module of its own",
        _strikes.remembers,
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
        "groups-left-over",
        ("fbgemm",),
        ("conv2d", "conv3d"),
        "3x3 (or 3x3x3), padding 1, stride 1 or 2, 2 or 4 channels in and out per group, as many "
        "groups as are taken at a time (2 channels: 8, 4 channels: 4; without AVX512 4 and 2) and "
        "some left over",
        "what is left over is read and written beyond its end: wrong codes, or the process dies",
        "a number of groups that leaves none over, qnnpack, or a float island",
        _strikes.overruns_groups,
        _probes.overruns_groups,
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
        ("linear", *_CONVOLUTIONS, *_TRANSPOSED),
        "a weight whose zero point is not 0 (a channel of one sign, frozen to the fused kernel's)",
        "raises",
        "symmetric weights, another engine, or a float island",
        _strikes.zero_points,
        _probes.refuses_zero_points,
        cure="island",
    ),
    Defect(
        "signed-activations",
        ("fbgemm", "onednn", "qnnpack"),
        (*_CONVOLUTIONS, *_TRANSPOSED),
        "qint8 activations",
        "raises",
        "quint8 activations, or a float island",
        _strikes.signed,
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
        _strikes.signed,
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
        _strikes.output_padding,
        _probes.refuses_output_padding,
        cure="island",
    ),
    Defect(
        "transposed-one-plane",
        ("qnnpack",),
        ("conv_transpose3d",),
        "any",
        "only the first plane of the result is written: the others hold whatever memory held",
        "another engine, or a float island",
        lambda call: True,
        _probes.writes_one_plane,
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
        _CONVOLUTIONS,
        'padding="same", or a padding mode other than zeros and reflect',
        "torch's conversion raises",
        "pad by a module of its own, or a float island",
        _strikes.unknown_padding,
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
        _strikes.clips_slopes,
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
        lambda call: _strikes.per_channel(call) and call.option("groups", 1) > 1,
        _probes_scales.reads_beyond_scales,
        cure="island",
    ),
    Defect(
        "transposed-input-scales",
        ("qnnpack",),
        _TRANSPOSED,
        "weights with a scale per input channel (axis 0), one group",
        "the scale of input channel i is taken for output channel i",
        "per-tensor weights, a scale per output channel, or a float island",
        _strikes.per_input_channel,
        _probes_scales.takes_input_scales,
        emulated=True,
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
        _strikes.both_signed,
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
        _strikes.both_signed,
        lambda: _probes.xnnpack_takes("mul"),
        cure="island",
    ),
    Defect(
        "first-activation-stays",
        ("onednn",),
        (*_CONVOLUTIONS, "conv2d_add", "linear", "linear_leaky_relu", "linear_tanh"),
        "one packed weight called with and without relu (or with another activation), on the same "
        "grids and sizes",
        "the first call's activation is used by all of them",
        "a packed weight for each call",
        lambda call: call.fused_otherwise,
        _probes.keeps_activation,
        certain=False,
    ),
    Defect(
        "windows-outside",
        ("onednn",),
        (*_CONVOLUTIONS, "conv2d_add"),
        "AVX512: every window lies in the padding along the width; neither depthwise nor 1x1 "
        "without groups",
        "the process may die, or (one output, a zero point that isn't 0) wrong codes",
        "pad by a module of its own, or a float island",
        _strikes.may_lie_outside,
        _probes.dies_outside,
        certain=False,
        cure="island",
        levels=_strikes.on_avx512,
        at=_strikes.outside,
    ),
    Defect(
        "amx-four-channels",
        ("onednn",),
        ("conv2d", "conv2d_add"),
        "AMX: 4 input channels, stride > 1, padding along the height and none along the width, "
        "zero point not 0",
        "the heap is corrupted: the process may die (seen: 7x7, stride 2, an image of 7x600)",
        "the same padding along both, or a float island",
        _strikes.four_channels,
        _probes.corrupts_heap,
        cure="island",
        levels=_strikes.on_amx,
    ),
    Defect(
        "amx-padded-rows",
        ("onednn",),
        ("conv2d", "conv3d", "conv2d_add"),
        "AMX: padding along the height and none along the width, zero point not 0 (kernels of one "
        "column, or a wide image)",
        "the padding is not corrected for the zero point: up to 164 codes",
        "the same padding along both, or a float island",
        _strikes.pads_rows,
        _probes.forgets_padded_rows,
        cure="island",
        levels=_strikes.on_amx,
    ),
    Defect(
        "amx-one-plane",
        ("onednn",),
        ("conv3d",),
        "AMX: an image of one plane, a kernel deeper than one padded along the depth, less than 4 "
        "input channels",
        "wrong codes: 3,052 of 3,136",
        "conv2d, or a float island",
        _strikes.one_plane,
        _probes.mistakes_one_plane,
        certain=False,
        levels=_strikes.on_amx,
        at=_strikes.one_deep,
    ),
    Defect(
        "amx-narrow",
        ("onednn",),
        ("conv2d", "conv3d", "conv2d_add"),
        "AMX: a result of width 1 with several rows, stride and kernel width above 1",
        "wrong codes: 141 of 160, by up to 130",
        "a wider image, or a float island",
        _strikes.one_wide,
        _probes.mistakes_narrow,
        certain=False,
        levels=_strikes.on_amx,
        at=_strikes.narrow,
    ),
    Defect(
        "points-outside",
        ("onednn",),
        ("conv1d", "conv2d", "conv3d", "conv2d_add"),
        "oneDNN 3.5 (torch 2.6): a padded 1x1 kernel, so that windows lie in the padding wholly",
        "wrong codes",
        "pad by a module of its own, or a float island",
        _strikes.points_outside,
        _probes.mistakes_points_outside,
        cure="island",
    ),
)


def _problem(row: Defect) -> str | None:
    if wrong := [name for name in row.engines if name not in OWN_KERNELS]:
        return f"there is no engine {wrong[0]!r} with kernels of its own"
    if wrong := [key for key in row.ops if key.removesuffix("_dynamic") not in OPS]:
        return f"the op table has no row {wrong[0]!r}"
    return None if row.cure in _CURES else f"there is no cure {row.cure!r}"


TABLE: Registry[str, Defect] = Registry(
    "defect", parts=("engines", "ops", "condition", "effect", "way_round"), check=_problem
)
TABLE.add(*DEFECTS, module=__name__)

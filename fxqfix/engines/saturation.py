"""int16 saturation: what u8 x s8 products add up to on CPUs without VNNI.

There the kernels multiply unsigned activations with signed weights in pairs and add each pair in
int16 with saturation (the instruction vpmaddubsw): ``sum(clamp16(a0*w0 + a1*w1))`` on raw codes,
zero points corrected afterwards. Which neighbours make a pair depends on the engine: fbgemm walks
the flattened (kernel height, kernel width, input channel); onednn walks input channels per kernel
position, padded to a multiple of 4, and leaves padding out. Of linear it halves 257 to 768 inputs,
so that a half of odd size shifts the pairs behind it. It does not saturate in depthwise
convolutions, nor in groups whose channels are no multiples of 4, nor in linear on qint8 with a zero
point (without one it adds 128 to the codes first). fbgemm's kernel for depthwise convolutions
saturates on any CPU.

Re-checked against the kernels in tests/engines/test_saturation.py, on any machine: on those with
VNNI in a subprocess whose instruction set is capped.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fxqfix.engines._accumulate import by_output
from fxqfix.engines._base import Call

__all__ = [
    "groups_together",
    "pairing",
    "pairs_of_weights",
    "raw_rows",
    "reference_from",
    "runs_grouped",
    "runs_reference",
    "saturating",
    "saturation_possible",
]

_LOW, _HIGH = -(2**15), 2**15 - 1


def pairs_of_weights(weight: Tensor, *, by_channel: bool) -> tuple[Tensor, list[tuple[int, int]]]:
    """The weights whose products are added at 16 bits.

    Args:
        weight: Raw weight codes, (outputs, inputs / groups, *kernel).
        by_channel: Pair neighbouring input channels of one kernel position (onednn); else
            neighbours of the flattened kernel (fbgemm).

    Returns:
        The pairs of every output, int32 of shape (outputs, pairs, 2), 0 where a weight has no
        partner; and of each pair the places of both, ``kernel position * channels + channel``.
    """
    outputs, channels = weight.shape[:2]
    flat = weight.int().reshape(outputs, channels, -1)
    rows = flat.transpose(1, 2).reshape(outputs, -1)
    block = 0
    if by_channel:
        block = channels if weight.dim() > 2 else _block(channels)
    order, places = _order(rows.shape[1], channels, block)
    if order is not None:
        rows = F.pad(rows, (0, 1))[:, order]  # a zero, which -1 picks
    return rows.reshape(outputs, -1, 2), list(places)


@functools.lru_cache(maxsize=64)
def _order(
    size: int, channels: int, block: int
) -> tuple[Tensor | None, tuple[tuple[int, int], ...]]:
    """Where pairs are taken from a row, -1 for no partner, and the places of both; None: in order.

    A block of 0 pairs neighbours of the row.
    """
    place = torch.arange(size, device="cpu").reshape(-1, channels)
    if block:
        place = _in_fours(place, block, -1)
    place = place.reshape(-1)
    pairs = F.pad(place, (0, len(place) % 2), value=-1).reshape(-1, 2)
    pairs = pairs[pairs[:, 0] >= 0]
    order = pairs.reshape(-1)
    plain = torch.equal(order, torch.arange(size, device="cpu"))
    return None if plain else order, tuple((a, max(b, 0)) for a, b in pairs.tolist())


def _block(inputs: int) -> int:
    """How many inputs of linear oneDNN's AVX2 kernel takes at a time, up to even numbers."""
    return -(-inputs // 2) if 256 < inputs <= 768 else inputs


def _in_fours(last: Tensor, block: int, filler: int) -> Tensor:
    """The last axis in blocks, each padded to a multiple of 4, and flat again."""
    size = max(1, block)
    blocks = F.pad(last, (0, -last.shape[-1] % size), value=filler)
    blocks = blocks.reshape(*last.shape[:-1], -1, size)
    blocks = F.pad(blocks, (0, -size % 4), value=filler)
    return blocks.flatten(-2)


def saturating(pairs: Tensor, highest: int = 255) -> Tensor:
    """Which pairs of weights can saturate with activation codes in [0, highest]: a sound bound."""
    most = highest * pairs.clamp(min=0).sum(-1)
    least = highest * pairs.clamp(max=0).sum(-1)
    return (most > _HIGH) | (least < _LOW)


def pairing(call: Call) -> str | None:
    """How the kernel of a call pairs products: "flat", "channel", or None where none saturates.

    Source:
        fbgemm's and oneDNN's choice of kernels; measured in tests/engines/test_weighted.py.
    """
    if call.weight is None or call.engine == "qnnpack":
        return None
    if call.engine == "fbgemm":
        return "flat" if _fbgemm_saturates(call) else None
    if call.isa.onednn != "avx2" or _plain_gemm(call):
        return None
    if _depthwise(call) or runs_reference(call):
        return None
    return "channel"


def _fbgemm_saturates(call: Call) -> bool:
    """Fbgemm's kernel for small groups looks at the CPU, not at its cap."""
    if _fbgemm_depthwise(call):
        return True
    return (call.isa.cpu if runs_grouped(call) else call.isa.fbgemm) != "vnni"


def _group(call: Call) -> tuple[int, int]:
    """(input, output) channels of one group."""
    if call.weight is None:
        return 0, 0
    shape, groups = call.weight.codes.shape, call.option("groups", 1)
    if "transpose" in call.key:
        return shape[0] // groups, shape[1]
    return shape[1], shape[0] // groups


def _depthwise(call: Call) -> bool:
    return call.option("groups", 1) > 1 and _group(call) == (1, 1)


def runs_reference(call: Call) -> bool:
    """Whether onednn has only its reference code for a call, on CPUs without AVX512.

    Source:
        oneDNN's AVX2 kernels take groups of a multiple of 4 channels, or depthwise ones.
    """
    if call.engine != "onednn" or call.isa.onednn != "avx2" or call.option("groups", 1) == 1:
        return False
    return not _depthwise(call) and any(n % 4 for n in _group(call))


def reference_from(call: Call) -> int | None:
    """Input width from which onednn rounds as its reference code does.

    Transposed convolutions that its own kernel refuses are a matrix product, which saturates all
    the same, and then the reference's roundings.

    Args:
        call: A call of onednn.

    Returns:
        0 for any width; None for never.

    Source:
        What oneDNN's AVX2 kernel for transposed convolutions refuses: the registers that hold one
        stretch of outputs have to reach as far as the kernel does.
    """
    if runs_reference(call):
        return 0
    if call.weight is None or call.isa.onednn != "avx2" or "transpose" not in call.key:
        return None
    kernel = list(call.weight.codes.shape[2:])
    stride, padding, dilation = (
        list(call.option(name))[-len(kernel) :] for name in ("stride", "padding", "dilation")
    )
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    steps = any(d > 1 and s > 1 for d, s in zip(dilation, stride, strict=True))
    outside = any(e <= p for e, p in zip(extent, padding, strict=True))
    if steps or outside or (_depthwise(call) and len(kernel) == 3):
        return 0
    held = _outputs_held(call, int(padding[-1]))
    reach = max(0, (extent[-1] - 1 - padding[-1]) // stride[-1]) * stride[-1]
    if 0 < reach <= held // stride[-1] * stride[-1] or (not reach and held >= stride[-1]):
        return None
    more = int(call.option("output_padding", [0])[-1])
    return int(max(1, -(-(held + 2 * padding[-1] - extent[-1] - more) // stride[-1]) + 1))


def _outputs_held(call: Call, padding: int) -> int:
    """Outputs along the width that one round of oneDNN's kernel keeps in registers."""
    inputs, outputs = _group(call)
    grouped = call.option("groups", 1) > 1
    block = 4 if grouped and (inputs % 8 or outputs % 8) else 8
    blocks = 1 if _depthwise(call) else -(-outputs // block)
    fits = (n for n in range(min(4, blocks), 1, -1) if not blocks % n and padding <= 12 // (n + 1))
    return 12 // (next(fits, 1) + 1)


def _plain_gemm(call: Call) -> bool:
    """Whether onednn multiplies qint8 as it stands; without a zero point it adds 128 first."""
    return call.source.dtype == torch.qint8 and any(call.source.zero_points)


def _fbgemm_depthwise(call: Call) -> bool:
    """Whether fbgemm has a kernel of its own for a depthwise convolution; it saturates anywhere."""
    if call.weight is None or call.key not in ("conv2d", "conv3d", "conv2d_add"):
        return False
    outputs, per_group, *kernel = call.weight.codes.shape
    dims, groups = len(kernel), call.option("groups", 1)
    stride, padding, dilation = (
        list(call.option(name))[-dims:] for name in ("stride", "padding", "dilation")
    )
    same = padding == [(k - 1) // 2 for k in kernel] and kernel[-1] == kernel[-2]
    steps = set(stride) <= {1, 2} and set(dilation) == {1} and set(kernel) <= {3, 5, 7}
    return per_group == 1 and groups % 8 == 0 and outputs // groups <= 2 and same and steps


def groups_together(call: Call) -> int:
    """How many groups of a convolution fbgemm's kernel for small groups takes at a time.

    Source:
        fbgemm's numOfGroupsTogether; it looks at the CPU, not at fbgemm's cap.
    """
    inputs, outputs = _group(call)
    width = 32 if call.isa.cpu == "avx2" else 64
    return max(width // outputs // max(inputs, 4), 1)


def runs_grouped(call: Call) -> bool:
    """Whether fbgemm has its kernel for small groups for a convolution.

    Source:
        fbgemm's fbgemmOptimizedGConv.
    """
    if call.weight is None or call.key not in ("conv2d", "conv3d"):
        return False
    inputs, outputs = _group(call)
    kernel = call.weight.codes.shape[2:]
    stride, padding, dilation = (
        set(list(call.option(name))[-len(kernel) :]) for name in ("stride", "padding", "dilation")
    )
    threes = set(kernel) == {3} and padding == {1} and dilation == {1} and stride in ({1}, {2})
    small = inputs == outputs and inputs in (2, 4, 8, 16)
    return threes and small and call.option("groups", 1) >= groups_together(call)


def saturation_possible(call: Call, highest: int | None = None) -> int | None:
    """How many pairs of a call's weights can saturate; 0 means that no input can make one.

    Args:
        call: A call with a weight, its engine dispatched.
        highest: The largest activation code; default: the container's, 255 for quint8.

    Returns:
        The number; None for ops without a weight.

    Source:
        ``highest * (sum of a pair's weights of one sign)`` beyond 16 bits.

    Example:
        >>> from fxqfix.engines import Call, saturation_possible
        >>> saturation_possible(Call("n", "qnnpack", "relu")) is None
        True
    """
    if call.weight is None or not call.qparams or call.qparams[0] is None:
        return None
    kind = pairing(call)
    if kind is None:
        return 0
    pairs, _ = pairs_of_weights(raw_rows(call), by_channel=kind == "channel")
    low, high = call.source.container
    return int(saturating(pairs, (high if highest is None else highest) - low).sum())


def raw_rows(call: Call) -> Tensor:
    """The weight's codes as they are, outputs first."""
    if call.weight is None:
        raise call.refuse("its weight can't be read")
    codes = call.weight.codes
    return by_output(codes, call.option("groups", 1)) if "transpose" in call.key else codes

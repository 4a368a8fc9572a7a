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

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fxqfix.engines._accumulate import by_output
from fxqfix.engines._base import Call

__all__ = [
    "Geometry",
    "pairing",
    "pairs_of_weights",
    "raw_rows",
    "runs_reference",
    "saturated_sums",
    "saturating",
    "saturation_possible",
]

_LOW, _HIGH = -(2**15), 2**15 - 1
_CHUNK = 2**22  # products held at once


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks its input; a linear layer is a 1x1 convolution of 1x1 images.

    Attributes:
        stride: (vertical, horizontal) step.
        padding: (vertical, horizontal) zeros on each side; they hold the zero point's code.
        dilation: (vertical, horizontal) distance of kernel positions.
        groups: Number of groups.
        linear: Whether this stands for a linear layer.
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    linear: bool = False


def saturated_sums(
    codes: Tensor,
    zero_point: int,
    weight: Tensor,
    geometry: Geometry,
    where: Tensor,
    *,
    by_channel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of raw products at chosen outputs, each pair of products saturated to int16.

    Args:
        codes: Raw activation codes, uint8, of shape (N, C, H, W).
        zero_point: Their zero point; padding holds it.
        weight: Raw weight codes, int8, of shape (O, C / groups, kernel height, kernel width).
        geometry: Stride, padding, dilation and groups.
        where: Indices (n, o, y, x) of the outputs to compute, of shape (K, 4).
        by_channel: Pair neighbouring input channels of one kernel position (onednn); else
            neighbours of the flattened kernel (fbgemm).

    Returns:
        K sums (int64) before any correction for zero points; the K sums of the activation codes,
        which that correction needs where weights have a zero point; and whether any pair of each
        saturated.

    Source:
        Measured; see the module's docstring.

    Example:
        >>> hot = torch.full((1, 2, 1, 1), 255, dtype=torch.uint8)
        >>> large = torch.full((1, 2, 1, 1), 127, dtype=torch.int8)
        >>> at = torch.tensor([[0, 0, 0, 0]])
        >>> sums, _, saturated = saturated_sums(hot, 0, large, Geometry(), at, by_channel=False)
        >>> sums.item(), 2 * 255 * 127, saturated.item()
        (32767, 64770, True)
    """
    if not len(where):
        return (none := where.new_zeros(0)), none, none.bool()
    vertical, horizontal = geometry.padding
    sides = (horizontal, horizontal, vertical, vertical)
    padded, bare = F.pad(codes.int(), sides, value=zero_point), F.pad(codes.int(), sides)
    block = _block(weight.shape[1]) if geometry.linear else weight.shape[1]
    rows = _ordered(weight.int(), by_channel, block)
    outputs, per_group = weight.shape[0], weight.shape[1]
    found, activations, saturated = [], [], []
    for index in torch.split(where, max(1, _CHUNK // rows.shape[1])):
        n, o, y, x = index.unbind(1)
        first = o // (outputs // geometry.groups) * per_group
        patch = _patches(padded, n, first, y, x, weight.shape, geometry)
        products = _ordered(patch, by_channel, block) * rows[o]
        total = products.sum(-1, dtype=torch.int64)
        if by_channel:  # oneDNN leaves padding out of the pairs
            inside = _patches(bare, n, first, y, x, weight.shape, geometry)
            products = _ordered(inside, by_channel, block) * rows[o]
        pairs = products.reshape(len(index), -1, 2).sum(-1)
        lost = pairs - pairs.clamp(_LOW, _HIGH)
        found.append(total - lost.sum(-1, dtype=torch.int64))
        saturated.append(lost.any(-1))
        activations.append(patch.sum((1, 2, 3), dtype=torch.int64))
    return torch.cat(found), torch.cat(activations), torch.cat(saturated)


def pairs_of_weights(weight: Tensor, *, by_channel: bool) -> tuple[Tensor, list[tuple[int, int]]]:
    """The weights whose products are added at 16 bits.

    Args:
        weight: Raw weight codes, (outputs, inputs / groups, *kernel).
        by_channel: See `saturated_sums`.

    Returns:
        The pairs of every output, int32 of shape (outputs, pairs, 2), 0 where a weight has no
        partner; and of each pair the places of both, ``kernel position * channels + channel``.
    """
    outputs, channels = weight.shape[:2]
    flat = weight.int().reshape(outputs, channels, -1)
    place = torch.arange(flat[:1].numel()).reshape(-1, channels)
    if by_channel:
        block = channels if weight.dim() > 2 else _block(channels)
        place = _in_fours(place, block, -1)
    place = place.reshape(-1)
    place = F.pad(place, (0, len(place) % 2), value=-1)
    rows = F.pad(flat.transpose(1, 2).reshape(outputs, -1), (0, 1))  # what -1 picks
    places = [(a, max(b, 0)) for a, b in place.reshape(-1, 2).tolist() if a >= 0]
    values = rows[:, place].reshape(outputs, -1, 2)
    return values[:, place[::2] >= 0], places


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
        return "flat" if call.isa == "avx2" or _fbgemm_depthwise(call) else None
    if call.isa != "avx2" or _plain_gemm(call):
        return None
    if _depthwise(call) or runs_reference(call):
        return None
    return "channel"


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
    if call.engine != "onednn" or call.isa != "avx2" or call.option("groups", 1) == 1:
        return False
    return not _depthwise(call) and any(n % 4 for n in _group(call))


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


def saturation_possible(call: Call, highest: int | None = None) -> int:
    """How many pairs of a call's weights can saturate; 0 means that no input can make one.

    Args:
        call: A call with a weight, its engine dispatched.
        highest: The largest activation code; default: the container's, 255 for quint8.

    Source:
        ``highest * (sum of a pair's weights of one sign)`` beyond 16 bits.

    Example:
        >>> from fxqfix.engines import Call, saturation_possible
        >>> saturation_possible(Call("n", "qnnpack", "linear"))
        0
    """
    kind = pairing(call)
    if kind is None or call.weight is None:
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


def _patches(
    padded: Tensor,
    n: Tensor,
    first: Tensor,
    y: Tensor,
    x: Tensor,
    shape: torch.Size,
    geometry: Geometry,
) -> Tensor:
    """The inputs of each chosen output, of shape (K, channels, kernel height, kernel width)."""
    _, channels, height, width = shape
    device = padded.device
    c = torch.arange(channels, device=device).reshape(1, -1, 1, 1)
    i = torch.arange(height, device=device).reshape(1, 1, -1, 1) * geometry.dilation[0]
    j = torch.arange(width, device=device).reshape(1, 1, 1, -1) * geometry.dilation[1]
    n, first, y, x = (t.reshape(-1, 1, 1, 1) for t in (n, first, y, x))
    return padded[n, first + c, y * geometry.stride[0] + i, x * geometry.stride[1] + j]


def _ordered(values: Tensor, by_channel: bool, block: int) -> Tensor:
    """(K, channels, height, width) -> (K, flattened), so that pairs are neighbours."""
    last = values.permute(0, 2, 3, 1)
    if by_channel:
        last = _in_fours(last, block, 0)
    flat = last.reshape(values.shape[0], -1)
    return F.pad(flat, (0, flat.shape[1] % 2))

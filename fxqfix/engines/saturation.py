"""int16 saturation: what u8 x s8 products add up to on CPUs without VNNI.

There the kernels multiply unsigned activations with signed weights in pairs and add each pair in
int16 with saturation (the instruction vpmaddubsw): ``sum(clamp16(a0*w0 + a1*w1))`` on raw codes,
zero points corrected afterwards. Which neighbours make a pair depends on the engine: fbgemm walks
the flattened (kernel height, kernel width, input channel); onednn walks input channels per kernel
position, padded to a multiple of 4, and leaves padding out. Of linear its AVX2 kernel halves 257 to
768 inputs, so that a half of odd size shifts the pairs behind it. It does not saturate in depthwise
convolutions, nor in groups whose channels are no multiples of 4 on AVX2, nor in linear on qint8
with a zero point (without one it adds 128 to the codes first). fbgemm's kernel for depthwise
convolutions saturates on any CPU; that for small groups looks at the CPU, not at the cap.

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
from fxqfix.engines._geometry import geometry
from fxqfix.engines.onednn import pairs_of

__all__ = [
    "groups_together",
    "pairing",
    "pairs_of_weights",
    "raw_rows",
    "runs_grouped",
    "saturating",
    "saturation_possible",
]

_LOW, _HIGH = -(2**15), 2**15 - 1


def pairs_of_weights(weight: Tensor, order: str) -> tuple[Tensor, list[tuple[int, int]]]:
    """The weights whose products are added at 16 bits.

    Args:
        weight: Raw weight codes, (outputs, inputs / groups, *kernel).
        order: Which are neighbours, as `pairing` says it.

    Returns:
        The pairs of every output, int32 of shape (outputs, pairs, 2), 0 where a weight has no
        partner; and of each pair the places of both, ``kernel position * channels + channel``.
    """
    outputs, channels = weight.shape[:2]
    flat = weight.int().reshape(outputs, channels, -1)
    rows = flat.transpose(1, 2).reshape(outputs, -1)
    block = {"flat": 0, "channel": channels, "halves": _block(channels)}[order]
    picked, places = _order(rows.shape[1], channels, block)
    if picked is not None:
        rows = F.pad(rows, (0, 1))[:, picked]  # a zero, which -1 picks
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


def pairing(call: Call) -> str:
    """How the kernel of a call pairs products.

    Returns:
        "flat" (fbgemm), "channel" or "halves" (onednn), "open" where nobody knows, "" where none
        saturates.

    Source:
        fbgemm's and oneDNN's choice of kernels; measured in tests/engines/test_weighted.py.
    """
    if call.weight is None or call.engine == "qnnpack":
        return ""
    if call.engine == "fbgemm":
        return "flat" if _fbgemm_saturates(call) else ""
    return pairs_of(call)


def _fbgemm_saturates(call: Call) -> bool:
    """Fbgemm's kernel for small groups looks at the CPU, not at its cap."""
    if _fbgemm_depthwise(call):
        return True
    return (call.isa.cpu if runs_grouped(call) else call.isa.fbgemm) != "vnni"


def _fbgemm_depthwise(call: Call) -> bool:
    """Whether fbgemm has a kernel of its own for a depthwise convolution; it saturates anywhere."""
    if call.key not in ("conv2d", "conv3d", "conv2d_add"):
        return False
    shape = geometry(call)
    same = shape.padding == tuple((k - 1) // 2 for k in shape.kernel)
    square = shape.kernel[-1] == shape.kernel[-2] and set(shape.kernel) <= {3, 5, 7}
    steps = set(shape.stride) <= {1, 2} and set(shape.dilation) == {1}
    channels = shape.inputs == 1 and shape.groups % 8 == 0 and shape.outputs <= 2
    return channels and square and same and steps


def groups_together(call: Call) -> int:
    """How many groups of a convolution fbgemm's kernel for small groups takes at a time.

    Source:
        fbgemm's numOfGroupsTogether; it looks at the CPU, not at fbgemm's cap.
    """
    shape = geometry(call)
    width = 32 if call.isa.cpu == "avx2" else 64
    return max(width // shape.outputs // max(shape.inputs, 4), 1)


def runs_grouped(call: Call) -> bool:
    """Whether fbgemm has its kernel for small groups for a convolution.

    Source:
        fbgemm's fbgemmOptimizedGConv.
    """
    if call.weight is None or call.key not in ("conv2d", "conv3d"):
        return False
    shape = geometry(call)
    ones = {1}
    threes = set(shape.kernel) == {3} and set(shape.padding) == set(shape.dilation) == ones
    small = shape.inputs == shape.outputs and shape.inputs in (2, 4, 8, 16)
    steps = set(shape.stride) in (ones, {2})
    return threes and small and steps and shape.groups >= groups_together(call)


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
    order, rows = pairing(call), raw_rows(call)
    if not order:
        return 0
    pairs = _extremes(rows) if order == "open" else pairs_of_weights(rows, order)[0]
    low, high = call.source.container
    return int(saturating(pairs, (high if highest is None else highest) - low).sum())


def _extremes(rows: Tensor) -> Tensor:
    """The largest and the smallest two weights of each output: no other pair exceeds them."""
    flat = F.pad(rows.int().flatten(1), (0, 2))
    return torch.stack([flat.topk(2).values, flat.topk(2, largest=False).values], 1)


def raw_rows(call: Call) -> Tensor:
    """The weight's codes as they are, outputs first."""
    if call.weight is None:
        raise call.refuse("its weight can't be read")
    codes = call.weight.codes
    return by_output(codes, call.option("groups", 1)) if call.spec.transposed else codes

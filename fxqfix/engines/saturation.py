"""int16 saturation: what u8 x s8 products add up to on CPUs without VNNI.

There the kernels multiply unsigned activations with signed weights in pairs and add each pair in
int16 with saturation (the instruction vpmaddubsw): ``sum(clamp16(a0*w0 + a1*w1))`` on raw codes,
zero points corrected afterwards. Which neighbours make a pair depends on the engine: fbgemm walks
the flattened (kernel height, kernel width, input channel); onednn walks input channels per kernel
position, padded to a multiple of 4, and does not saturate in depthwise convolutions.

Re-checked against the kernels in tests/engines/test_saturation.py, on any machine: on those with
VNNI in a subprocess whose instruction set is capped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Geometry", "saturated_sums"]

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
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


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
        none = torch.zeros(0, dtype=torch.int64, device=codes.device)
        return none, none, none.bool()
    vertical, horizontal = geometry.padding
    padded = F.pad(codes.int(), (horizontal, horizontal, vertical, vertical), value=zero_point)
    rows = _ordered(weight.int(), by_channel)
    outputs, per_group = weight.shape[0], weight.shape[1]
    found, activations, saturated = [], [], []
    step = max(1, _CHUNK // rows.shape[1])
    for index in (where[k : k + step] for k in range(0, len(where), step)):
        n, o, y, x = index.unbind(1)
        first = o // (outputs // geometry.groups) * per_group
        patch = _patches(padded, n, first, y, x, weight.shape, geometry)
        products = _ordered(patch, by_channel) * rows[o]
        pairs = products.reshape(len(index), -1, 2).sum(-1)
        found.append(pairs.clamp(_LOW, _HIGH).sum(-1, dtype=torch.int64))
        saturated.append(((pairs < _LOW) | (pairs > _HIGH)).any(-1))
        activations.append(patch.sum((1, 2, 3), dtype=torch.int64))
    return torch.cat(found), torch.cat(activations), torch.cat(saturated)


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


def _ordered(values: Tensor, by_channel: bool) -> Tensor:
    """(K, channels, height, width) -> (K, flattened), so that pairs are neighbours."""
    last = values.permute(0, 2, 3, 1)
    if by_channel:
        last = F.pad(last, (0, -last.shape[-1] % 4))
    flat = last.reshape(values.shape[0], -1)
    return F.pad(flat, (0, flat.shape[1] % 2))

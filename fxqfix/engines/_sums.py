"""Sums of codes and of their squares as the channels-last group norm accumulates them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["moments"]

_IN_FLOATS = 512  # pixels from which on the channels-last kernel adds up in floats


def moments(codes: Tensor, groups: int, last: bool, threads: int) -> tuple[Tensor, Tensor]:
    """Sums of the codes of each group and of their squares, (N, groups).

    Exact, but for large channels-last images: there each channel is added up in float32 pixel by
    pixel, with sums of its own for each thread, and squares leave the whole numbers of a float
    after 258 pixels.
    """
    batch, channels = codes.shape[:2]
    if not last or codes[0, 0].numel() < _IN_FLOATS:
        rows = codes.reshape(batch, groups, -1).double()
        return rows.sum(2), rows.square().sum(2)
    pixels = codes.permute(0, 2, 3, 1).reshape(batch, -1, channels).float()
    both = torch.cat([pixels, pixels * pixels], 2)
    found = torch.zeros(batch, 2, groups, device=codes.device)
    for part in _by_thread(both, threads):
        of_channels = part.reshape(batch, 2, groups, -1)
        for channel in range(channels // groups):
            found = found + of_channels[..., channel]
    return found[:, 0], found[:, 1]


def _by_thread(both: Tensor, threads: int) -> list[Tensor]:
    """Each thread's sums over its share of all pixels, (N, 2 * channels), in float32."""
    batch, pixels = both.shape[:2]
    total = batch * pixels
    share = -(-total // max(1, min(threads, total)))
    found = []
    for start in range(0, total, share):
        sums = torch.zeros_like(both[:, 0])
        for image in range(batch):
            low, high = (min(max(s - image * pixels, 0), pixels) for s in (start, start + share))
            if low < high:
                sums[image] = _added(both[image, low:high])
        found.append(sums)
    return found


def _added(rows: Tensor) -> Tensor:
    """Rows added one after the other, each sum rounded to float32."""
    total = torch.zeros_like(rows[0])
    for row in rows:
        total += row
    return total

"""Memory layouts of the kernels' outputs."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["laid_out", "suggested"]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def laid_out(found: Tensor, dims: int) -> Tensor:
    """A copy in the layout of the weighted kernels: channels-last where there is an image.

    Args:
        found: Codes, (N, C, ...) where there is an image.
        dims: Dimensions of the image, 0 without one. One of one dimension is of height 1 to the
            kernels, and the strides of sizes 1 show it.
    """
    if dims == 1:
        return laid_out(found.unsqueeze(2), 2).squeeze(2)
    layout = _CHANNELS_LAST[found.dim()] if dims else torch.contiguous_format
    return torch.empty_like(found, memory_format=layout).copy_(found)


def suggested(found: Tensor, like: Tensor) -> Tensor:
    """A copy in the layout that torch suggests for a tensor that lies as `like` does.

    Channels-last where the strides alone say so, which sizes of 1 leave open.
    """
    layout = _CHANNELS_LAST.get(like.dim())
    if layout is None or not _strides_say_last(like):
        layout = torch.contiguous_format
    return torch.empty_like(found, memory_format=layout).copy_(found)


def _strides_say_last(like: Tensor) -> bool:
    if like.stride(1) == 0 or not like.numel():
        return False
    least = 0
    for d in (1, *range(like.dim() - 1, 1, -1), 0):
        if like.stride(d) < least or (d == 0 and least == like.stride(1)):
            return False
        least = like.stride(d) * max(like.shape[d], 1)
    return True

"""Memory layouts of the kernels' outputs."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "channels_last",
    "laid_out",
    "passes_for_last",
    "stored",
    "suggested",
    "suggested_format",
]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def laid_out(found: Tensor, dims: int) -> Tensor:
    """Codes in the layout of the weighted kernels: channels-last where there is an image.

    Args:
        found: Codes, (N, C, ...) where there is an image; given back where they lie so already.
        dims: Dimensions of the image, 0 without one. One of one dimension is of height 1 to the
            kernels, and the strides of sizes 1 show it.
    """
    if dims == 1:
        return laid_out(found.unsqueeze(2), 2).squeeze(2)
    layout = _CHANNELS_LAST[found.dim()] if dims else torch.contiguous_format
    made = torch.empty_like(found, memory_format=layout)
    return found if found.stride() == made.stride() else made.copy_(found)


def channels_last(codes: Tensor) -> torch.memory_format:
    """The layout for images of this many axes; for others the one that they have."""
    return _CHANNELS_LAST.get(codes.dim(), torch.preserve_format)


def suggested_format(like: Tensor) -> torch.memory_format:
    """What torch suggests for a tensor that lies as `like` does.

    Channels-last where the strides alone say so, which sizes of 1 leave open.
    """
    layout = _CHANNELS_LAST.get(like.dim())
    if layout is None or not _strides_say_last(like):
        return torch.contiguous_format
    return layout


def suggested(found: Tensor, like: Tensor) -> Tensor:
    """A copy in the layout that torch suggests for `like`."""
    return torch.empty_like(found, memory_format=suggested_format(like)).copy_(found)


def passes_for_last(codes: Tensor) -> bool:
    """Whether a tensor lies channels-last, as images of one channel or one pixel always do."""
    layout = _CHANNELS_LAST.get(codes.dim())
    return layout is not None and codes.is_contiguous(memory_format=layout)


def stored(found: Tensor, like: Tensor) -> Tensor:
    """What channels-last kernels store into memory laid out as torch suggests for `like`.

    An image of one pixel passes for channels-last, and yet its result is laid out contiguous: the
    kernels write the channels last all the same, and so mix them up.
    """
    result = suggested(found, like)
    result.as_strided((found.numel(),), (1,)).copy_(found.movedim(1, -1).flatten())
    return result


def _strides_say_last(like: Tensor) -> bool:
    if like.stride(1) == 0 or not like.numel():
        return False
    least = 0
    for d in (1, *range(like.dim() - 1, 1, -1), 0):
        if like.stride(d) < least or (d == 0 and least == like.stride(1)):
            return False
        least = like.stride(d) * max(like.shape[d], 1)
    return True

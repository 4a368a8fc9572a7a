"""Codes of one grid, expressed in another."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fxqfix.qparams import QParams

__all__ = ["regrid", "same_codes"]


def regrid(codes: Tensor, source: QParams, target: QParams) -> Tensor:
    """Express codes of one grid in another, without clamping to the target's range.

    Where both grids are equal the codes come back as they are, so that a comparison of two models
    with the same qparams is a comparison of integers.

    Args:
        codes: Integer codes on `source`.
        source: The grid of `codes`.
        target: The grid to express them in.

    Returns:
        int32 codes: the nearest point of `target`'s grid, possibly outside its range.

    Example:
        >>> a, b = QParams(0.5, 0, 0, 255, torch.quint8), QParams(0.25, 10, 0, 255, torch.quint8)
        >>> regrid(torch.tensor([4]), a, b)
        tensor([18], dtype=torch.int32)
    """
    if source.same_grid(target):
        return codes.to(torch.int32)
    if codes.dtype == source.storage and source.one_byte and target.axis is None:
        if same_codes(source, target):
            return codes.to(torch.int32)
        table = _regridded(source, target).to(codes.device)
        places = codes.flatten().to(torch.int32) - source.container[0]
        return table.index_select(0, places).reshape(codes.shape)
    return _regrid(codes, source, target)


def same_codes(source: QParams, target: QParams) -> bool:
    """Whether `regrid` leaves every code as it is, as where scales differ in their last bits.

    Args:
        source: The grid of the codes.
        target: The grid to express them in.

    Example:
        >>> one = QParams(0.5, 0, 0, 255, torch.quint8)
        >>> others = (
        ...     QParams(0.5000001, 0, 0, 255, torch.quint8),
        ...     QParams(0.25, 0, 0, 9, torch.qint8),
        ... )
        >>> [same_codes(one, other) for other in others]
        [True, False]
    """
    if source.same_grid(target):
        return True
    if not source.one_byte or target.axis is not None:
        return False
    table = _regridded(source, target)
    return torch.equal(table, torch.arange(table.numel(), device="cpu") + source.container[0])


@functools.lru_cache(maxsize=4096)
def _regridded(source: QParams, target: QParams) -> Tensor:
    low, high = source.container
    return _regrid(torch.arange(low, high + 1, device="cpu"), source, target)


def _regrid(codes: Tensor, source: QParams, target: QParams) -> Tensor:
    source_scale, source_point = (t.double() for t in source.tensors(codes))
    scale, point = (t.double() for t in target.tensors(codes))
    values = (codes.double() - source_point) * source_scale
    # Half of int32's range, so that the difference of two codes can't overflow.
    return (torch.round(values / scale) + point).clamp(-(2**30), 2**30).to(torch.int32)

"""Codes of one grid, expressed in another."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fxqfix.qparams import QParams

__all__ = ["differ", "regrid", "same_codes"]

_PART = 2**17  # elements that are looked up at a time


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


def differ(
    codes: Tensor, source: QParams, target: QParams, others: Sequence[Tensor]
) -> list[Tensor]:
    """Masks of the codes that are not those of other tensors, once expressed in their grid.

    Args:
        codes: Integer codes on `source`.
        source: Their grid.
        target: The grid of the others.
        others: Codes on `target`, of the same shape.

    Example:
        >>> a, b = QParams(0.5, 0, 0, 255, torch.quint8), QParams(0.25, 10, 0, 255, torch.quint8)
        >>> differ(torch.tensor([4, 5]), a, b, [torch.tensor([18, 18])])
        [tensor([False,  True])]
    """
    if same_codes(source, target) and source.storage == target.storage:
        codes = codes.to(source.storage).contiguous()
        return [codes != other.to(codes.dtype).contiguous() for other in others]
    known = codes.dtype == source.storage and source.one_byte and target.axis is None
    if not known or codes.device.type != "cpu":
        codes = regrid(codes, source, target).contiguous()
        return [codes != other.contiguous() for other in others]
    table, codes = _regridded(source, target).roll(source.container[0]), codes.contiguous()
    flat, wanted = codes.view(torch.uint8).flatten(), [t.contiguous().flatten() for t in others]
    found = [torch.empty_like(flat, dtype=torch.bool) for _ in others]
    places = torch.empty(min(_PART, flat.numel()), dtype=torch.int32)
    for start in range(0, flat.numel(), _PART):
        here = slice(start, start + _PART)
        part = flat[here]
        now = table.index_select(0, places[: part.numel()].copy_(part))
        for mask, other in zip(found, wanted, strict=True):
            torch.ne(now, other[here], out=mask[here])
    return [mask.reshape(codes.shape) for mask in found]


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

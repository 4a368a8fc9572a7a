"""Codes of whole activations, in parts that stay in a cache: memory costs more than arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from fxqfix.qparams import QParams, quantize

__all__ = ["codes_and_values", "codes_of", "fits", "strides_of"]

_PART = 2**16  # elements, in float32
_WHOLE = 2.0**31  # steps beyond which, as for NaN, kernels differ in what they make of a float


def fits(grid: QParams) -> bool:
    """Whether a grid's codes take a byte each, one grid for the whole tensor.

    Args:
        grid: The grid.
    """
    low, high = grid.container
    return grid.one_byte and grid.whole and low <= grid.quant_min and grid.quant_max <= high


def codes_of(value: Tensor, grid: QParams) -> Tensor:
    """``quantize(value, grid)`` in the grid's storage.

    Args:
        value: Floats.
        grid: The grid.

    Example:
        >>> codes_of(torch.tensor([-1.0, 0.25, 99.0]), QParams(0.5, 3, 0, 127, torch.quint8))
        tensor([  1,   3, 127], dtype=torch.uint8)
    """
    found = _in_parts(value, grid, None)
    return quantize(value, grid).to(grid.storage) if found is None else found


def codes_and_values(
    value: Tensor, grid: QParams, *, overwrite: bool = False
) -> tuple[Tensor, Tensor] | None:
    """Codes, and what a fake-quant makes of a value; None where that has to be asked itself.

    Args:
        value: Floats.
        grid: The grid.
        overwrite: Whether the value's memory is taken for what the codes stand for.

    Example:
        >>> grid = QParams(0.5, 3, 0, 127, torch.quint8)
        >>> codes_and_values(torch.tensor([-1.1, 0.25, 99.0]), grid)
        (tensor([  1,   3, 127], dtype=torch.uint8), tensor([-1.,  0., 62.]))
    """
    into = value if overwrite else torch.empty_like(value)
    codes = _in_parts(value, grid, into)
    return None if codes is None else (codes, into)


def _in_parts(value: Tensor, grid: QParams, into: Tensor | None) -> Tensor | None:
    """The codes; None, and nothing written, where kernels may make something else of a value."""
    plain = value.dtype == torch.float32 and value.device.type == "cpu" and value.numel()
    if not plain or not fits(grid) or not strides_of(value):
        return None
    if into is not None and into.stride() != value.stride():
        return None
    scale, point = (
        torch.tensor(grid.scales[0], dtype=torch.float32, device="cpu"),
        grid.zero_points[0],
    )
    inverse, flat = float(1.0 / scale), _flat(value)
    low, high = (float(x) * inverse for x in flat.aminmax())
    if not -_WHOLE < low <= high < _WHOLE:
        return None
    codes = torch.empty_strided(value.shape, value.stride(), dtype=grid.storage, device="cpu")
    found, written = _flat(codes), None if into is None else _flat(into)
    part = torch.empty(min(_PART, flat.numel()), dtype=torch.float32, device="cpu")
    for start in range(0, flat.numel(), _PART):
        here = slice(start, start + _PART)
        x = flat[here]
        steps = torch.mul(x, inverse, out=part[: x.numel()]).round_().add_(point)
        found[here].copy_(steps.clamp_(grid.quant_min, grid.quant_max))
        if written is not None:
            torch.mul(steps.sub_(point), float(scale), out=written[here])
    return codes


def _flat(value: Tensor) -> Tensor:
    """All elements, as they lie in memory."""
    return value.detach().as_strided((value.numel(),), (1,))


def strides_of(value: Tensor) -> tuple[int, ...]:
    """The strides of a value that fills its memory; () of one that doesn't.

    Args:
        value: The value.
    """
    found, due = value.stride(), 1
    for stride, size in sorted(zip(found, value.shape, strict=True)):
        if size > 1 and stride != due:
            return ()
        due *= size
    return found

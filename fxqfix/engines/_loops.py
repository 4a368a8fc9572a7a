"""Which elements a vectorized kernel leaves to its scalar tail.

torch's element-wise kernels walk memory in one loop where all operands lie alike, 64 codes a step
and the rest one by one; with broadcasting they walk it in several loops. Body and tail may round
differently, so the emulation has to know which is which. Measured in tests/engines.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["in_tail", "result_like"]

_STEP = 64


def result_like(*operands: Tensor) -> Tensor:
    """An empty tensor of the broadcast shape, laid out as torch's element-wise ops do it."""
    total = operands[0]
    for other in operands[1:]:
        # bool "or" is cheap, allocates as every element-wise op does, and works for all dtypes.
        total = torch.logical_or(total, other)
    return torch.empty_like(total, dtype=operands[0].dtype)


def in_tail(result: Tensor, *operands: Tensor) -> Tensor:
    """Mask of the elements of `result` that the scalar tail computes, in its shape.

    Args:
        result: The (dense) output.
        operands: The inputs, before broadcasting.
    """
    tensors = [result, *(t.expand(result.shape) for t in operands)]
    dims = sorted(
        (d for d in range(result.dim()) if result.shape[d] > 1), key=lambda d: result.stride(d)
    )
    sizes, steps = _coalesced([(result.shape[d], [t.stride(d) for t in tensors]) for d in dims])
    position = torch.arange(result.numel(), device=result.device)
    inner = sizes[0] if sizes else 1
    straight = not sizes or _vectorized(steps)
    last = inner // _STEP * _STEP if straight else 0
    mask = torch.empty_like(result, dtype=torch.bool)
    mask.as_strided((result.numel(),), (1,)).copy_(position % inner >= last)
    return mask


def _vectorized(steps: list[list[int]]) -> bool:
    """Whether the inner loop is vectorized: all operands advance by one, or one stands still."""
    ahead = steps[0]
    return ahead[0] == 1 and all(s in (0, 1) for s in ahead[1:]) and ahead[1:].count(0) <= 1


def _coalesced(dims: list[tuple[int, list[int]]]) -> tuple[list[int], list[list[int]]]:
    """Join dimensions that all operands walk as one."""
    sizes: list[int] = []
    steps: list[list[int]] = []
    for size, strides in dims:
        if sizes and all(a * sizes[-1] == b for a, b in zip(steps[-1], strides, strict=True)):
            sizes[-1] *= size
        else:
            sizes.append(size)
            steps.append(strides)
    return sizes, steps

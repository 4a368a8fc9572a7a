"""Which elements a vectorized kernel leaves to its scalar tail.

torch's element-wise kernels share the elements among threads, 32,768 each at least, and walk memory
in one loop where all operands lie alike, 64 codes a step and the rest one by one; with broadcasting
they walk it in several loops. Body and tail may round differently, so the emulation has to know
which is which. Measured in tests/engines.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["result_like", "tail_positions"]

_STEP = 64
_GRAIN = 32768


def result_like(*operands: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor of the broadcast shape, laid out as torch's element-wise ops do it."""
    total = operands[0]
    for other in operands[1:]:
        # bool "or" is cheap, allocates as every element-wise op does, and works for all dtypes.
        total = torch.logical_or(total, other)
    return torch.empty_like(total, dtype=dtype)


def tail_positions(result: Tensor, *operands: Tensor, threads: int) -> Tensor:
    """Where in the memory of `result` the elements lie that the scalar tail computes.

    Args:
        result: The (dense) output.
        operands: The inputs, before broadcasting.
        threads: Number of threads that the kernel runs on.

    Returns:
        Positions in storage order, int64.
    """
    tensors = [result, *(t.expand(result.shape) for t in operands)]
    dims = sorted(
        (d for d in range(result.dim()) if result.shape[d] > 1), key=lambda d: result.stride(d)
    )
    sizes, steps = _coalesced([(result.shape[d], [t.stride(d) for t in tensors]) for d in dims])
    total = result.numel()
    if sizes and not _vectorized(steps):
        return torch.arange(total, device=result.device)
    # On the CPU, where a size is known at once; no more than a loop's tail goes to the device.
    inner = sizes[0] if sizes else 1
    share = -(-total // max(1, min(threads, -(-total // _GRAIN))))
    both = inner, max(share, 1)
    starts = torch.unique(torch.cat([torch.arange(0, total, n, device="cpu") for n in both]))
    ends = torch.cat([starts[1:], starts.new_full((1,) if total else (0,), total)])
    left = (ends - starts) % _STEP
    before = left.cumsum(0) - left
    first = torch.repeat_interleave(ends - left - before, left)
    return (first + torch.arange(len(first), device="cpu")).to(result.device)


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

"""Element-wise ops and cat against the kernels, over random, tie and extreme grids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engines.harness import differing, values

Grid = tuple[float, int]
OPS: Any = torch.ops.quantized
LAST = torch.channels_last

# Input, input, output: ordinary; odd; powers of two, whose results are full of ties; extreme.
GRIDS: tuple[tuple[Grid, Grid, Grid], ...] = (
    ((0.1, 10), (0.1, 10), (0.2, 20)),
    ((0.1, 100), (0.07, 77), (0.13, 90)),
    ((0.5, 3), (0.25, 128), (1.0, 11)),
    ((0.013, 3), (2.5, 128), (3.0, 11)),
)
# Shapes of both, and whether channels-last: bodies and tails, and broadcasting.
SHAPES = (
    ((2, 6, 37, 41), (2, 6, 37, 41), False),
    ((2, 6, 37, 41), (2, 6, 37, 41), True),
    ((1000, 177), (1000, 177), False),
    ((3, 8, 9, 11), (3, 8, 1, 1), False),
    ((3, 70, 9, 11), (3, 70, 1, 1), True),
    ((5, 130), (130,), False),
    ((7,), (7,), False),
    ((0, 3), (0, 3), False),
)


class Binary(nn.Module):
    def __init__(self, op: Callable[..., Tensor], grids: tuple[Grid, Grid, Grid]) -> None:
        super().__init__()
        self.op, self.grids = op, grids

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a = torch.quantize_per_tensor(x, *self.grids[0], torch.quint8)
        b = torch.quantize_per_tensor(y, *self.grids[1], torch.quint8)
        return self.op(a, b, *self.grids[2])


class Joined(Binary):
    def __init__(self, op: Any, grids: tuple[Grid, Grid, Grid], dim: int) -> None:
        super().__init__(op, grids)
        self.dim = dim

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a = torch.quantize_per_tensor(x, *self.grids[0], torch.quint8)
        b = torch.quantize_per_tensor(y, *self.grids[1], torch.quint8)
        return self.op([a, b], self.dim, *self.grids[2])


def codes(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def given(shape: tuple[int, ...], grid: Grid, last: bool, seed: int) -> Tensor:
    x = values(codes(shape, seed), *grid)
    return x.contiguous(memory_format=LAST) if last and x.dim() == 4 else x


@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
@pytest.mark.parametrize("name", ["add", "add_relu", "mul", "mul_relu"])
def test_two_tensors(name: str, engine: str) -> None:
    bad = total = 0
    for one, other, last in SHAPES:
        for grids in GRIDS:
            inputs = given(one, grids[0], last, 1), given(other, grids[1], last, 2)
            found = differing(Binary(getattr(OPS, name), grids), *inputs, engine=engine)
            bad, total = bad + found[0], total + found[1]
    assert bad == 0
    assert total > 900_000


@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
@pytest.mark.parametrize("name", ["cat", "cat_relu"])
def test_cat(name: str, engine: str) -> None:
    cases = [((4, 21, 37, 19), (4, 64, 37, 19), 1), ((4, 5, 7), (4, 9, 7), 1)]
    cases += [((3, 4, 5, 6), (3, 4, 5, 6), -1), ((3, 4), (5, 4), 0)]
    bad = total = 0
    for one, other, dim in cases:
        for grids in (*GRIDS, ((0.1, 10),) * 3):
            for last in (False, True):
                inputs = given(one, grids[0], last, 1), given(other, grids[1], last, 2)
                model = Joined(getattr(OPS, name), grids, dim)
                found = differing(model, *inputs, engine=engine)
                bad, total = bad + found[0], total + found[1]
    assert bad == 0
    assert total > 900_000

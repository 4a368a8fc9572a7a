"""Element-wise ops and cat against the kernels, over random, tie and extreme grids."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxqfix.engines._probes import xnnpack_takes
from fxqfix.errors import UnsupportedError
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
    def __init__(
        self, op: Callable[..., Tensor], grids: tuple[Grid, Grid, Grid], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.op, self.dtype = op, dtype
        self.grids = [(s, z - 128 * (dtype == torch.qint8)) for s, z in grids]

    def quantized(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.quantize_per_tensor(x, *self.grids[0], self.dtype)
        return a, torch.quantize_per_tensor(y, *self.grids[1], self.dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.quantized(x, y)
        return self.op(a, b, *self.grids[2])


class Joined(Binary):
    def __init__(
        self, op: Any, grids: tuple[Grid, Grid, Grid], dtype: torch.dtype, dim: int
    ) -> None:
        super().__init__(op, grids, dtype)
        self.dim = dim

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.op([*self.quantized(x, y)], self.dim, *self.grids[2])


class Scalar(nn.Module):
    def __init__(self, op: Callable[..., Tensor], number: float, source: Any, dtype: Any) -> None:
        super().__init__()
        self.op, self.number, self.source, self.dtype = op, number, source, dtype

    def forward(self, x: Tensor) -> Tensor:
        q = torch.quantize_per_tensor(x, *self.source, self.dtype)
        return self.op(q, self.number)


def codes(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def given(
    shape: tuple[int, ...], grid: Grid, last: bool, seed: int, dtype: torch.dtype = torch.quint8
) -> Tensor:
    """Values of random codes; of qint8, codes and zero point are 128 lower."""
    scale, point = grid
    down = 128 if dtype == torch.qint8 else 0
    found = codes(shape, seed).int() - down
    x = values(found.to(torch.int8 if down else torch.uint8), scale, point - down, dtype)
    return x.contiguous(memory_format=LAST) if last and x.dim() == 4 else x


DTYPES = pytest.mark.parametrize("dtype", [torch.quint8, torch.qint8], ids=str)


@DTYPES
@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
@pytest.mark.parametrize("name", ["add", "add_relu", "mul", "mul_relu"])
def test_two_tensors(name: str, engine: str, dtype: torch.dtype) -> None:
    bad = total = 0
    op = name.removesuffix("_relu")
    signed = dtype == torch.qint8 and (op == "mul" or engine == "qnnpack")
    if signed and xnnpack_takes(op):
        model, x = Binary(getattr(OPS, name), GRIDS[0], dtype), torch.zeros(3)
        with pytest.raises(UnsupportedError, match=rf"{torch.__version__[:4]}.*signed-{op}"):
            differing(model, x, x, engine=engine)
        pytest.skip(f"XNNPACK computes it in torch {torch.__version__}: refused, and named")
    for grids in GRIDS:
        model = Binary(getattr(OPS, name), grids, dtype)
        for one, other, last in SHAPES:
            inputs = given(one, grids[0], last, 1, dtype), given(other, grids[1], last, 2, dtype)
            found = differing(model, *inputs, engine=engine)
            bad, total = bad + found[0], total + found[1]
    assert bad == 0
    assert total > 900_000


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["add", "add_relu"])
def test_each_thread_has_its_tail(name: str, threads: int) -> None:
    """Grids of powers of two are full of ties, which body and tail round apart."""
    shapes = ((2, 6, 70, 81), (1, 65_537), (7, 16_411), (3, 32_768 + 33), (32_700,))
    kernel, before = getattr(OPS, name), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        model = Binary(kernel, GRIDS[2], torch.quint8)
        for shape in shapes:
            inputs = given(shape, GRIDS[2][0], False, 1), given(shape, GRIDS[2][1], False, 2)
            assert differing(model, *inputs, engine="fbgemm", threads=threads)[0] == 0
            row = inputs[1][..., :1] if len(shape) == 2 else inputs[1]
            assert differing(model, inputs[0], row, engine="fbgemm", threads=threads)[0] == 0
    finally:
        torch.set_num_threads(before)


@DTYPES
@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
@pytest.mark.parametrize("name", ["add_scalar", "add_scalar_relu", "mul_scalar", "mul_scalar_relu"])
def test_a_number(name: str, engine: str, dtype: torch.dtype) -> None:
    """Zero, and numbers that push the zero point out of the container, too."""
    bad = total = 0
    for number in (0, 0.3, -0.3, 2, -2.0, 50.0, -50.0, 1e-3, 0.05, 1e4):
        for scale, point in ((0.1, 10), (0.07, 77), (0.5, 3), (0.25, 128), (0.013, 255)):
            x = given((11, 1031), (scale, point), False, 1, dtype)
            source = (scale, point - 128 * (dtype == torch.qint8))
            model = Scalar(getattr(OPS, name), number, source, dtype)
            found = differing(model, x, engine=engine)
            bad, total = bad + found[0], total + found[1]
    assert bad == 0
    assert total > 500_000


@DTYPES
@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
@pytest.mark.parametrize("name", ["cat", "cat_relu"])
def test_cat(name: str, engine: str, dtype: torch.dtype) -> None:
    cases = [((4, 21, 37, 19), (4, 64, 37, 19), 1), ((4, 5, 7), (4, 9, 7), 1)]
    cases += [((3, 4, 5, 6), (3, 4, 5, 6), -1), ((3, 4), (5, 4), 0)]
    bad = total = 0
    for one, other, dim in cases:
        for grids in (*GRIDS, ((0.1, 10),) * 3):
            for last in (False, True):
                left = given(one, grids[0], last, 1, dtype)
                inputs = left, given(other, grids[1], last, 2, dtype)
                model = Joined(getattr(OPS, name), grids, dtype, dim)
                found = differing(model, *inputs, engine=engine)
                bad, total = bad + found[0], total + found[1]
    assert bad == 0
    assert total > 900_000


@DTYPES
@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
def test_stack(engine: str, dtype: torch.dtype) -> None:
    """Of several grids the first one's counts, for torch.cat and torch.stack alike."""
    bad = total = 0
    for function, dim in itertools.product((torch.stack, torch.cat), (0, 1, -1)):
        for grids in (*GRIDS, ((0.1, 10),) * 3):
            shape = (37, 41, 5)
            inputs = [given(shape, g, False, i, dtype) for i, g in enumerate(grids[:2])]
            found = differing(Native(function, grids, dtype, dim), *inputs, engine=engine)
            bad, total = bad + found[0], total + found[1]
    assert bad == 0
    assert total > 300_000


class Native(nn.Module):
    """A function of torch's that joins two quantized tensors."""

    def __init__(self, function: Any, grids: Any, dtype: torch.dtype, dim: int) -> None:
        super().__init__()
        self.function, self.dtype, self.dim = function, dtype, dim
        down = 128 * (dtype == torch.qint8)
        self.grids = [(scale, point - down) for scale, point in grids[:2]]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        parts = [
            torch.quantize_per_tensor(value, *grid, self.dtype)
            for value, grid in zip((x, y), self.grids, strict=True)
        ]
        return self.function(parts, self.dim)

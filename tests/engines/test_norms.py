"""Normalizations against the kernels: wide and nearly constant codes, bodies and tails, ties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn

from fxqfix.errors import UnsupportedError
from tests.engines.harness import differing, values
from tests.engines.test_elementwise import DTYPES, LAST, OPS, Grid

# Input and output grids: ordinary, and powers of two, whose results are full of ties.
GRIDS: tuple[tuple[Grid, Grid], ...] = (((0.1, 10), (0.02, 120)), ((1 / 16, 64), (1 / 32, 51)))
# Lowest code and how many above it: nearly constant codes cancel in the variance.
SPREADS = ((0, 256), (200, 2), (120, 3), (250, 6))


class Norm(nn.Module):
    """A kernel of (quantized tensor, scale, zero point), with parameters of its own."""

    def __init__(
        self, op: Callable[..., Tensor], grids: tuple[Grid, Grid], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.op, self.dtype = op, dtype
        self.source, self.own = ((s, z - 128 * (dtype == torch.qint8)) for s, z in grids)

    def forward(self, x: Tensor) -> Any:
        return self.op(torch.quantize_per_tensor(x, *self.source, self.dtype), *self.own)


def spread(
    shape: tuple[int, ...], grid: Grid, last: bool, dtype: torch.dtype, low: int, count: int
) -> Tensor:
    """Values of random codes in [low, low + count), 128 lower for qint8."""
    down = 128 * (dtype == torch.qint8)
    generator = torch.Generator().manual_seed(low)
    codes = torch.randint(low, low + count, shape, generator=generator) - down
    x = values(codes, grid[0], grid[1] - down, dtype)
    return x.contiguous(memory_format=LAST) if last else x


def parameters(count: int, ties: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    if ties:
        whole = torch.randint(-8, 9, (2, count), generator=generator)
        return whole[0] / 4.0, whole[1] / 64.0
    both = torch.randn(2, count, generator=generator)
    return both[0], both[1]


def counted(
    make: Callable[[int, bool], Callable[..., Tensor]],
    shapes: tuple[tuple[tuple[int, ...], bool], ...],
    engine: str,
    dtype: torch.dtype,
    count_of: Callable[[tuple[int, ...]], int],
    threads: int = 1,
) -> tuple[int, int]:
    bad = total = 0
    for shape, last in shapes:
        for grids in GRIDS:
            model = Norm(make(count_of(shape), grids[0][0] == 1 / 16), grids, dtype)
            for low, count in SPREADS:
                x = spread(shape, grids[0], last, dtype, low, count)
                found = differing(model, x, engine=engine, threads=threads)
                bad, total = bad + found[0], total + found[1]
    return bad, total


BATCH = {
    "batch_norm1d": (((700, 77), False), ((40, 43, 61), False), ((3, 8, 1), False)),
    "batch_norm2d": (((3, 41, 29, 31), False), ((3, 41, 29, 31), True), ((9, 3, 5, 7), True)),
    "batch_norm3d": (((3, 41, 9, 7, 31), False), ((2, 3, 4, 5, 6), False)),
    "batch_norm": (((500, 77), False), ((3, 41, 29, 31), True), ((2, 9, 17, 11, 31), False)),
}


@DTYPES
@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
@pytest.mark.parametrize("relu", ["", "_relu"])
@pytest.mark.parametrize("name", BATCH)
def test_batch_norm(name: str, relu: str, engine: str, dtype: torch.dtype) -> None:
    kernel = getattr(OPS, name + relu)

    def make(count: int, ties: bool) -> Callable[..., Tensor]:
        weight, bias = parameters(count, ties)
        mean, variance = parameters(count + 1, ties)[0][:-1], weight.square() + 0.1

        def op(q: Tensor, scale: float, point: int) -> Tensor:
            found: Tensor = kernel(q, weight, bias, mean, variance, 1e-5, scale, point)
            return found

        return op

    bad, total = counted(make, BATCH[name], engine, dtype, lambda shape: shape[1])
    assert bad == 0
    assert total > 1_000_000


def test_batch_norm_of_nothing() -> None:
    one = torch.ones(3)

    def op(q: Tensor, scale: float, point: int) -> Tensor:
        found: Tensor = OPS.batch_norm2d(q, one, one, one, one, 1e-5, scale, point)
        return found

    model = Norm(op, GRIDS[0], torch.quint8)
    assert differing(model, torch.zeros(0, 3, 2, 2), engine="fbgemm") == (0, 0)


ROWS = (((1300, 37), False), ((700, 64), False), ((40, 5, 11, 7), True), ((3, 2, 7, 501), False))


@DTYPES
@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(affine: bool, engine: str, dtype: torch.dtype) -> None:
    def make(count: int, ties: bool) -> Callable[..., Tensor]:
        both = parameters(count, ties) if affine else (None, None)

        def op(q: Tensor, scale: float, point: int) -> Tensor:
            found: Tensor = OPS.layer_norm(q, [count], *both, 1e-5, scale, point)
            return found

        return op

    bad, total = counted(make, ROWS, engine, dtype, lambda shape: shape[-1])
    assert bad == 0
    assert total > 1_000_000


GROUPED = (
    ((2, 6, 7, 9), 2, False),
    ((2, 6, 7, 9), 3, True),
    ((2, 70, 5, 3), 2, True),
    ((3, 66, 4, 4), 66, True),
    ((2, 66, 4, 4), 1, True),
    ((2, 40, 24, 23), 2, True),
    ((1, 12, 30, 30), 12, True),
    ((2, 1, 9, 11), 1, False),
    ((2, 12, 81, 31), 4, False),
    ((4, 6, 33), 3, False),
    ((2, 6, 3, 4, 5), 6, False),
)


def _group_norm(groups: int, channels: int, ties: bool, affine: bool) -> Callable[..., Tensor]:
    both = parameters(channels, ties) if affine else (None, None)

    def op(q: Tensor, scale: float, point: int) -> Tensor:
        found: Tensor = (
            OPS.instance_norm(q, *both, 1e-5, scale, point)
            if groups == channels
            else OPS.group_norm(q, groups, *both, 1e-5, scale, point)
        )
        return found

    return op


@DTYPES
@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
@pytest.mark.parametrize("affine", [True, False])
def test_group_and_instance_norm(affine: bool, engine: str, dtype: torch.dtype) -> None:
    bad = total = 0
    for shape, groups, last in GROUPED:

        def make(count: int, ties: bool, groups: int = groups) -> Callable[..., Tensor]:
            return _group_norm(groups, count, ties, affine)

        found = counted(make, ((shape, last),), engine, dtype, lambda shape: shape[1])
        bad, total = bad + found[0], total + found[1]
    assert bad == 0
    assert total > 1_000_000


def test_each_thread_adds_up_its_own_pixels() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        bad, total = counted(
            lambda count, ties: _group_norm(2, count, ties, True),
            (((3, 40, 24, 23), True),),
            "fbgemm",
            torch.quint8,
            lambda shape: shape[1],
            threads=2,
        )
    finally:
        torch.set_num_threads(before)
    assert bad == 0
    assert total > 500_000


def test_group_norm_that_leaves_images_out() -> None:
    model = Norm(_group_norm(4, 4, False, True), GRIDS[0], torch.quint8)
    x = torch.randn(8, 4, 2, 2).contiguous(memory_format=LAST)
    assert differing(model, x[:4], engine="fbgemm")[0] == 0
    with pytest.raises(UnsupportedError, match="leaves the last images out"):
        differing(model, x, engine="fbgemm")


def test_modules() -> None:
    affine = [nn.Parameter(p) for p in parameters(6, False)]
    batch = nnq.BatchNorm2d(6)
    batch.weight, batch.bias = affine
    batch.scale, batch.zero_point = torch.tensor(0.03), torch.tensor(100)
    modules = [
        batch.eval(),
        nnq.LayerNorm([7], nn.Parameter(parameters(7, False)[0]), None, 0.02, 90),
        nnq.GroupNorm(2, 6, *affine, 0.02, 90),
        nnq.InstanceNorm2d(6, *affine, 0.02, 90),
        nnq.InstanceNorm2d(6, affine[0], None, 0.02, 90),
    ]
    for module in modules:
        quantized = nn.Sequential(nnq.Quantize(0.05, 120, torch.quint8), module)
        assert differing(quantized, torch.randn(3, 6, 5, 7), engine="fbgemm") == (0, 630)

"""Discrepancy against NumPy, which shares no line with it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxqfix.measure import Discrepancy, discrepancy
from fxqfix.qparams import QParams

U8 = QParams(0.0123, 3, 0, 127, torch.quint8)
GRIDS = {
    "quint8 narrow": (U8, U8),
    "quint8 whole": (U8.with_range(0, 255), U8.with_range(0, 255)),
    "qint8": (QParams(0.5, 0, -128, 127, torch.qint8), QParams(0.5, 0, -128, 127, torch.qint8)),
    "range lost": (U8, U8.with_range(0, 255)),
    "other scale": (U8, QParams(0.0125, 3, 0, 255, torch.quint8)),
    "other zero point": (U8, QParams(0.0123, 9, 0, 255, torch.quint8)),
    "32 bits": (
        QParams(0.25, 0, -(2**31), 2**31 - 1, torch.qint32),
        QParams(0.25, 0, -(2**31), 2**31 - 1, torch.qint32),
    ),
    "per channel": (
        QParams((0.1, 0.2, 0.4), (0, 1, 2), -128, 127, torch.qint8, 0),
        QParams((0.1, 0.25, 0.4), (0, 1, 2), -128, 127, torch.qint8, 0),
    ),
    "fractional zero points": (
        QParams((0.1, 0.2, 0.4), (0.5, 1.25, 2.0), 0, 255, torch.quint8, 0),
        QParams((0.1, 0.2, 0.4), (0.5, 1.25, 2.0), 0, 255, torch.quint8, 0),
    ),
}


def _real(codes: Any, grid: QParams) -> Any:
    shape = [-1, 1] if grid.axis is not None else [1]
    scale = np.array(grid.scales, np.float32).astype(np.float64).reshape(shape)
    return (codes - np.array(grid.zero_points, np.float64).reshape(shape)) * scale, scale


def by_numpy(wanted: Any, found: Any, grid: QParams, actual: QParams) -> dict[str, float]:
    a, scale = _real(wanted, grid)
    b, _ = _real(found, actual)
    point = np.array(grid.zero_points, np.float64).reshape([-1, 1] if grid.axis == 0 else [1])
    same = grid.scales == actual.scales and grid.zero_points == actual.zero_points
    codes = found if same else np.rint(b / scale) + point
    lsb = np.abs(codes - wanted)
    return {
        "elements": wanted.size,
        "differing": np.count_nonzero(lsb),
        "max_lsb": lsb.max(),
        "sum_lsb": lsb.sum(),
        "out_of_range": np.count_nonzero((found < grid.quant_min) | (found > grid.quant_max)),
        "saturated_low": np.count_nonzero(found <= grid.quant_min),
        "saturated_high": np.count_nonzero(found >= grid.quant_max),
        "max_abs": np.abs(a - b).max(),
        "signal": (a * a).sum(),
        "noise": ((a - b) ** 2).sum(),
        "energy": (b * b).sum(),
        "product": (a * b).sum(),
    }


@pytest.mark.parametrize("name", GRIDS)
@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 300) | st.integers(1366, 1500),
    share=st.floats(0, 1),
)
def test_every_sum_is_numpys(name: str, seed: int, size: int, share: float) -> None:
    grid, actual = GRIDS[name]
    random = np.random.default_rng(seed)
    low, high = actual.container if actual.bits <= 8 else (-(2**20), 2**20)
    wanted = random.integers(max(grid.quant_min, low), min(grid.quant_max, high) + 1, (3, size))
    other = random.integers(low, high + 1, (3, size))
    found = np.where(random.random((3, size)) < share, other, wanted)
    result = discrepancy(torch.from_numpy(wanted), torch.from_numpy(found), grid, actual)
    for field, value in by_numpy(wanted, found, grid, actual).items():
        mine = getattr(result, field)
        if isinstance(mine, int):
            assert mine == value, field
        else:  # float64 sums in another order
            assert math.isclose(mine, value, rel_tol=1e-12, abs_tol=1e-18), field


def test_codes_of_any_dtype_and_memory_order() -> None:
    wanted = torch.randint(0, 128, (2, 3, 4, 5), dtype=torch.uint8)
    found = (wanted + 1).to(memory_format=torch.channels_last)
    first = discrepancy(wanted, found, U8, U8)
    assert first == discrepancy(wanted.int(), found.int(), U8, U8)
    assert (first.differing, first.max_lsb, first.sum_lsb) == (120, 1, 120)
    signed = QParams(0.5, -3, -128, 127, torch.qint8)
    lowest = torch.full((4,), -128, dtype=torch.int8)
    assert discrepancy(lowest, -1 - lowest, signed, signed).max_lsb == 255


def test_batches_add_up_to_the_whole() -> None:
    a, b = torch.randint(0, 128, (2, 64)), torch.randint(0, 256, (2, 64))
    whole = discrepancy(a, b, U8, U8)
    parts = discrepancy(a[0], b[0], U8, U8) + discrepancy(a[1], b[1], U8, U8)
    assert (whole.differing, whole.sum_lsb) == (parts.differing, parts.sum_lsb)
    assert (whole.max_lsb, whole.out_of_range) == (parts.max_lsb, parts.out_of_range)
    assert math.isclose(whole.noise, parts.noise, rel_tol=1e-12)


def test_nothing_and_equal() -> None:
    empty = torch.empty(0, dtype=torch.uint8)
    assert discrepancy(empty, empty, U8, U8) == Discrepancy()
    same = discrepancy(torch.tensor([1, 2]), torch.tensor([1, 2]), U8, U8)
    assert same.exact
    assert (same.sqnr_db, same.cosine) == (math.inf, 1.0)

"""Pools of lines and volumes against the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxqfix.errors import UnsupportedError
from tests.engines.harness import differing
from tests.engines.test_activations import Unary
from tests.engines.test_elementwise import DTYPES, given

LINES: dict[str, Callable[[Tensor], Any]] = {
    "max 3 padded": lambda q: F.max_pool1d(q, 3, 1, 1),
    "average 2": nn.AvgPool1d(2, 1),
    "average 3 padded": lambda q: F.avg_pool1d(q, 3, 1, 1),
    "average 5": lambda q: F.avg_pool1d(q, (5,)),
    "average ceil": lambda q: F.avg_pool1d(q, 3, 2, 1, ceil_mode=True),
    "average without padding": lambda q: F.avg_pool1d(q, 3, 1, 1, count_include_pad=False),
    "adaptive 400": nn.AdaptiveAvgPool1d(400),
    "adaptive 1": lambda q: F.adaptive_avg_pool1d(q, 1),
}
REFUSED = {"average ceil": "ceil_mode", "average without padding": "counts padding"}
VOLUMES: dict[str, Callable[[Tensor], Any]] = {
    "average 2": lambda q: F.avg_pool3d(q, 2, 1),
    "average 3 padded": nn.AvgPool3d(3, 1, 1),
    "average ceil": lambda q: F.avg_pool3d(q, 3, 2, 1, ceil_mode=True),
    "average without padding": lambda q: F.avg_pool3d(q, 3, 1, 1, count_include_pad=False),
    "average by 5": lambda q: F.avg_pool3d(q, (2, 3, 1), 1, divisor_override=5),
    "adaptive 7": lambda q: F.adaptive_avg_pool3d(q, 7),
    "adaptive 1": lambda q: F.adaptive_avg_pool3d(q, 1),
    "adaptive 4, 5, 6": nn.AdaptiveAvgPool3d((4, 5, 6)),
}
MAX3D = {"max 3 padded": lambda q: F.max_pool3d(q, 3, 1, 1), "max": nn.MaxPool3d(2, ceil_mode=True)}
GRIDS = ((0.07, 77), (0.5, 3), (1 / 16, 64), (0.02, 255))
FEW = ("adaptive 1", "max", "adaptive 4, 5, 6", "average ceil")  # few outputs


def counted(
    op: Any, shapes: Any, engine: str, dtype: torch.dtype, layout: torch.memory_format
) -> tuple[int, int]:
    bad = total = 0
    for grid in GRIDS:
        model = Unary(op, grid, (), dtype)
        for shape in shapes:
            x = given(shape, grid, False, 4, dtype).contiguous(memory_format=layout)
            found = differing(model, x, engine=engine)
            bad, total = bad + found[0], total + found[1]
    return bad, total


@DTYPES
@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
@pytest.mark.parametrize("name", LINES)
def test_line(name: str, engine: str, dtype: torch.dtype) -> None:
    own = engine == "qnnpack" and dtype == torch.quint8
    if own and name in REFUSED:
        with pytest.raises(UnsupportedError, match=REFUSED[name]):
            differing(Unary(LINES[name], GRIDS[0], ()), torch.zeros(1, 2, 6), engine=engine)
        return
    shapes = [(9, 33, 997), (40, 7, 803), (50, 16, 800), (3, 1, 5), (7, 9, 1)][: 3 if own else 5]
    if name == "average 5":
        shapes = shapes[:3] * 3
    shapes = shapes if name not in ("average 2", "average 5") else [s for s in shapes if s[2] > 5]
    bad, total = counted(LINES[name], shapes, engine, dtype, torch.contiguous_format)
    assert bad == 0
    assert total > (5_000 if name in FEW else 1_000_000)


@DTYPES
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
@pytest.mark.parametrize("name", VOLUMES)
def test_volume(name: str, engine: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    shapes = [(3, 21, 17, 16, 17), (4, 33, 12, 13, 11), (12, 16, 12, 12, 12), (3, 1, 7, 8, 7)]
    bad, total = counted(VOLUMES[name], shapes, engine, dtype, layout)
    assert bad == 0
    assert total > (1_000 if name in FEW else 500_000)


@DTYPES
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("name", MAX3D)
def test_max_of_volumes(name: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    shapes = [(3, 21, 17, 16, 17), (4, 65, 12, 13, 11)]
    bad, total = counted(MAX3D[name], shapes, "fbgemm", dtype, layout)
    assert bad == 0
    assert total > (100_000 if name in FEW else 1_000_000)

"""Pools and means against the kernels, in both layouts, with every option."""

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

POOLS: dict[str, Callable[[Tensor], Any]] = {
    "max 2": lambda q: F.max_pool2d(q, 2),
    "max 3 padded": lambda q: F.max_pool2d(q, 3, 2, 1),
    "max ceil": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "average 2": lambda q: F.avg_pool2d(q, 2),
    "average 3 padded": lambda q: F.avg_pool2d(q, 3, 1, 1),
    "average without padding": lambda q: F.avg_pool2d(q, 3, 2, 1, count_include_pad=False),
    "average ceil": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "average by 5": lambda q: F.avg_pool2d(q, 3, 2, 1, divisor_override=5),
    "adaptive 1": lambda q: F.adaptive_avg_pool2d(q, 1),
    "adaptive 2": lambda q: F.adaptive_avg_pool2d(q, 2),
    "adaptive 3": lambda q: F.adaptive_avg_pool2d(q, 3),
    "adaptive 4, 5": nn.AdaptiveAvgPool2d((4, 5)),
    "mean of the image": lambda q: q.mean([2, 3]),
    "mean kept": lambda q: q.mean([2, 3], keepdim=True),
    "mean of channels": lambda q: torch.mean(q, 1),
    "mean of rows": lambda q: torch.mean(q, 3, keepdim=True),
}
REFUSED = {
    "average without padding": "average-counts-padding",
    "average ceil": "ceil_mode",
    "average by 5": "divisor_override",
}
GRIDS = ((0.1, 10), (0.07, 77), (0.5, 3), (0.03, 128), (1 / 16, 64))
SHAPES = (
    ((4, 6, 37, 41), False),
    ((4, 21, 17, 19), True),
    ((4, 21, 17, 19), False),
    ((8, 40, 12, 12), True),
    ((3, 1, 5, 5), True),
    ((2, 16, 9, 9), True),
    ((2, 7, 9, 9), True),
    ((64, 33, 7, 7), True),
    ((64, 33, 7, 7), False),
    ((64, 33, 8, 8), True),
    ((64, 9, 8, 8), False),
    ((40, 1, 12, 35), False),
    ((40, 1, 12, 35), True),
)


@DTYPES
@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
@pytest.mark.parametrize("name", POOLS)
def test_pool(name: str, engine: str, dtype: torch.dtype) -> None:
    """qnnpack's kernels take quint8; qint8 runs on the shared ones."""
    own = engine == "qnnpack" and dtype == torch.quint8
    reason = REFUSED.get(name) if own else None
    if reason is not None:
        with pytest.raises(UnsupportedError, match=reason):
            differing(Unary(POOLS[name], GRIDS[0], ()), torch.zeros(1, 2, 6, 6), engine=engine)
        return
    bad = total = 0
    for grid in GRIDS:
        model = Unary(POOLS[name], grid, (), dtype)
        for shape, last in SHAPES:
            found = differing(model, given(shape, grid, last, 4, dtype), engine=engine)
            bad, total = bad + found[0], total + found[1]
    assert bad == 0
    assert total > 30_000  # a mean over whole images has few outputs

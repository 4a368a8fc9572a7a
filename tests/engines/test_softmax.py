"""Softmax and matmul against the kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.engines.harness import differing
from tests.engines.test_activations import Unary
from tests.engines.test_elementwise import DTYPES, OPS, Binary, Grid, given

SHAPES = (
    ((5, 21, 17, 19), False),
    ((5, 21, 17, 19), True),
    ((300, 77), False),
    ((40, 3, 257), False),
    ((9, 1, 5, 5), True),
    ((3, 7, 1, 1), False),
    ((11,), False),
)
GRIDS: tuple[tuple[Grid, Grid], ...] = (
    ((0.1, 10), (1 / 256, 0)),
    ((0.011, 200), (1 / 256, 0)),
    ((1.5, 0), (1 / 256, 0)),
    ((1 / 16, 64), (1 / 128, 3)),
    ((0.02, 255), (0.0011, 0)),
)


@DTYPES
@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
def test_softmax(engine: str, dtype: torch.dtype) -> None:
    bad = total = 0
    for source, own in GRIDS:
        for dim in range(max(len(shape) for shape, _ in SHAPES)):  # qnnpack takes none from behind

            def op(q: Tensor, s: float, z: int, dim: int = dim) -> Tensor:
                found: Tensor = OPS.softmax(q, dim, s, z)
                return found

            # of qint8 the zero point moves; qnnpack's own kernel takes quint8 only
            model = Unary(op, source, own, dtype)
            for shape, last in ((s, last) for s, last in SHAPES if dim < len(s)):
                found = differing(model, given(shape, source, last, 5, dtype), engine=engine)
                bad, total = bad + found[0], total + found[1]
    assert bad == 0
    assert total > 1_000_000


def test_qnnpack_softmax_of_transposed_tensors() -> None:
    """The kernel's own defect: rows come out as columns, and so they do here."""

    def op(q: Tensor, s: float, z: int) -> Tensor:
        found: Tensor = OPS.softmax(q.t(), 0, s, z)
        return found

    model, x = Unary(op, (0.1, 10), (1 / 256, 0)), given((30, 50), (0.1, 10), False, 5)
    assert differing(model, x, engine="qnnpack") == (0, 1500)
    q = torch.quantize_per_tensor(x, 0.1, 10, torch.quint8)
    right = OPS.softmax(q.t().contiguous(), 0, 1 / 256, 0).int_repr()
    before = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = "qnnpack"
        found = OPS.softmax(q.t(), 0, 1 / 256, 0).int_repr()
    finally:
        torch.backends.quantized.engine = before
    assert (found.int() - right.int()).abs().max() > 10


def _plain(a: Tensor, b: Tensor, s: float, z: int) -> Tensor:
    found: Tensor = OPS.matmul(a, b, s, z)
    return found


def _transposed(a: Tensor, b: Tensor, s: float, z: int) -> Tensor:
    found: Tensor = OPS.matmul(a, b.transpose(-1, -2), s, z)
    return found


MATMULS: tuple[tuple[tuple[int, ...], tuple[int, ...], Callable[..., Tensor]], ...] = (
    ((300, 77), (77, 410), _plain),
    ((300, 3), (3, 410), _plain),
    ((6, 40, 64), (6, 64, 50), _plain),
    ((2, 8, 33, 16), (2, 8, 35, 16), _transposed),
)


@DTYPES
@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
def test_matmul(engine: str, dtype: torch.dtype) -> None:
    bad = total = 0
    grids = (
        ((0.1, 10), (0.07, 77), (0.9, 90)),
        ((1 / 16, 64), (1 / 32, 128), (1 / 2, 99)),
        ((0.02, 255), (0.5, 0), (11.0, 3)),
    )
    for one, other, op in MATMULS:
        for grid in grids:
            inputs = given(one, grid[0], False, 1, dtype), given(other, grid[1], False, 2, dtype)
            found = differing(Binary(op, grid, dtype), *inputs, engine=engine)
            bad, total = bad + found[0], total + found[1]
    assert bad == 0
    assert total > 800_000

"""prelu and gelu against the kernels: every code, many grids, bodies and tails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.ao.nn.quantized as nnq
import torch.nn.functional as F
from torch import Tensor, nn

from fxqfix.errors import UnsupportedError
from tests.engines.harness import differing
from tests.engines.test_activations import GRIDS, SHAPES, Rows, Unary
from tests.engines.test_elementwise import DTYPES, OPS, given

WEIGHTS = ((0.01, 3), (1 / 64, 100), (0.5, 128), (0.002, 0))


@DTYPES
@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
@pytest.mark.parametrize("one", [True, False])
def test_prelu(one: bool, engine: str, dtype: torch.dtype) -> None:
    bad = total = 0
    down = 128 * (dtype == torch.qint8)
    for shape, last in SHAPES:
        if not all(shape):
            continue
        count = 1 if one else shape[1 if len(shape) > 1 else 0]
        for (source, target), weight in zip(GRIDS, (*WEIGHTS, *WEIGHTS), strict=False):
            slopes = torch.linspace(-0.5, 1.5, count) if count > 1 else torch.tensor([0.3])
            qw = torch.quantize_per_tensor(slopes, weight[0], weight[1] - down, dtype)

            def op(q: Tensor, s: float, z: int, qw: Tensor = qw) -> Tensor:
                found: Tensor = OPS.prelu(q, qw, s, z)
                return found

            model = Unary(op, source, target, dtype)
            found = differing(model, given(shape, source, last, 3, dtype), engine=engine)
            bad, total = bad + found[0], total + found[1]
    assert bad == 0
    assert total > 1_000_000


def test_prelu_module_and_computed_slopes() -> None:
    module = nnq.PReLU(0.04, 90, 6)
    module.set_weight(torch.quantize_per_tensor(torch.randn(6), 0.01, 100, torch.quint8))
    model = nn.Sequential(nnq.Quantize(0.05, 120, torch.quint8), module)
    assert differing(model, torch.randn(3, 6, 9), engine="fbgemm") == (0, 162)
    computed = Unary(lambda q, s, z: OPS.prelu(q, q[0], s, z), (0.1, 10), (0.1, 10))
    with pytest.raises(UnsupportedError, match="its slopes are not a constant"):
        differing(computed, torch.zeros(2, 3), engine="fbgemm")


GELU_GRIDS = (*(s for s, _ in GRIDS), (0.02, 128), (0.013, 100), (0.31, 200), (1 / 8, 3))


@DTYPES
@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate: str, engine: str, dtype: torch.dtype) -> None:
    def op(q: Tensor) -> Tensor:
        return F.gelu(q, approximate=approximate)

    bad = total = 0
    for source in GELU_GRIDS:
        model = Unary(op, source, (), dtype)
        for shape, last in SHAPES:
            found = differing(model, given(shape, source, last, 3, dtype), engine=engine)
            bad, total = bad + found[0], total + found[1]
    assert bad == 0
    assert total > 1_000_000


def test_every_code_through_gelu_bodies_and_tails() -> None:
    """A thousand scales, all codes: 63 of 319 are the tail's."""
    bad = total = 0
    codes: Any = (torch.arange(319) % 256).to(torch.uint8)
    make = torch._make_per_tensor_quantized_tensor
    for start in range(0, 1000, 50):
        grids = [(0.002 + 0.0003 * step, step % 256) for step in range(start, start + 50)]
        x = torch.stack([make(codes, *grid).dequantize() for grid in grids])
        found = differing(Rows(F.gelu, grids), x, engine="fbgemm")
        bad, total = bad + found[0], total + found[1]
    assert bad == 0
    assert total == 319_000

"""Activations against the kernels: every code, many grids, bodies and tails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxqfix.errors import UnsupportedError
from tests.engines.harness import differing
from tests.engines.test_elementwise import DTYPES, OPS, Grid, given

# Function of a quantized tensor, and whether it takes an output grid of its own.
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "relu": (torch.relu, False),
    "relu6": (OPS.relu6, False),
    "functional relu6": (F.relu6, False),
    "hardtanh": (lambda q: F.hardtanh(q, -1.0, 2.0), False),
    "clamp": (lambda q: torch.clamp(q, -1.0, 2.0), False),
    "quantized clamp": (lambda q: OPS.clamp(q, -1.0, 2.0), False),
    "threshold": (lambda q: OPS.threshold(q, 0.5, 0.1), False),
    "hardsigmoid": (F.hardsigmoid, False),
    "tanh": (torch.tanh, False),
    "sigmoid": (torch.sigmoid, False),
    "hardswish": (OPS.hardswish, True),
    "leaky_relu": (lambda q, s, z: OPS.leaky_relu(q, 0.1, False, s, z), True),
    "elu": (OPS.elu, True),
    "elu of 0.5": (lambda q, s, z: OPS.elu(q, s, z, 0.5), True),
    "celu": (lambda q, s, z: OPS.celu(q, s, z, 0.5), True),
}
GRIDS: tuple[tuple[Grid, Grid], ...] = (
    ((0.1, 10), (0.2, 20)),
    ((0.07, 77), (0.13, 90)),
    ((0.5, 3), (1.0, 11)),
    ((0.03, 128), (0.0123, 128)),
    ((1 / 16, 64), (1 / 32, 50)),
    ((0.0417, 0), (0.0213, 255)),
)
SHAPES = (
    ((4, 6, 37, 41), False),
    ((4, 21, 17, 39), True),
    ((1000, 77), False),
    ((7,), False),
    ((130,), False),
    ((3, 1, 5, 5), True),
    ((0, 3), False),
)


class Unary(nn.Module):
    def __init__(
        self,
        op: Callable[..., Any],
        source: Grid,
        own: Grid | tuple[()],
        dtype: torch.dtype = torch.quint8,
    ) -> None:
        super().__init__()
        down = 128 * (dtype == torch.qint8)
        self.op, self.dtype, self.source = op, dtype, (source[0], source[1] - down)
        self.own = (own[0], own[1] - down) if own else ()

    def forward(self, x: Tensor) -> Any:
        return self.op(torch.quantize_per_tensor(x, *self.source, self.dtype), *self.own)


@DTYPES
@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str, engine: str, dtype: torch.dtype) -> None:
    """On qnnpack, clamps of channels-last tensors are the permuted ones that its kernels give."""
    op, own = ACTIVATIONS[name]
    bad = total = 0
    for source, target in GRIDS:
        model = Unary(op, source, target if own else (), dtype)
        for shape, last in SHAPES:
            if engine == "qnnpack" and not all(shape):
                continue  # some of its kernels raise or crash on empty tensors
            found = differing(model, given(shape, source, last, 3, dtype), engine=engine)
            bad, total = bad + found[0], total + found[1]
    assert bad == 0
    assert total > 1_000_000


@pytest.mark.parametrize("bounds", [{"min": -1.0}, {"max": 2.0}], ids=str)
def test_clamp_with_one_bound(bounds: dict[str, float]) -> None:
    def clamp(q: Tensor) -> Tensor:
        return torch.clamp(q, **bounds)

    x = given((3, 77), GRIDS[0][0], False, 3)
    assert differing(Unary(clamp, GRIDS[0][0], ()), x, engine="fbgemm")[0] == 0
    with pytest.raises(UnsupportedError, match="one bound only"):
        differing(Unary(clamp, GRIDS[0][0], ()), x, engine="qnnpack")


class Rows(nn.Module):
    """A function of each row, on a grid of its own: making a model for each takes longest."""

    def __init__(self, function: Callable[[Tensor], Tensor], grids: list[Grid]) -> None:
        super().__init__()
        self.function, self.grids = function, grids

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = [torch.quantize_per_tensor(x[i], *g, torch.quint8) for i, g in enumerate(self.grids)]
        return tuple(self.function(row) for row in rows)


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_every_code_on_many_grids(name: str) -> None:
    """Results close to ties come once in hundreds of thousands of codes."""
    bad = total = 0
    function, found = getattr(torch, name), torch.Generator().manual_seed(0)
    scales = (1e-3 + 0.08 * torch.rand(400, generator=found)).tolist()
    # The first one's code 152 is 3e-8 from a tie of sigmoid.
    scales = [0.015321104787290096, *scales]
    grids = [(scale, (133 + index * 37) % 256) for index, scale in enumerate(scales)]
    whole = torch.stack([torch.arange(256).sub(point).mul(scale) for scale, point in grids])
    # 256 codes are vectors only, 7 of them tail only.
    few = torch.stack([row[index % 250 :][:7] for index, row in enumerate(whole)])
    for start in range(0, len(grids), 40):
        part = slice(start, start + 40)
        model = Rows(function, grids[part])
        for values in (whole[part], few[part]):
            wrong, n = differing(model, values, engine="fbgemm")
            bad, total = bad + wrong, total + n
    assert total > 105_000
    assert bad == 0


def test_qnnpack_sigmoid_has_one_scale() -> None:
    model = Unary(OPS.sigmoid, (0.1, 10), (0.2, 20))
    with pytest.raises(UnsupportedError, match="output scale of 1/256 only"):
        differing(model, torch.zeros(3), engine="qnnpack")

"""Embeddings against the kernels: every float equal to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn
from torch.ao.quantization import PerChannelMinMaxObserver

from fxqfix.errors import UnsupportedError
from tests.engines.harness import differing

ROWS = 60
DTYPES = pytest.mark.parametrize("dtype", [torch.quint8, torch.quint4x2], ids=str)
ENGINE = pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])


def table(width: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-4, 3, ROWS).unsqueeze(1)
    values = torch.randn(ROWS, width, generator=generator) * spread
    observer = PerChannelMinMaxObserver(
        dtype=dtype,
        quant_min=0,
        quant_max=255 if dtype == torch.quint8 else 15,
        qscheme=torch.per_channel_affine_float_qparams,
        ch_axis=0,
    )
    observer(values)
    scales, points = observer.calculate_qparams()
    return torch.quantize_per_channel(values, scales.float(), points.float(), 0, dtype)


class Tokens(nn.Module):
    """A table and a quantized neighbour, without which a model is no int8 model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.neighbour = inner, nnq.Quantize(0.1, 100, torch.quint8)


class One(Tokens):
    def forward(self, a: Tensor) -> Any:
        return self.inner(a), self.neighbour(self.inner(a))


class Two(Tokens):
    def forward(self, a: Tensor, b: Tensor) -> Any:
        return self.inner(a, b), self.neighbour(self.inner(a, b))


class Three(Tokens):
    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Any:
        return self.inner(a, b, c), self.neighbour(self.inner(a, b, c))


class Weighted(Tokens):
    def forward(self, a: Tensor, b: Tensor) -> Any:
        found = self.inner(a, per_sample_weights=b)
        return found, self.neighbour(found)


@DTYPES
@ENGINE
def test_embedding(engine: str, dtype: torch.dtype) -> None:
    bad = total = 0
    for seed, width in enumerate((8, 12, 36, 64, 100)):
        module = nnq.Embedding(ROWS, width, _weight=table(width, dtype, seed), dtype=dtype)
        for shape in ((2600,), (30, 70)):
            indices = torch.randint(ROWS, shape)
            found = differing(One(module), indices, engine=engine)
            bad, total = bad + found[0], total + found[1]
    assert bad == 0
    assert total > 2_000_000  # half of them floats


@DTYPES
@ENGINE
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_bags(last: bool, weighted: bool, engine: str, dtype: torch.dtype) -> None:
    bad = total = 0
    for seed, width in enumerate((8, 12, 36, 64, 100)):
        weight = table(width, dtype, seed)
        module = nnq.EmbeddingBag(
            ROWS, width, mode="sum", _weight=weight, include_last_offset=last, dtype=dtype
        )
        lengths = torch.randint(0, 9, (5000,))
        count = int(lengths.sum())
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        offsets = offsets if last else offsets[:-1]
        inputs = [torch.randint(ROWS, (count,)), offsets, torch.randn(count)]
        model = Three(module) if weighted else Two(module)
        found = differing(model, *inputs[: 2 + weighted], engine=engine)
        bad, total = bad + found[0], total + found[1]
    assert bad == 0
    assert total > 2_000_000  # half of them floats


@DTYPES
def test_bags_of_one_length(dtype: torch.dtype) -> None:
    module = nnq.EmbeddingBag(ROWS, 16, mode="sum", _weight=table(16, dtype, 9), dtype=dtype)
    indices = torch.randint(ROWS, (50, 7))
    assert differing(One(module), indices, engine="fbgemm") == (0, 1600)
    assert differing(Weighted(module), indices, torch.randn(50, 7), engine="fbgemm") == (0, 1600)


def test_pruned_rows_are_refused() -> None:
    module = nnq.EmbeddingBag(ROWS, 16, mode="sum", _weight=table(16, torch.quint8, 9))
    module.pruned_weights = True
    with pytest.raises(UnsupportedError, match="its rows are pruned"):
        differing(One(module), torch.randint(ROWS, (5, 7)), engine="fbgemm")

"""Many observers asked at once: the same bits as each asked alone, and none of them changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization import (
    FakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)

from fxqfix._observers import answers
from fxqfix._torch import is_fake_quant, register_fake_quant

AFFINE = {"dtype": torch.quint8, "qscheme": torch.per_tensor_affine}
NARROW = {**AFFINE, "quant_min": 0, "quant_max": 127}
SYMMETRIC = {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric}
CENTERED = {"dtype": torch.quint8, "qscheme": torch.per_tensor_symmetric}
CHANNELS = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric}
FLOAT_POINTS = {"dtype": torch.quint8, "qscheme": torch.per_channel_affine_float_qparams}

SETTINGS = (
    lambda: MinMaxObserver(**AFFINE),
    lambda: MinMaxObserver(**AFFINE, eps=0.5),
    lambda: MinMaxObserver(**NARROW),
    lambda: MinMaxObserver(**SYMMETRIC),
    lambda: MinMaxObserver(**CENTERED),
    lambda: MovingAverageMinMaxObserver(**AFFINE, reduce_range=True),
    lambda: PerChannelMinMaxObserver(**CHANNELS),
    lambda: PerChannelMinMaxObserver(**FLOAT_POINTS),
    lambda: FakeQuantize(MovingAverageMinMaxObserver, 0, 127, **AFFINE),
    lambda: FusedMovingAvgObsFakeQuantize(MovingAverageMinMaxObserver, 0, 255, **AFFINE),
    lambda: FusedMovingAvgObsFakeQuantize(
        MovingAveragePerChannelMinMaxObserver, -128, 127, **CHANNELS
    ),
)


class Halved(MinMaxObserver):
    """A formula of one's own."""

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        scale, point = super().calculate_qparams()
        return scale / 2, point


class WithList(MinMaxObserver):
    """An attribute that can't be compared by hash."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.history: list[float] = []


def seen(module: nn.Module, low: float, high: float) -> nn.Module:
    generator = torch.Generator().manual_seed(int(1000 * high))
    with torch.no_grad():
        module(low + (high - low) * torch.rand(5, 16, generator=generator))
    return module


def test_together_as_alone() -> None:
    ranges = [(-3.0, 1.0), (-1e-9, 1e-9), (0.5, 7.0), (-2.0, -1.0), (-0.3, 77.7), (0.0, 1.0 / 3)]
    models = nn.ModuleList(seen(make(), *r) for make in SETTINGS for r in ranges)
    models.append(seen(WithList(**AFFINE), -1.0, 2.0))
    before = copy.deepcopy(models.state_dict())
    found = answers(models.modules())
    assert all(id(module) in found for module in models)
    for module in models:
        for mine, theirs in zip(found[id(module)], module.calculate_qparams(), strict=True):  # type: ignore[operator]
            assert torch.equal(mine, theirs)
            assert mine.dtype == theirs.dtype or not mine.dtype.is_floating_point
    after = models.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_left_out() -> None:
    never, other = MinMaxObserver(**AFFINE), seen(Halved(**AFFINE), -1.0, 1.0)
    histogram = seen(HistogramObserver(), -1.0, 1.0)
    empty, healthy = PerChannelMinMaxObserver(**CHANNELS), seen(MinMaxObserver(**NARROW), 0, 1)
    found = answers([never, other, histogram, empty, nn.ReLU(), healthy])
    assert set(found) == {id(healthy)}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_range_is_left_to_torch(value: float) -> None:
    broken = seen(MinMaxObserver(**AFFINE), -1.0, 1.0)
    broken.max_val.fill_(value)  # type: ignore[operator, union-attr]
    assert answers([broken, seen(MinMaxObserver(**AFFINE), -1.0, 1.0)]) == {}


def test_a_class_registered_late_is_a_fake_quant() -> None:
    class Late(nn.Module):
        pass

    assert not is_fake_quant(Late())
    register_fake_quant(Late)
    assert is_fake_quant(Late())

"""Small models in every flow, for the tests of readers, tracing and pairing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao import quantization as tq
from torch.ao.quantization import quantize_fx

from fxqfix import to_decomposed
from fxqfix._torch import quiet


def image(batch: int = 2, seed: int = 0, gain: float = 1.0) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * gain


class Stubs(nn.Module):
    """QuantStub, fused conv-bn-relu, a residual add, cat, mul and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn, self.relu = nn.BatchNorm2d(8), nn.ReLU()
        self.second = nn.Conv2d(8, 8, 1)
        self.add, self.cat, self.mul, self.add_relu, self.scale = (
            nn.quantized.FloatFunctional() for _ in range(5)
        )
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(self.quant(x))))
        y = self.add_relu.add_relu(self.add.add(self.second(x), x), x)
        y = self.scale.mul_scalar(self.mul.mul(y, x), 0.5)
        y = self.pool(self.cat.cat([x, y], 1)).flatten(1)
        return self.dequant(self.fc(y))


class Shared(nn.Module):
    """One conv and one relu that are called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.conv, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(self.quant(x)))
        return self.dequant(self.relu(self.conv(x)))


class Plain(nn.Module):
    """What the FX flows take: functions, methods, a functional weight, a shared module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 1)
        self.act = nn.Hardswish()
        self.weight = nn.Parameter(torch.randn(4, 16) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        y = self.act(self.twice(self.twice(x)))
        y = torch.relu(x + y)
        y = torch.cat([x, y], 1).mean([2, 3])
        return torch.sigmoid(nn.functional.linear(y, self.weight))


def calibrated(model: nn.Module, batches: int = 2) -> nn.Module:
    with torch.no_grad():
        for seed in range(batches):
            model(image(seed=seed))
    return model


def eager_ptq(net: nn.Module, engine: str = "fbgemm", fuse: Any = None) -> nn.Module:
    """An eager post-training model: observed, calibrated, in eval mode."""
    with quiet():
        model = copy.deepcopy(net).eval()
        model = tq.fuse_modules(model, fuse) if fuse else model
        model.qconfig = tq.get_default_qconfig(engine)
        return calibrated(tq.prepare(model))


def eager_qat(net: nn.Module, engine: str = "fbgemm", fuse: Any = None) -> nn.Module:
    """An eager QAT model after two steps, in eval mode."""
    with quiet():
        model = copy.deepcopy(net).train()
        model = tq.fuse_modules_qat(model, fuse) if fuse else model
        model.qconfig = tq.get_default_qat_qconfig(engine)
        return calibrated(tq.prepare_qat(model)).eval()


def fx_ptq(net: nn.Module, mapping: Any = None) -> fx.GraphModule:
    with quiet():
        mapping = mapping or tq.get_default_qconfig_mapping("fbgemm")
        model = quantize_fx.prepare_fx(copy.deepcopy(net).eval(), mapping, (image(),))
        return calibrated(model)


def fx_qat(net: nn.Module, mapping: Any = None) -> fx.GraphModule:
    with quiet():
        mapping = mapping or tq.get_default_qat_qconfig_mapping("fbgemm")
        model = quantize_fx.prepare_qat_fx(copy.deepcopy(net).train(), mapping, (image(),))
        return calibrated(model).eval()


def int8(prepared: nn.Module) -> nn.Module:
    with quiet():
        if isinstance(prepared, fx.GraphModule):
            return quantize_fx.convert_fx(copy.deepcopy(prepared))
        return tq.convert(copy.deepcopy(prepared).eval())


def reference(prepared: fx.GraphModule) -> fx.GraphModule:
    with quiet():
        return quantize_fx.convert_to_reference_fx(copy.deepcopy(prepared))


def decomposed(prepared: nn.Module) -> fx.GraphModule:
    return to_decomposed(prepared)


def torchs_decomposed(prepared: fx.GraphModule) -> fx.GraphModule:
    """What torch's own conversion to decomposed ops returns."""
    with quiet():
        return quantize_fx._convert_to_reference_decomposed_fx(copy.deepcopy(prepared))


STUB_FUSION = [["conv", "bn", "relu"]]
EAGER: dict[str, Callable[[], nn.Module]] = {
    "ptq": lambda: eager_ptq(Stubs()),
    "ptq fused": lambda: eager_ptq(Stubs(), fuse=STUB_FUSION),
    "ptq qnnpack": lambda: eager_ptq(Stubs(), "qnnpack", STUB_FUSION),
    "qat": lambda: eager_qat(Stubs()),
    "qat fused": lambda: eager_qat(Stubs(), fuse=STUB_FUSION),
    "shared": lambda: eager_ptq(Shared()),
    "shared qat": lambda: eager_qat(Shared()),
    "wrapper": lambda: eager_ptq(
        tq.QuantWrapper(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()))
    ),
    "wrapper qat": lambda: eager_qat(
        tq.QuantWrapper(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()))
    ),
}

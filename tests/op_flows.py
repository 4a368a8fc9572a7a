"""How torch quantizes a sample of `op_samples`: prepare, calibrate or train, convert."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.ao.quantization as tq
import torch.ao.quantization.quantize_fx as qfx
from torch import Tensor, nn
from torch.ao.nn import quantizable as nnqa
from torch.ao.nn import quantized as nnq
from torch.ao.quantization.backend_config import (
    BackendConfig,
    get_native_backend_config,
    get_onednn_backend_config,
)
from torch.ao.quantization.fx.custom_config import ConvertCustomConfig, PrepareCustomConfig

from tests.op_samples import Sample

__all__ = ["batches", "convert", "mapping", "prepare"]


def inputs(sample: Sample, amplitude: float = 1.0, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    if not sample.shapes:  # token numbers
        return (torch.randint(5, (2, 3), generator=generator),)
    return tuple(amplitude * torch.randn(s, generator=generator) for s in sample.shapes)


def batches(sample: Sample) -> Iterator[tuple[Tensor, ...]]:
    """New data: as calibrated, three times the amplitude, and channels-last where it is 4-D."""
    yield inputs(sample, 1.0, 2)
    if not sample.shapes:
        return
    yield inputs(sample, 3.0, 3)
    if len(sample.shapes[0]) == 4:
        last = inputs(sample, 3.0, 4)
        yield tuple(x.contiguous(memory_format=torch.channels_last) for x in last)


# ---------------------------------------------------------------------------- qconfigs


def mapping(sample: Sample, setting: str) -> tq.QConfigMapping:
    """The qconfig mapping of a sample's setting."""
    qat = "qat" in setting
    make = tq.get_default_qat_qconfig_mapping if qat else tq.get_default_qconfig_mapping
    engine = "onednn" if sample.backend == "onednn" else "fbgemm"
    found = make("qnnpack" if setting.endswith("tensor") else engine)
    if sample.kind == "fused":  # torch fuses only modules that are mapped to one qconfig
        for kind in (nn.Linear, nn.LeakyReLU, nn.Tanh):
            found.set_object_type(kind, found.global_qconfig)
    if sample.kind.startswith("embedding"):
        for table in (nn.Embedding, nn.EmbeddingBag):
            found.set_object_type(table, _embedding_qconfig(sample, qat))
    return found


def _embedding_qconfig(sample: Sample, qat: bool) -> tq.QConfig:
    if qat:
        return tq.qconfig.default_embedding_qat_qconfig
    if sample.kind == "embedding-4bit":
        return tq.float_qparams_weight_only_qconfig_4bit
    return tq.float_qparams_weight_only_qconfig


def _backend(sample: Sample) -> BackendConfig:
    onednn = sample.backend == "onednn"
    return get_onednn_backend_config() if onednn else get_native_backend_config()


# ----------------------------------------------------------------------------- prepare


class _Eager(nn.Module):
    """A model with a QuantStub for each of its inputs and a DeQuantStub for its output."""

    def __init__(self, inner: nn.Module, stubs: int) -> None:
        super().__init__()
        self.stubs = nn.ModuleList(tq.QuantStub() for _ in range(stubs))
        self.inner = inner
        self.out = tq.DeQuantStub()


class _EagerTokens(_Eager):
    def forward(self, x: Tensor) -> Any:
        return self.out(self.inner(x))


class _EagerOne(_Eager):
    def forward(self, x: Tensor) -> Any:
        return self.out(self.inner(self.stubs[0](x)))


class _EagerTwo(_Eager):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.out(self.inner(self.stubs[0](x), self.stubs[1](y)))


@functools.cache
def prepare(sample: Sample, setting: str) -> nn.Module:
    """A prepared model in eval mode, calibrated or trained for a step, observers disabled.

    Cached: everything that is tested leaves it as it is.
    """
    torch.manual_seed(0)
    model = sample.make()
    for module in model.modules():
        _stir(module)
    make = _prepare_fx if setting.startswith("fx") else _prepare_eager
    prepared = make(sample, setting, model)
    (_train if "qat" in setting else _calibrate)(sample, prepared)
    prepared.apply(tq.disable_observer)
    return prepared.eval()


def _stir(module: nn.Module) -> None:
    """Statistics and affine parameters that are not those of a new normalization."""
    for name, low, high in (
        ("running_mean", -0.5, 0.5),
        ("running_var", 0.5, 2.0),
        ("weight", 0.5, 1.5),
        ("bias", -0.5, 0.5),
    ):
        value = getattr(module, name, None)
        if isinstance(value, Tensor) and "Norm" in type(module).__name__:
            nn.init.uniform_(value, low, high)


def _prepare_fx(sample: Sample, setting: str, model: nn.Module) -> nn.Module:
    qat = "qat" in setting
    make = qfx.prepare_qat_fx if qat else qfx.prepare_fx
    custom = PrepareCustomConfig()
    if sample.kind == "lstm":
        custom.set_float_to_observed_mapping(nn.LSTM, nnqa.LSTM)
    return make(
        model.train(qat),
        mapping(sample, setting),
        inputs(sample),
        prepare_custom_config=custom,
        backend_config=_backend(sample),
    )


def _prepare_eager(sample: Sample, setting: str, inner: nn.Module) -> nn.Module:
    qat, count = "qat" in setting, len(sample.shapes)
    model = (_EagerTokens, _EagerOne, _EagerTwo)[count](inner, count).train(qat)
    fuse = tq.fuse_modules_qat if qat else tq.fuse_modules
    for group in sample.fuse:
        fuse(model, [f"inner.{name}" for name in group], inplace=True)
    configs = mapping(sample, setting)
    model.qconfig = configs.global_qconfig
    for module in model.modules():
        if type(module) in configs.object_type_qconfigs and not setting.endswith("tensor"):
            module.qconfig = configs.object_type_qconfigs[type(module)]
    return (tq.prepare_qat if qat else tq.prepare)(model)


def _calibrate(sample: Sample, prepared: nn.Module) -> None:
    with torch.no_grad():
        prepared(*inputs(sample, 1.0, 0))
        prepared(*inputs(sample, 1.0, 1))


def _train(sample: Sample, prepared: nn.Module) -> None:
    out = prepared.train()(*inputs(sample, 1.0, 0))
    if out.requires_grad:
        out.square().mean().backward()
        wanted = [p for p in prepared.parameters() if p.grad is not None]
        torch.optim.SGD(wanted, lr=0.05).step()
    prepared(*inputs(sample, 1.0, 1))


# ----------------------------------------------------------------------------- convert


def convert(
    sample: Sample, setting: str, model: nn.Module, *, reference: bool = False
) -> nn.Module:
    """torch's own conversion of a copy."""
    model = copy.deepcopy(model)
    if not setting.startswith("fx"):
        return tq.convert(model)
    make = qfx.convert_to_reference_fx if reference else qfx.convert_fx
    custom = ConvertCustomConfig()
    if sample.kind == "lstm":
        custom.set_observed_to_quantized_mapping(nnqa.LSTM, nnq.LSTM)
    return make(model, convert_custom_config=custom, backend_config=_backend(sample))

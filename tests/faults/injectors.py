"""One injector per cause: it plants the cause in a healthy pair of models.

A healthy pair is a frozen prepared model, already folded, and its decomposed conversion, which are
equal to the bit; whatever differs after an injection is the injected fault's. An injector returns
the (prepared, converted, engine) to compare, and the names of the sites where the fault sits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.ao.quantization import (
    DeQuantStub,
    QConfigMapping,
    QuantStub,
    disable_observer,
    get_default_qat_qconfig_mapping,
    get_default_qconfig,
    get_default_qconfig_mapping,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import fxqfix
from fxqfix._torch import quantized_engine, quiet
from fxqfix.passes import FreezeQParams
from tests.faults.plants import PLANTS, Plot
from tests.faults.zoo import base

SHAPE = (8, 3, 8, 8)


class Net(nn.Module):
    """conv-BN-relu, conv, residual add with relu, dropout, pool, linear."""

    def __init__(self, drop: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        # Quantized dropout hands its input's qparams on, whatever its own observer saw.
        self.drop = drop if drop is not None else nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn(self.stem(x)))
        x = torch.relu(self.body(x) + x)
        x = self.pool(self.drop(x))
        return self.head(torch.flatten(x, 1))


def trained(qconfig_engine: str = "fbgemm", drop: nn.Module | None = None) -> fx.GraphModule:
    """A QAT model, observers off, eval mode."""
    x = torch.randn(SHAPE)
    mapping = get_default_qat_qconfig_mapping(qconfig_engine)
    prepared = prepare_qat_fx(Net(drop).train(), mapping, (x,))
    for _ in range(4):
        prepared(torch.randn(SHAPE))
    for bn in (m for m in prepared.modules() if isinstance(m, nn.BatchNorm2d)):
        with torch.no_grad():  # far from the identity, so that folding has something to round
            bn.weight.uniform_(0.5, 2.0)
            bn.bias.uniform_(-0.5, 0.5)
    for _ in range(4):
        prepared(torch.randn(SHAPE))
    prepared.eval().apply(disable_observer)
    return prepared


def data(amplitude: float = 1.0) -> list[torch.Tensor]:
    """A few batches, as wide as those of `trained` at amplitude 1."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(SHAPE, generator=generator).clamp(-2, 2) * amplitude for _ in range(3)]


@dataclass(frozen=True)
class Fault:
    """A planted fault: what to compare, on what, and where the fault sits."""

    prepared: nn.Module
    converted: nn.Module
    batches: list[torch.Tensor]
    sites: tuple[str, ...]
    engine: str | None = None


def range_lost() -> Fault:
    """Widen one quantize of the decomposed graph to its dtype's range."""
    frozen = fxqfix.freeze(trained())
    converted = fxqfix.to_decomposed(frozen, pin_ranges=False)
    _edit(converted, "x", quant_max=255)
    return Fault(frozen, converted, data(3.0), ("x",))


def scale_formula() -> Fault:
    """Convert with the observers' qparams instead of the fused kernels'."""
    prepared = trained()
    attributes = prepared.meta["_observed_graph_module_attrs"]
    baked = copy.deepcopy(prepared)
    for path, module in list(baked.named_modules()):
        site = path.removesuffix(".weight_fake_quant")
        if path.endswith(".weight_fake_quant"):
            from fxqfix.dialects.quantizer import read_quantizer
            from fxqfix.passes import FrozenFakeQuantize

            state = read_quantizer(module)
            assert state.baked is not None
            baked.get_submodule(site).weight_fake_quant = FrozenFakeQuantize(state.baked)
    baked.meta["_observed_graph_module_attrs"] = attributes
    sites = ("stem", "body", "head")
    return Fault(prepared, fxqfix.to_decomposed(baked), data(0.5), sites)


def bn_folding() -> Fault:
    """The unfolded QAT model against its folded conversion."""
    prepared = trained()
    bn: Any = prepared.stem.bn  # type: ignore[union-attr]  # a submodule
    with torch.no_grad():  # a mean and a bias that cancel: nothing moves but the rounding
        factor = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        bn.running_mean += 64.0
        bn.bias += 64.0 * factor
    many = [torch.randn(16, 3, 32, 32) * 0.5 for _ in range(2)]
    return Fault(prepared, fxqfix.to_decomposed(prepared), many, ("stem",))


def bn_training() -> Fault:
    """Leave BatchNorm in train mode."""
    prepared = trained()
    converted = fxqfix.to_decomposed(prepared)
    for module in prepared.modules():
        if hasattr(module, "bn"):
            module.train()
    return Fault(prepared, converted, data(0.5), ("stem",))


def dropout_training() -> Fault:
    """Leave dropout in train mode."""
    prepared = trained(drop=nn.Dropout(0.5))
    converted = fxqfix.to_decomposed(prepared)
    prepared.drop.train()  # type: ignore[union-attr, operator]  # a submodule
    return Fault(prepared, converted, data(0.5), ("drop",))


def rounding() -> Fault:
    """Inputs on exact ties, an odd zero point, and the native quantize op's other rounding."""
    x = torch.linspace(-2, 2, 8 * 3 * 8 * 8).reshape(SHAPE)
    mapping = QConfigMapping().set_global(get_default_qconfig("fbgemm"))
    prepared = prepare_fx(Net().eval(), mapping, (x,))
    prepared(x)
    frozen = fxqfix.freeze(prepared)
    quantizer: Any = frozen.activation_post_process_0
    quantizer.scale.fill_(0.25)
    quantizer.zero_point.fill_(65)
    ties = (torch.arange(x.numel()) % 40 - 20 + 0.5) * 0.25
    return Fault(frozen, _native(frozen), [ties.reshape(SHAPE)], ("x",))


def bias_int32() -> Fault:
    """Let qnnpack round the bias: large scales, small biases."""
    prepared = fxqfix.freeze(trained("qnnpack"))
    with quantized_engine("qnnpack"):
        converted = convert_fx(copy.deepcopy(prepared))
    return Fault(prepared, converted, [torch.randn(64, 3, 8, 8)], ("body", "head"), "qnnpack")


class Pooled(nn.Module):
    """An eager model whose pool has no observer."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.pool = nn.AvgPool2d(3, 2)  # nine values: no mean is a tie
        self.plus = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.quant(x))
        return self.dequant(self.plus.add(x, x))


def requantization() -> Fault:
    """An int8 pool rounds to its input's grid, which eager mode does not simulate."""
    model = Pooled().eval()
    model.qconfig = get_default_qconfig("fbgemm")
    prepared = torch.ao.quantization.prepare(model)
    prepared(torch.randn(SHAPE))
    frozen = fxqfix.freeze(prepared)
    converted = torch.ao.quantization.convert(copy.deepcopy(frozen))
    decomposed = fxqfix.to_decomposed(converted, ranges_from=prepared)
    return Fault(frozen, decomposed, data(0.5), ("add",))


class Overwritten(nn.Module):
    """A skip that reads what an activation wrote over: dataflow says otherwise."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.act = act if act is not None else nn.ELU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return torch.add(self.act(x), x)


def overwritten(act: nn.Module | None = None, engine: str = "fbgemm") -> fx.GraphModule:
    """`Overwritten`, calibrated."""
    torch.manual_seed(0)
    mapping = get_default_qconfig_mapping(engine)
    prepared = prepare_fx(Overwritten(act).eval(), mapping, (torch.randn(SHAPE),))
    prepared(torch.randn(SHAPE))
    return prepared


def inplace_lost() -> Fault:
    """The int8 ELU writes a tensor of its own, so that the skip reads what was there before."""
    frozen = FreezeQParams()(overwritten()).graph_module  # fxqfix.freeze would repair it
    with quantized_engine("fbgemm"):
        converted = convert_fx(copy.deepcopy(frozen))
    return Fault(frozen, converted, data(0.5), ("add",), "fbgemm")


class Clamped(nn.Module):
    """What a MobileNet does: a convolution, then a relu6 that no flow fuses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.clip = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU6()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.clip(self.conv(x))


def kernel_defect() -> Fault:
    """qnnpack's relu6 takes a channels-last tensor for a contiguous one."""
    torch.manual_seed(0)
    mapping = QConfigMapping().set_global(get_default_qconfig("qnnpack"))
    prepared = prepare_fx(Clamped().eval(), mapping, (torch.randn(SHAPE),))
    prepared(torch.randn(SHAPE))
    frozen = fxqfix.freeze(prepared)
    with quantized_engine("qnnpack"):
        converted = convert_fx(copy.deepcopy(frozen))
    return Fault(frozen, converted, data(0.5), ("clip",), "qnnpack")


class Normed(nn.Module):
    """A normalization, then a convolution."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.fc = norm, nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(x))


def degenerate_scale() -> Fault:
    """The normalization of a constant: what float32 rounds, divided by the root of epsilon."""
    x = torch.full((2, 4, 4, 4), 0.3)
    mapping = get_default_qconfig_mapping("fbgemm")
    prepared = prepare_fx(Normed(nn.InstanceNorm2d(4)).eval(), mapping, (x,))
    prepared(x)
    frozen = fxqfix.freeze(prepared)
    with quantized_engine("fbgemm"):
        converted = convert_fx(copy.deepcopy(frozen))
    return Fault(frozen, converted, [x], ("norm",), "fbgemm")


def half_dequantize(dtype: torch.dtype = torch.bfloat16) -> Fault:
    """Half precision and 16-bit codes: torch's dequantize subtracts the zero point in half."""
    pytest.importorskip("torchao")
    from tests.checks.test_wide_codes import LinearsOf
    from tests.dialects import pt2e_nets as nets

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 9)).eval().to(dtype)
    x = torch.randn(24, 32, dtype=dtype)
    quantizer = LinearsOf(torch.int16, -(2**15), 2**15 - 1, 2.0**-23)
    with quiet():
        prepared = nets.prepare_pt2e(torch.export.export(net, (x,)).module(), quantizer)
        prepared(x)
    frozen = fxqfix.freeze(prepared)
    return Fault(frozen, nets.convert_pt2e(prepared), [x, 0.5 * x], ("linear", "linear_1"))


def zero_point_cut() -> Fault:
    """A table with float zero points: the decomposed op cuts them off."""
    pytest.importorskip("torchao")
    from tests.dialects import pt2e_nets as nets

    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 8)).eval()
    ids = torch.arange(40).reshape(4, 10)
    own = nets._xnnpack_quantizer
    with quiet():
        xnnpack = own.XNNPACKQuantizer().set_global(own.get_symmetric_quantization_config())
    both = [nets.embedding_quantizer.EmbeddingQuantizer(), xnnpack]
    quantizer = nets.tq.ComposableQuantizer(both)
    prepared = nets.prepare_pt2e(torch.export.export(net, (ids,)).module(), quantizer)
    prepared(ids)
    frozen = fxqfix.freeze(prepared)
    return Fault(frozen, nets.convert_pt2e(prepared), [ids], ("embedding",))


def _native(frozen: fx.GraphModule) -> fx.GraphModule:
    """The decomposed model with its first quantize done by torch.quantize_per_tensor."""
    converted = fxqfix.to_decomposed(frozen, pin_ranges=False)
    node = next(n for n in converted.graph.nodes if n.name == "x_quantize")
    source, scale, point = node.args[:3]
    with converted.graph.inserting_before(node):
        native = converted.graph.call_function(
            torch.quantize_per_tensor, (source, scale, point, torch.quint8)
        )
        codes = converted.graph.call_method("dequantize", (native,))
    node.replace_input_with(source, codes)
    converted.recompile()
    return converted


def _edit(model: fx.GraphModule, site: str, quant_max: int) -> None:
    for node in model.graph.nodes:
        if node.name in (f"{site}_quantize", f"{site}_dequantize"):
            node.args = (*node.args[:4], quant_max, *node.args[5:])
    model.recompile()


def _plant(name: str, place: int = 1) -> Callable[[], Fault]:
    """A plant in the smallest architecture that has all of them."""

    def injector() -> Fault:
        plot = Plot(base("Residual"))
        PLANTS[name].put(plot, place)
        (sites,) = plot.planted.values()
        return Fault(plot.prepared, plot.converted(), [plot.batch] * 2, tuple(sorted(sites)))

    return injector


INJECTORS: dict[str, Callable[[], Fault]] = {
    "range-lost": range_lost,
    "scale-formula": scale_formula,
    "bn-folding": bn_folding,
    "bn-training": bn_training,
    "dropout-training": dropout_training,
    "rounding": rounding,
    "bias-int32": bias_int32,
    "requantization": requantization,
    "kernel-defect": kernel_defect,
    "inplace-lost": inplace_lost,
    "zero-point-cut": zero_point_cut,
    "degenerate-scale": degenerate_scale,
    "half-dequantize": half_dequantize,
    **{
        name: _plant(name)
        for name in (
            "uncalibrated",
            "shared-qparams",
            "stale-qparams",
            "moving-observer",
            "not-lowered",
            "fake-quant-off",
            "observer-only",
            "other-weights",
            "other-qparams",
        )
    },
}

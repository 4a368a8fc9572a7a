"""Small models through the PT2E flow: architectures, quantizers, and the two together.

torchao is an extra: without it, what imports this is skipped.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxqfix._pt2e import own_annotations
from fxqfix._torch import quiet
from tests.strategies import like

with quiet():
    pytest.importorskip("torchao", reason='the extra "pt2e" is not installed')
    # Releases for older builds of torch have no PT2E, or another one.
    pytest.importorskip("torchao.testing.pt2e._xnnpack_quantizer", exc_type=ImportError)

with quiet():
    from torchao.quantization import pt2e
    from torchao.quantization.pt2e import qat_utils
    from torchao.quantization.pt2e import quantizer as tq
    from torchao.quantization.pt2e.quantize_pt2e import (
        convert_pt2e,
        prepare_pt2e,
        prepare_qat_pt2e,
    )
    from torchao.quantization.pt2e.quantizer import (
        arm_inductor_quantizer,
        embedding_quantizer,
        x86_inductor_quantizer,
    )
    from torchao.testing.pt2e import _xnnpack_quantizer

# --- architectures -------------------------------------------------------------------------------


class Residual(nn.Module):
    """Convolutions, a slice, a residual add, a mean and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.body(x) + x[:, :, 1:-1, 1:-1])
        return self.head(x.mean([2, 3]))


class Mobile(nn.Module):
    """An inverted residual: convolutions with BatchNorm, with and without bias, one depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.project, self.bn3 = nn.Conv2d(8, 3, 1), nn.BatchNorm2d(3)
        self.drop, self.act1, self.act2 = nn.Dropout(0.2), nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.expand(x)))
        y = self.act2(self.bn2(self.deep(y)))
        return self.drop(x + self.bn3(self.project(y)))


class Mlp(nn.Module):
    """Linears of a sequence, with an activation that stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.GELU())
        self.last = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.net(x.flatten(1)[:, :8]))


class Attention(nn.Module):
    """One head, spelled out: matmul of two values, softmax, transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 0]
        weights = torch.softmax(torch.matmul(self.q(x), self.k(x).transpose(1, 2)), -1)
        return torch.matmul(weights, self.v(x))


class Words(nn.Module):
    """An embedding in front of a linear; the images' values become indices."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = (x[:, 0, 0].abs() * 4).to(torch.int64).clamp(max=15)
        return self.head(self.table(rows))


class Branches(nn.Module):
    """One convolution called twice, a max pool, cat, and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 3, 3, padding=1), nn.ConvTranspose2d(6, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        y = torch.relu(self.conv(x))
        return self.up(torch.max_pool2d(torch.cat([x, y], 1), 2))


NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "mobile": Mobile,
    "mlp": Mlp,
    "attention": Attention,
    "words": Words,
    "branches": Branches,
}


def image(batch: int = 2, seed: int = 0, gain: float = 1.0) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * gain


# --- quantizers ----------------------------------------------------------------------------------


class Tiny(tq.Quantizer):
    """A quantizer of the tests' own: linear and conv2d, with what is asked for.

    Args:
        weight: The spec of weights.
        activation: The spec of inputs, or None for weight-only.
        bias: Whether biases become int32, with scales derived from input and weight.
    """

    def __init__(self, weight: Any, activation: Any = None, bias: bool = False) -> None:
        super().__init__()
        self.weight, self.activation, self.bias = weight, activation, bias

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        aten = torch.ops.aten
        for node in model.graph.nodes:
            if node.target in (aten.linear.default, aten.conv2d.default):
                wanted = {node.args[1]: self.weight}
                if self.activation is not None:
                    wanted[node.args[0]] = self.activation
                if self.bias and len(node.args) > 2 and node.args[2] is not None:
                    wanted[node.args[2]] = _derived(node, self.weight)
                node.meta["quantization_annotation"] = tq.QuantizationAnnotation(
                    input_qspec_map=wanted, _annotated=True
                )
        return model

    def validate(self, model: fx.GraphModule) -> None:
        pass


def _derived(node: fx.Node, weight: Any) -> Any:
    def scales(sources: list[Any]) -> tuple[Tensor, Tensor]:
        (input_scale, _), (weight_scale, _) = (s.calculate_qparams() for s in sources)
        scale = (input_scale * weight_scale).to(torch.float32)
        return scale, torch.zeros_like(scale, dtype=torch.int32)

    per_channel = weight.qscheme == torch.per_channel_symmetric
    return tq.DerivedQuantizationSpec(
        derived_from=[(node.args[0], node), (node.args[1], node)],
        derive_qparams_fn=scales,
        dtype=torch.int32,
        quant_min=-(2**31),
        quant_max=2**31 - 1,
        qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
        ch_axis=0 if per_channel else None,
    )


def weight_spec(*, per_channel: bool = True, low: int = -128, high: int = 127) -> Any:
    observer = pt2e.PerChannelMinMaxObserver if per_channel else pt2e.MinMaxObserver
    return tq.QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=observer.with_args(eps=2**-12),
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
        ch_axis=0 if per_channel else None,
    )


def activation_spec(**options: Any) -> Any:
    given = {"quant_min": 0, "quant_max": 255, **options}
    return tq.QuantizationSpec(
        dtype=torch.uint8,
        observer_or_fake_quant_ctr=pt2e.HistogramObserver.with_args(eps=2**-12),
        qscheme=torch.per_tensor_affine,
        **given,
    )


def x86(**options: bool) -> Any:
    found = x86_inductor_quantizer.X86InductorQuantizer()
    config = x86_inductor_quantizer.get_default_x86_inductor_quantization_config
    return found.set_global(config(**options))


def arm(**options: bool) -> Any:
    found = arm_inductor_quantizer.ArmInductorQuantizer()
    config = arm_inductor_quantizer.get_default_arm_inductor_quantization_config
    return found.set_global(config(**options))


def xnnpack(**options: bool) -> Any:
    with quiet():  # it is torchao's own test copy, and says that executorch's is the one to use
        found = _xnnpack_quantizer.XNNPACKQuantizer()
    return found.set_global(_xnnpack_quantizer.get_symmetric_quantization_config(**options))


@dataclass(frozen=True)
class Mode:
    """A quantizer, and how it is used.

    Attributes:
        make: Makes the quantizer.
        qat: Whether for quantization-aware training.
        nets: The architectures in which it finds something to quantize, and that torchao converts.
        static: Whether activations have fixed qparams.
    """

    make: Callable[[], Any]
    qat: bool = False
    nets: tuple[str, ...] = tuple(NETS)
    static: bool = True


_LINEAR = ("mlp", "attention", "words")
# torchao's Inductor quantizers refuse a module that is called twice.
_ONCE = ("residual", "mobile", "mlp", "attention", "words")

MODES: dict[str, Mode] = {
    "x86": Mode(x86, nets=_ONCE),
    "x86-reduced": Mode(functools.partial(x86, reduce_range=True), nets=("residual",)),
    "x86-qat": Mode(functools.partial(x86, is_qat=True), qat=True, nets=_ONCE),
    "x86-dynamic": Mode(functools.partial(x86, is_dynamic=True), nets=_LINEAR, static=False),
    "xnnpack": Mode(functools.partial(xnnpack, is_per_channel=True)),
    "xnnpack-tensor": Mode(xnnpack, nets=("branches",)),
    "xnnpack-qat": Mode(
        functools.partial(xnnpack, is_per_channel=True, is_qat=True),
        qat=True,
        nets=("branches",),
    ),
    "xnnpack-dynamic": Mode(
        functools.partial(xnnpack, is_per_channel=True, is_dynamic=True), nets=_LINEAR, static=False
    ),
    "arm": Mode(arm, nets=("mlp",)),
    "weight-only": Mode(
        lambda: Tiny(weight_spec()), nets=("residual", "mlp", "mobile"), static=False
    ),
    "embedding": Mode(embedding_quantizer.EmbeddingQuantizer, nets=("words",), static=False),
    "bias-int32": Mode(
        lambda: Tiny(weight_spec(), activation_spec(), bias=True), nets=("residual", "mlp")
    ),
    "sub-8-bit": Mode(
        lambda: Tiny(weight_spec(per_channel=False, low=-8, high=7), activation_spec(quant_max=15)),
        nets=("residual",),
    ),
}

# Each architecture in each mode; BatchNorm in QAT takes torchao seconds to prepare.
CASES = [(mode, net) for mode, given in MODES.items() for net in given.nets]


# --- models --------------------------------------------------------------------------------------


@contextmanager
def only_conv2d() -> Iterator[None]:
    """Let torchao look for BatchNorm behind conv2d only, the one that `NETS` have.

    It exports some hundred patterns of four kinds of convolutions for each model, in a quarter of
    a minute. What it does with a match is its own.
    """

    def unless(helper: Callable[..., Any]) -> Callable[..., Any]:
        def call(model: fx.GraphModule, conv: Any, *args: Any, **kwargs: Any) -> fx.GraphModule:
            return helper(model, conv, *args, **kwargs) if conv is F.conv2d else model

        return call

    names = ("_fold_conv_bn_qat_helper", "_fuse_conv_bn_qat_helper")
    patches = {name: unless(getattr(qat_utils, name)) for name in names}
    with mock.patch.multiple(qat_utils, **patches):
        yield


def exported(net: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    with quiet():
        found: fx.GraphModule = torch.export.export(net, inputs or (image(),)).module()
    return found


def prepare(
    net: nn.Module, quantizer: Any, *, qat: bool = False, example: tuple[Tensor, ...] = ()
) -> fx.GraphModule:
    """Exported, prepared, calibrated or trained for three steps, and moved to eval mode."""
    with quiet(), only_conv2d():
        make = prepare_qat_pt2e if qat else prepare_pt2e
        model = make(exported(net.train(qat), *example), quantizer)
        _spread(model)
        with torch.no_grad():
            for seed in range(3):
                if example:
                    model(*(like(x, seed) for x in example))
                else:
                    model(image(seed=seed))
        return pt2e.move_exported_model_to_eval(model) if qat and _switches(model) else model


def _spread(model: fx.GraphModule) -> None:
    """Give BatchNorm what training would, so that folding it rounds."""
    for path, value in model.named_parameters():
        if "bn" in path:
            value.data.uniform_(0.4, 1.6, generator=torch.Generator().manual_seed(1))


def _switches(model: fx.GraphModule) -> bool:
    return any(
        "batch_norm" in str(n.target) or "dropout" in str(n.target) for n in model.graph.nodes
    )


@functools.cache
def _prepared(mode: str, net: str) -> fx.GraphModule:
    torch.manual_seed(0)
    given = MODES[mode]
    return prepare(NETS[net](), given.make(), qat=given.qat)


def prepared(mode: str, net: str) -> fx.GraphModule:
    """The model of a case: one for all tests, which must not change it."""
    return _prepared(mode, net)


@functools.cache
def converted(mode: str, net: str) -> fx.GraphModule:
    """torchao's conversion of `prepared`, which must not be changed either."""
    return convert(prepared(mode, net))


def held(model: fx.GraphModule) -> fx.GraphModule:
    """A copy whose observers are switched off, so that running it moves nothing."""
    copied = copy.deepcopy(model)
    copied.apply(pt2e.disable_observer)
    return copied


def convert(model: fx.GraphModule) -> fx.GraphModule:
    """torchao's conversion of a copy, whose annotations speak of the copy (see fxqfix._pt2e)."""
    with quiet(), only_conv2d():
        copied = copy.deepcopy(model)
        own_annotations(copied)
        return convert_pt2e(copied)

"""Small models that spell every row of the op table, who can quantize them, and where that ends.

A sample is a model of a few ops, with the settings (flow and weight scheme) under which torch
quantizes it. Everything that does not hold for it to the bit is a `Limit` with its reason; limits
are strict, so that one that no longer limits anything fails a test.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.ao.nn.quantized as nnq
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import QuantStub

__all__ = ["SAMPLES", "Limit", "Sample"]

FX = ("fx-ptq", "fx-qat")
EAGER = ("eager-ptq", "eager-qat")
ALL = FX + EAGER
# Per-channel weights (fbgemm's qconfig) unless the setting says tensor (qnnpack's).
WEIGHTED = (*ALL, "fx-qat-tensor")

LINE, IMAGE, VOLUME, ROWS = (2, 4, 8), (2, 4, 8, 8), (1, 2, 4, 4, 4), (3, 8)


@dataclass(frozen=True)
class Limit:
    """Something that does not hold for a sample.

    Attributes:
        what: "convert" (torch's conversion raises), "baked" (it bakes other qparams), "int8" or
            "reference" (the way back from there is not exact), or an engine's name (torch can't
            convert, copy or run it there).
        reason: Why, exactly.
        settings: Where it holds, by the beginning of the setting's name.
        error: What the raised error says, "" where the limit is another result.
    """

    what: str
    reason: str
    settings: tuple[str, ...] = ("",)
    error: str = ""


@dataclass(frozen=True)
class Sample:
    """A model and what is known of it.

    Attributes:
        name: Unique.
        make: Makes the float model.
        shapes: Shapes of its inputs.
        settings: Flow and weight scheme, e.g. "fx-qat-tensor".
        fuse: Modules to fuse in eager mode.
        backend: Backend config for FX: "native" or "onednn".
        kind: What is special about preparing it; see `tests/test_op_models.py`.
        limits: Where exactness ends.
        engines: Those to compare on. Only convolutions and linears have a source of their own on
            fbgemm, onednn and x86 each; everything else those three share.
    """

    name: str
    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    settings: tuple[str, ...] = ALL
    fuse: tuple[tuple[str, ...], ...] = ()
    backend: str = "native"
    kind: str = ""
    limits: tuple[Limit, ...] = ()
    engines: tuple[str, ...] = ("fbgemm", "qnnpack")


class Net(nn.Module):
    """A model from a function of itself and its inputs, with the parts that the function uses."""

    def __init__(self, function: Callable[..., Any], parts: dict[str, Any]) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)


class One(Net):
    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Two(Net):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.function(self, x, y)


def net(function: Callable[..., Any], **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    """A maker of `One` or `Two`; parts are made anew each time, after seeding."""
    kind = {2: One, 3: Two}[len(inspect.signature(function).parameters)]
    return lambda: kind(function, {name: part() for name, part in parts.items()})


def chain(*parts: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(part() for part in parts))


def param(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(0.5 * torch.randn(shape))


def point() -> nn.Module:
    """A convolution that mixes the channels of an IMAGE: a quantized neighbour for other ops."""
    return nn.Conv2d(4, 4, 1)


_QNNPACK_3D = (
    Limit(
        "qnnpack",
        "torch can neither copy nor unpack what qnnpack packs for three dimensions",
        error="QNNPACK only supports",
    ),
)

# ------------------------------------------------------------------------- with weights


def _conv(d: int, shape: tuple[int, ...]) -> Iterator[Sample]:
    conv, bn = getattr(nn, f"Conv{d}d"), getattr(nn, f"BatchNorm{d}d")
    c, limits = shape[1], _QNNPACK_3D if d == 3 else ()
    yield Sample(
        f"conv{d}d",
        chain(
            lambda: conv(c, 4, 3, padding=1),
            nn.ReLU,
            lambda: conv(4, 4, 3, padding=2, dilation=2, groups=2, bias=False),
            lambda: conv(4, 4, 3, stride=2, padding=1, groups=4),
            lambda: nn.ReLU(inplace=True),
            lambda: conv(4, 3, 1),
        ),
        (shape,),
        WEIGHTED,
        fuse=(("0", "1"), ("3", "4")) if d > 1 else (),
        limits=limits,
    )
    yield Sample(
        f"conv{d}d_bn",
        chain(
            lambda: conv(c, 4, 3, padding=1),
            lambda: bn(4),
            lambda: conv(4, 4, 3, groups=4, bias=False, padding=1),
            lambda: bn(4),
            nn.ReLU,
        ),
        (shape,),
        WEIGHTED,
        fuse=(("0", "1"), ("2", "3", "4")),
        limits=limits,
    )
    transpose = getattr(nn, f"ConvTranspose{d}d")
    yield Sample(
        f"conv_transpose{d}d",
        chain(
            lambda: transpose(c, c, 3, stride=2, padding=1, output_padding=1),
            lambda: transpose(c, c, 2, groups=2, bias=False, dilation=2),
        ),
        (shape,),
        (*FX, "eager-ptq-tensor", "eager-qat-tensor"),
        limits=(
            Limit("onednn", "packs no output_padding", error="zero output_padding"),
            *limits,
        ),
    )
    yield Sample(
        f"conv_transpose{d}d_bn",
        chain(lambda: transpose(c, c, 3), lambda: bn(c)),
        (shape,),
        ("fx-ptq",),
        limits=limits,
    )
    function, backward = getattr(F, f"conv{d}d"), getattr(F, f"conv_transpose{d}d")
    kernel, one, none = (3,) * d, [1] * d, [0] * d

    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.relu(function(x, m.w, m.b, one, one, one, 1))
        x = function(x, m.v, None, [2] * d, one, one, 2)
        return backward(x, m.u, m.b, [2] * d, none, none, 1, one)

    yield Sample(
        f"functional_conv{d}d",
        net(
            forward,
            w=param(4, c, *kernel),
            b=param(4),
            v=param(4, 2, *kernel),
            u=param(4, 4, *kernel),
        ),
        (shape,),
        (*FX, "fx-qat-tensor"),
        limits=limits,
    )


def _convs() -> Iterator[Sample]:
    for d, shape in ((1, LINE), (2, IMAGE), (3, VOLUME)):
        yield from _conv(d, shape)
    yield Sample(
        "functional_keywords",
        net(
            lambda m, x: F.conv2d(x, m.w, bias=m.b, padding=1),
            w=param(4, 4, 3, 3),
            b=param(4),
        ),
        (IMAGE,),
        FX,
        limits=(
            Limit(
                "convert",
                "torch hands the keywords of F.conv2d to its prepack op, which has no defaults",
                error="missing value for argument",
            ),
        ),
    )
    yield Sample(
        "conv2d_reflect",
        chain(lambda: nn.Conv2d(4, 4, (3, 1), padding=(1, 0), padding_mode="reflect")),
        (IMAGE,),
    )
    for mode in ("circular", "replicate"):
        yield Sample(
            f"conv2d_{mode}",
            chain(lambda mode=mode: nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)),
            (IMAGE,),
            FX,
            limits=(
                Limit("convert", "torch has no such quantized padding", error=f"{mode} is not"),
            ),
        )
    yield Sample(
        "conv2d_same",
        chain(lambda: nn.Conv2d(4, 4, 3, padding="same")),
        (IMAGE,),
        FX,
        limits=(Limit("convert", "torch packs a padding of numbers only", error="List[int]"),),
    )
    yield Sample(
        "conv2d_add",
        net(
            lambda m, x: m.relu(m.b(m.a(x) + x) + x),
            a=lambda: nn.Conv2d(4, 4, 3, padding=1),
            b=point,
            relu=nn.ReLU,
        ),
        (IMAGE,),
        ("fx-ptq",),
        backend="onednn",
    )


def _linears() -> Iterator[Sample]:
    yield Sample(
        "linear",
        chain(
            lambda: nn.Linear(8, 6),
            nn.ReLU,
            lambda: nn.Linear(6, 6, bias=False),
            lambda: nn.Linear(6, 4),
        ),
        (ROWS,),
        WEIGHTED,
        fuse=(("0", "1"),),
    )
    yield Sample(
        "linear_bn",
        chain(lambda: nn.Linear(8, 6), lambda: nn.BatchNorm1d(6), lambda: nn.Linear(6, 4)),
        (ROWS,),
        WEIGHTED,
        fuse=(("0", "1"),),
    )
    yield Sample(
        "functional_linear",
        net(
            lambda m, x: F.linear(F.relu(F.linear(x, m.w, m.b)), m.v),
            w=param(6, 8),
            b=param(6),
            v=param(4, 6),
        ),
        (ROWS,),
        (*FX, "fx-qat-tensor"),
    )
    yield Sample(
        "linear_fused",
        chain(
            lambda: nn.Linear(8, 6),
            lambda: nn.LeakyReLU(0.1),
            lambda: nn.Linear(6, 4),
            nn.Tanh,
        ),
        (ROWS,),
        ("fx-ptq",),
        backend="onednn",
        kind="fused",
    )


def _embeddings() -> Iterator[Sample]:
    yield Sample(
        "embedding",
        net(
            lambda m, x: m.linear(m.stub(m.table(x))),
            table=lambda: nn.Embedding(5, 8),
            stub=QuantStub,
            linear=lambda: nn.Linear(8, 4),
        ),
        (),
        kind="embedding",
    )
    for kind in ("embedding", "embedding-4bit"):
        yield Sample(
            kind.replace("embedding", "embedding_bag"),
            net(
                lambda m, x: m.linear(m.stub(m.table(x))),
                table=lambda: nn.EmbeddingBag(5, 8, mode="sum"),
                stub=QuantStub,
                linear=lambda: nn.Linear(8, 4),
            ),
            (),
            ALL if kind == "embedding" else ("fx-ptq", "eager-ptq"),
            kind=kind,
        )


# ------------------------------------------------------------------------- element-wise

_SCALAR = (
    Limit("baked", "torch's scalar kernels move their input's grid; the observer is dropped"),
    Limit("int8", "the scalar kernel keeps its input's codes, the prepared model quantizes anew"),
)


def _binaries() -> Iterator[Sample]:
    pair = (IMAGE, IMAGE)

    def arithmetic(m: Any, x: Tensor, y: Tensor) -> Tensor:
        x = torch.relu(torch.add(x, y) + y)
        y = F.relu(torch.mul(x, y))
        y = operator.iadd(x * y, y)
        return F.relu(y * x) + x

    yield Sample("arithmetic", net(arithmetic), pair, FX)
    yield Sample("methods", net(lambda m, x, y: m.p(x.add(y)).mul(y), p=point), pair, FX)
    yield Sample(
        "scalar",
        net(lambda m, x: m.q(F.relu(m.p(x) + 0.5) * 1.5), p=point, q=point),
        (IMAGE,),
        FX,
        limits=_SCALAR,
    )
    yield Sample("scalar_first", net(lambda m, x: 2 * x), (IMAGE,), FX, limits=_SCALAR)
    yield Sample("matmul", net(lambda m, x, y: torch.matmul(x, y)), ((3, 4), (4, 5)), FX)
    yield Sample("matmul_batched", net(lambda m, x, y: m.p(x) @ m.q(y), p=point, q=point), pair, FX)
    yield Sample(
        "shared_module",
        net(lambda m, x: m.p(m.p(x)), p=point),
        (IMAGE,),
        FX,
    )
    yield Sample(
        "cat",
        net(lambda m, x, y: torch.cat([m.p(x), m.q(y), x], 1), p=point, q=point),
        pair,
        FX,
    )
    functional = nnq.FloatFunctional
    yield Sample(
        "float_functional",
        net(
            lambda m, x, y: m.e.cat([m.d.add_relu(m.b.mul(m.a.add(x, y), y), x), y], 1),
            a=functional,
            b=functional,
            d=functional,
            e=functional,
        ),
        pair,
        EAGER,
    )
    yield Sample(
        "float_functional_scalar",
        net(
            lambda m, x, y: m.c.add(m.b.mul_scalar(m.a.add_scalar(x, 0.5), 1.5), y),
            a=functional,
            b=functional,
            c=functional,
        ),
        pair,
        EAGER,
        limits=(
            Limit("int8", "eager prepare leaves scalar ops float; the kernels move their grid"),
        ),
    )


# -------------------------------------------------------------------------------- pools


def _pool(d: int, shape: tuple[int, ...]) -> Iterator[Sample]:
    names = ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax")
    most, mean, adaptive, adaptive_most = (getattr(nn, f"{name}Pool{d}d") for name in names)
    snake = ("max", "avg", "adaptive_avg", "adaptive_max")
    largest, average, fit, fit_most = (getattr(F, f"{name}_pool{d}d") for name in snake)
    conv = getattr(nn, f"Conv{d}d")
    channels = shape[1]
    no_pool = "qnnpack has no max_pool3d"
    no_kernel = (Limit("qnnpack", no_pool, error="quantized_max_pool3d"),) if d == 3 else ()
    yield Sample(
        f"pools{d}d",
        net(
            lambda m, x: fit(average(largest(m.c(m.b(m.a(x))), 3, 1, 1), 2, 1), 2),
            a=lambda: most(3, 2, 1, 1),
            b=lambda: mean(2, 1),
            c=lambda: adaptive(3),
        ),
        (shape,),
        FX,
        limits=no_kernel,
    )
    yield Sample(
        f"max_pool{d}d",
        chain(lambda: most(3, 2, 1, 1)),
        (shape,),
        EAGER,
        limits=no_kernel,
    )
    yield Sample(
        f"avg_pools{d}d",
        chain(lambda: mean(3, 2, 1), lambda: adaptive(2)),
        (shape,),
        EAGER,
        limits=_UNOBSERVED,
    )
    yield Sample(
        f"adaptive_max_pool{d}d",
        net(
            lambda m, x: m.q(fit_most(m.m(m.p(x)), 2)),
            p=lambda: conv(channels, channels, 1),
            q=lambda: conv(channels, channels, 1),
            m=lambda: adaptive_most(3),
        ),
        (shape,),
        FX,
        limits=_QNNPACK_3D if d == 3 else (),
    )


def _pools() -> Iterator[Sample]:
    for d, shape in ((1, LINE), (2, IMAGE), (3, VOLUME)):
        yield from _pool(d, shape)
    yield Sample("mean", net(lambda m, x: torch.mean(x, [3], True).mean([2, 3])), (IMAGE,), FX)
    yield Sample(
        "mean_eager", net(lambda m, x: x.mean([2, 3])), (IMAGE,), EAGER, limits=_UNOBSERVED
    )


# -------------------------------------------------------------------------- activations


def _activations() -> Iterator[Sample]:
    yield Sample(
        "clamps",
        net(
            lambda m, x: torch.clamp(m.c(m.p(m.b(m.a(x)))), -0.5, 0.7).clamp(0.0, 0.5),
            a=nn.ReLU6,
            b=nn.ReLU,
            p=point,
            c=lambda: nn.Hardtanh(-0.6, 0.8),
        ),
        (IMAGE,),
        FX,
    )
    yield Sample(
        "functional_clamps",
        net(
            lambda m, x: F.relu(torch.relu(F.hardtanh(F.relu6(m.p(x)), -0.5, 0.7)).relu()).relu_(),
            p=point,
        ),
        (IMAGE,),
        FX,
    )
    yield Sample("relu", chain(nn.ReLU, point, nn.ReLU), (IMAGE,), EAGER)
    yield Sample(
        "relu6",
        chain(nn.ReLU6),
        (IMAGE,),
        EAGER,
        limits=(
            Limit("baked", "torch's int8 ReLU6 keeps its input's grid; the observer is dropped"),
            Limit("int8", "torch's int8 ReLU6 keeps its input's grid; the observer is dropped"),
        ),
    )
    yield Sample(
        "hardtanh_eager",
        net(lambda m, x: m.h(torch.clamp(x, -0.5, 0.7)), h=lambda: nn.Hardtanh(-0.4, 0.6)),
        (IMAGE,),
        EAGER,
        limits=_UNOBSERVED,
    )
    yield Sample(
        "curves",
        chain(nn.Hardswish, lambda: nn.ELU(0.7), lambda: nn.LeakyReLU(0.1)),
        (IMAGE,),
    )
    yield Sample(
        "functional_curves",
        net(lambda m, x: F.leaky_relu(F.elu(F.hardswish(x), 0.7), 0.1)),
        (IMAGE,),
        FX,
    )
    yield Sample("fixed", chain(nn.Sigmoid, point, nn.Tanh, point, nn.Hardsigmoid), (IMAGE,), FX)
    yield Sample(
        "functional_fixed",
        net(
            lambda m, x: F.hardsigmoid(m.q(torch.tanh(m.p(torch.sigmoid(x)))).sigmoid()).tanh(),
            p=point,
            q=point,
        ),
        (IMAGE,),
        FX,
    )
    yield Sample("sigmoid_eager", chain(nn.Sigmoid), (IMAGE,), ("eager-qat",))
    yield Sample(
        "fixed_eager",
        net(lambda m, x: F.hardsigmoid(torch.tanh(m.s(x))), s=nn.Sigmoid),
        (IMAGE,),
        ("eager-ptq",),
        limits=_UNOBSERVED,
    )
    yield Sample("softmax", chain(point, lambda: nn.Softmax(1)), (IMAGE,), FX)
    yield Sample(
        "prelu",
        chain(point, _prelu),
        (IMAGE,),
        limits=(
            Limit("int8", "torch's int8 PReLU quantizes its slopes, which no fake-quant sees"),
        ),
    )
    yield Sample(
        "float_activations",
        net(
            lambda m, x: m.q(
                F.threshold(F.prelu(F.celu(m.c(m.g(m.s(m.p(x))) - 0.1), 0.7) / 2, m.w), 0.1, 0.0)
            ),
            p=point,
            q=point,
            s=nn.SiLU,
            g=nn.GELU,
            c=nn.CELU,
            w=param(4),
        ),
        (IMAGE,),
        FX,
    )
    yield Sample(
        "gelu_eager",
        net(
            lambda m, x: F.leaky_relu(m.t(m.g(x)), 0.1), g=nn.GELU, t=lambda: nn.Threshold(0.1, 0.0)
        ),
        (IMAGE,),
        EAGER,
        limits=_UNOBSERVED,
    )


def _prelu() -> nn.Module:
    module = nn.PReLU(4)
    nn.init.uniform_(module.weight, 0.1, 0.4)
    return module


# ------------------------------------------------------------------------ normalization


def _norms() -> Iterator[Sample]:
    def zeros() -> nn.Parameter:
        return nn.Parameter(torch.zeros(4), requires_grad=False)

    def ones() -> nn.Parameter:
        return nn.Parameter(torch.ones(4), requires_grad=False)

    for d, shape in ((2, IMAGE), (3, VOLUME)):
        bn = getattr(nn, f"BatchNorm{d}d")
        yield Sample(
            f"batch_norm{d}d",
            chain(
                lambda bn=bn, c=shape[1]: bn(c),
                nn.Identity,
                lambda bn=bn, c=shape[1]: bn(c),
                nn.ReLU,
            ),
            (shape,),
            fuse=(("2", "3"),),
        )
    yield Sample(
        "float_norms",
        net(
            lambda m, x: m.q(F.group_norm(m.b(F.batch_norm(m.g(m.p(x)), m.m, m.v).flatten(2)), 2)),
            p=point,
            q=lambda: nn.Conv1d(4, 4, 1),
            g=lambda: nn.GroupNorm(2, 4),
            b=lambda: nn.BatchNorm1d(4),
            m=zeros,
            v=ones,
        ),
        (IMAGE,),
        FX,
    )
    yield Sample(
        "norms",
        chain(lambda: nn.LayerNorm([8, 8]), lambda: nn.InstanceNorm2d(4, affine=True)),
        (IMAGE,),
    )
    yield Sample("group_norm", chain(lambda: nn.GroupNorm(2, 4)), (IMAGE,), EAGER)
    for d, shape in ((1, LINE), (3, VOLUME)):
        norm = getattr(nn, f"InstanceNorm{d}d")
        yield Sample(
            f"instance_norm{d}d",
            chain(lambda norm=norm, c=shape[1]: norm(c, affine=True)),
            (shape,),
        )
    yield Sample(
        "functional_norms",
        net(
            lambda m, x: F.instance_norm(F.layer_norm(x, [8], m.w, m.b), weight=m.v, bias=m.u),
            w=param(8),
            b=param(8),
            v=param(4),
            u=param(4),
        ),
        (IMAGE,),
        FX,
    )


# --------------------------------------------------------------------------- shape only


def _shapes() -> Iterator[Sample]:
    yield Sample(
        "shape_modules",
        net(
            lambda m, x: m.p(m.f(m.u(m.c(m.b(m.a(x)))))),
            a=lambda: nn.PixelShuffle(2),
            b=lambda: nn.PixelUnshuffle(2),
            c=nn.Identity,
            u=lambda: nn.Unflatten(1, (2, 2)),
            f=lambda: nn.Flatten(1, 2),
            p=point,
        ),
        (IMAGE,),
    )
    yield Sample(
        "shape_functions",
        net(_rearranged, p=point, q=point),
        (IMAGE,),
        FX,
    )
    yield Sample("shape_eager", net(_rearranged_eager, p=point), (IMAGE,), EAGER)
    yield Sample(
        "channel_shuffle",
        chain(point, lambda: nn.ChannelShuffle(2), nn.Identity),
        (IMAGE,),
        ("fx-ptq", *EAGER),
    )
    yield Sample(
        "channel_shuffle_qat",
        chain(point, lambda: nn.ChannelShuffle(2), nn.Identity),
        (IMAGE,),
        ("fx-qat",),
        limits=(
            Limit("baked", "torch's int8 shuffle keeps its input's grid; the observer is dropped"),
            Limit("int8", "torch's int8 shuffle keeps its input's grid; the observer is dropped"),
        ),
    )
    yield Sample(
        "picks",
        net(_picked, p=point, q=point),
        (IMAGE,),
        limits=(
            Limit(
                "baked",
                "torch's int8 unsqueeze keeps its input's grid; the observer that cat shares with "
                "it is dropped",
                ("fx",),
            ),
        ),
    )
    yield Sample(
        "resize",
        net(
            lambda m, x: m.q(F.interpolate(m.a(m.p(x)), scale_factor=0.5, mode="bilinear")),
            p=point,
            q=point,
            a=lambda: nn.Upsample(scale_factor=2),
        ),
        (IMAGE,),
        FX,
    )
    yield Sample(
        "resize_eager",
        net(
            lambda m, x: m.b(m.a(x)),
            a=lambda: nn.Upsample(scale_factor=2),
            b=lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
        ),
        (IMAGE,),
        EAGER,
        limits=_UNOBSERVED,
    )
    yield Sample(
        "pads",
        net(
            lambda m, x: m.q(F.pad(m.b(m.a(m.p(x))), (1, 1, 1, 1))),
            p=point,
            q=point,
            a=lambda: nn.ZeroPad2d(1),
            b=lambda: nn.ReflectionPad2d(1),
        ),
        (IMAGE,),
    )
    yield Sample("dropout", chain(nn.Dropout), (IMAGE,), ("fx-ptq", *EAGER))
    yield Sample(
        "dropout_qat",
        chain(nn.Dropout),
        (IMAGE,),
        ("fx-qat",),
        limits=(
            Limit("baked", "torch's int8 Dropout passes its input on; the observer is dropped"),
            Limit("int8", "torch's int8 Dropout passes its input on; the observer is dropped"),
        ),
    )
    yield Sample("functional_dropout", net(_dropped), (IMAGE,), ("fx-ptq",))
    yield Sample(
        "functional_dropout_qat",
        net(_dropped),
        (IMAGE,),
        ("fx-qat",),
        limits=(
            Limit("baked", "torch's int8 dropout passes its input on; the observer is dropped"),
            Limit(
                "int8", "traced in train mode, F.dropout drops for ever; torch's int8 never does"
            ),
        ),
    )


def _dropped(m: Any, x: Tensor) -> Tensor:
    return F.dropout(x, 0.5, m.training)


def _rearranged(m: Any, x: Tensor) -> Tensor:
    x = m.p(x.contiguous())
    x = torch.squeeze(torch.unsqueeze(x, 0), 0).unsqueeze(0).squeeze(0)
    x = torch.transpose(x, 2, 3).transpose(2, 3).permute(0, 2, 3, 1)
    x = F.pixel_unshuffle(F.pixel_shuffle(x.permute(0, 3, 1, 2), 2), 2)
    x = x.repeat(1, 1, 2, 1)
    x = torch.repeat_interleave(x, 2, 3).reshape(x.size(0), 4, x.shape[2] // 2, -1)
    x = torch.narrow(x, 2, 1, 2).detach().view(2, 4, 2, -1)
    x = torch.stack([x, x], 1)
    return m.q(torch.flatten(x, 1, 2).resize_(2, 4, 2, 2))


def _rearranged_eager(m: Any, x: Tensor) -> Tensor:
    x = m.p(x.clone().contiguous()).squeeze(0).unsqueeze(0).squeeze(0)
    x = x.transpose(2, 3).permute(0, 2, 3, 1).reshape(x.size(0), 4, x.shape[2] // 2, -1)
    x = torch.flip(x, [1]).repeat(1, 1, 2, 1).expand(2, 4, 8, 16)
    return torch.flatten(torch.stack([x, x], 1), 1).to("cpu")


def _picked(m: Any, x: Tensor) -> Tensor:
    a, b = torch.chunk(m.p(x), 2, 1)
    _, d = a.split(1, 1)
    e = torch.unbind(b, 1)[0].unsqueeze(1)
    return m.q(torch.cat([a, d, e], 1)[:, :4])


_UNOBSERVED = (
    Limit("int8", "eager prepare observes nothing here; the int8 kernel rounds to a grid"),
)

# ------------------------------------------------------------- sub-networks behind a leaf

_ONE_CALL = "torch's int8 module is one call with packed weights inside, which no form takes apart"
_CLOSED = tuple(Limit(way, _ONE_CALL, error="no float form") for way in ("int8", "reference"))


def _networks() -> Iterator[Sample]:
    yield Sample(
        "lstm",
        net(
            lambda m, x, y: m.linear(m.lstm(x, (y, y))[0]),
            lstm=lambda: nn.LSTM(4, 3),
            linear=lambda: nn.Linear(3, 3),
        ),
        ((3, 2, 4), (1, 2, 3)),
        FX,
        kind="lstm",
        limits=_CLOSED,
    )
    yield Sample(
        "lstm_eager",
        net(
            lambda m, x: m.linear(m.lstm(x)[0]),
            lstm=lambda: nn.LSTM(4, 3, bidirectional=True),
            linear=lambda: nn.Linear(6, 3),
        ),
        ((3, 2, 4),),
        EAGER,
        limits=_CLOSED,
    )
    yield Sample(
        "attention",
        net(
            lambda m, x: m.linear(m.attention(x, x, x)[0]),
            attention=lambda: nn.MultiheadAttention(8, 2),
            linear=lambda: nn.Linear(8, 3),
        ),
        ((5, 2, 8),),
        ("eager-ptq",),
        limits=_CLOSED,
    )


_FOUR = ("fbgemm", "qnnpack", "onednn", "x86")

SAMPLES: tuple[Sample, ...] = (
    *(replace(sample, engines=_FOUR) for sample in (*_convs(), *_linears())),
    *_embeddings(),
    *_binaries(),
    *_pools(),
    *_activations(),
    *_norms(),
    *_shapes(),
    *_networks(),
)

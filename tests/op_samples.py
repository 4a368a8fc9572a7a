"""Small models that spell every row of the op table, and the flows that can quantize them.

A sample is a model of a few ops. Its flows are those of torch that accept it; what a sample is
expected to show is measured by the tests, never declared here: which spellings it holds follows
from its graphs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.ao.nn.quantized as nnq
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FLOWS", "SAMPLES", "Sample"]

FLOWS = ("fx-ptq", "fx-qat", "eager-ptq", "eager-qat")
FX = FLOWS[:2]
PTQ = ("fx-ptq", "eager-ptq")
ALL = FLOWS


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


@dataclass(frozen=True)
class Sample:
    """A model, what it takes, and who can quantize it."""

    name: str
    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    flows: tuple[str, ...] = ALL
    fuse: tuple[tuple[str, ...], ...] = ()
    schemes: tuple[str, ...] = ("channel",)
    backend: str = "native"
    inputs: Callable[[int], tuple[Any, ...]] | None = None
    qconfig: str = "default"


def net(function: Callable[..., Any], **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    """A maker of `One` or `Two`; parts are made anew each time, after seeding."""
    kind = Two if "y" in function.__code__.co_varnames else One
    return lambda: kind(function, {name: part() for name, part in parts.items()})


def chain(*parts: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(part() for part in parts))


def param(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(0.5 * torch.randn(shape))


IMAGE, LINE, VOLUME, ROWS = (2, 4, 6, 6), (2, 4, 8), (1, 2, 4, 4, 4), (3, 8)
BOTH = ("channel", "tensor")


def _convs() -> Iterator[Sample]:
    for d, shape in ((1, LINE), (2, IMAGE), (3, VOLUME)):
        conv = getattr(nn, f"Conv{d}d")
        bn = getattr(nn, f"BatchNorm{d}d")
        c = shape[1]
        qat = ALL if d > 1 else PTQ + ("fx-qat",)
        yield Sample(
            f"conv{d}d",
            chain(
                lambda conv=conv, c=c: conv(c, 4, 3, padding=1),
                lambda conv=conv: conv(4, 4, 3, padding=2, dilation=2, groups=2, bias=False),
                lambda conv=conv: conv(4, 4, 3, stride=2, padding=1, groups=4),
                lambda conv=conv: conv(4, 3, 1),
            ),
            (shape,),
            qat,
            schemes=BOTH,
        )
        yield Sample(
            f"conv{d}d_relu",
            chain(
                lambda conv=conv, c=c: conv(c, 4, 3, padding=1),
                nn.ReLU,
                lambda conv=conv: conv(4, 4, 1, bias=False),
                lambda: nn.ReLU(inplace=True),
            ),
            (shape,),
            qat,
            fuse=(("0", "1"), ("2", "3")),
            schemes=BOTH,
        )
        yield Sample(
            f"conv{d}d_bn",
            chain(
                lambda conv=conv, c=c: conv(c, 4, 3, padding=1),
                lambda bn=bn: bn(4),
                lambda conv=conv: conv(4, 4, 3, groups=4, bias=False, padding=1),
                lambda bn=bn: bn(4),
                nn.ReLU,
            ),
            (shape,),
            ALL,
            fuse=(("0", "1"), ("2", "3", "4")),
            schemes=BOTH,
        )
        function = getattr(F, f"conv{d}d")
        kernel = (3,) * d
        yield Sample(
            f"functional_conv{d}d",
            net(
                lambda m, x, f=function: F.relu(f(f(x, m.w, m.b, padding=1), m.v, stride=2)),
                w=param(4, c, *kernel),
                b=param(4),
                v=param(3, 4, *kernel),
            ),
            (shape,),
            FX,
            schemes=BOTH,
        )
        transpose = getattr(nn, f"ConvTranspose{d}d")
        yield Sample(
            f"conv_transpose{d}d",
            chain(
                lambda t=transpose, c=c: t(c, c, 3, stride=2, padding=1, output_padding=1),
                lambda t=transpose, c=c: t(c, c, 2, groups=2, bias=False, dilation=2),
            ),
            (shape,),
            ALL,
            schemes=BOTH,
        )
        yield Sample(
            f"conv_transpose{d}d_bn",
            chain(
                lambda t=transpose, c=c: t(c, c, 3),
                lambda bn=bn, c=c: bn(c),
                nn.ReLU,
            ),
            (shape,),
            FX,
            schemes=BOTH,
        )
        function = getattr(F, f"conv_transpose{d}d")
        yield Sample(
            f"functional_conv_transpose{d}d",
            net(
                lambda m, x, f=function: f(x, m.w, m.b, stride=2),
                w=param(c, 3, *kernel),
                b=param(3),
            ),
            (shape,),
            FX,
            schemes=BOTH,
        )
    for mode in ("reflect", "circular", "replicate"):
        yield Sample(
            f"conv2d_{mode}",
            chain(lambda m=mode: nn.Conv2d(4, 4, 3, padding=1, padding_mode=m)),
            (IMAGE,),
            ALL,
        )
    yield Sample("conv2d_same", chain(lambda: nn.Conv2d(4, 4, 3, padding="same")), (IMAGE,))
    yield Sample(
        "conv2d_asymmetric",
        chain(lambda: nn.Conv2d(4, 4, (3, 1), padding=(1, 0), stride=(1, 2))),
        (IMAGE,),
    )
    yield Sample(
        "conv2d_add",
        net(lambda m, x: m.c(x) + x, c=lambda: nn.Conv2d(4, 4, 3, padding=1)),
        (IMAGE,),
        ("fx-ptq",),
        backend="onednn",
    )
    yield Sample(
        "conv2d_add_relu",
        net(lambda m, x: m.r(m.c(x) + x), c=lambda: nn.Conv2d(4, 4, 3, padding=1), r=nn.ReLU),
        (IMAGE,),
        ("fx-ptq",),
        backend="onednn",
    )


def _linears() -> Iterator[Sample]:
    yield Sample(
        "linear",
        chain(lambda: nn.Linear(8, 6), lambda: nn.Linear(6, 4, bias=False)),
        (ROWS,),
        schemes=BOTH,
    )
    yield Sample(
        "linear_relu",
        chain(lambda: nn.Linear(8, 6), nn.ReLU, lambda: nn.Linear(6, 4, bias=False), nn.ReLU),
        (ROWS,),
        fuse=(("0", "1"), ("2", "3")),
        schemes=BOTH,
    )
    yield Sample(
        "linear_bn",
        chain(lambda: nn.Linear(8, 6), lambda: nn.BatchNorm1d(6), lambda: nn.Linear(6, 4)),
        (ROWS,),
        fuse=(("0", "1"),),
        schemes=BOTH,
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
        FX,
        schemes=BOTH,
    )
    yield Sample(
        "linear_leaky_relu",
        chain(lambda: nn.Linear(8, 6), lambda: nn.LeakyReLU(0.1)),
        (ROWS,),
        ("fx-ptq",),
        backend="onednn",
    )
    yield Sample(
        "linear_tanh",
        chain(lambda: nn.Linear(8, 6), nn.Tanh),
        (ROWS,),
        ("fx-ptq",),
        backend="onednn",
    )


def _tokens(scale: int) -> tuple[Any, ...]:
    return (torch.arange(6).reshape(2, 3) % 5,)


def _embeddings() -> Iterator[Sample]:
    yield Sample(
        "embedding",
        net(lambda m, x: m.l(m.e(x)), e=lambda: nn.Embedding(5, 8), l=lambda: nn.Linear(8, 4)),
        (),
        ALL,
        inputs=_tokens,
        qconfig="embedding",
    )
    yield Sample(
        "embedding_bag",
        net(
            lambda m, x: m.l(m.e(x)),
            e=lambda: nn.EmbeddingBag(5, 8, mode="sum"),
            l=lambda: nn.Linear(8, 4),
        ),
        (),
        ALL,
        inputs=_tokens,
        qconfig="embedding",
    )


def _binary() -> Iterator[Sample]:
    yield Sample(
        "add",
        net(lambda m, x, y: torch.add(x + y, y).add(x)),
        (IMAGE, IMAGE),
        FX,
    )
    yield Sample(
        "add_relu",
        net(lambda m, x, y: F.relu(torch.relu(x + y) + y)),
        (IMAGE, IMAGE),
        FX,
    )
    yield Sample("mul", net(lambda m, x, y: torch.mul(x * y, y).mul(x)), (IMAGE, IMAGE), FX)
    yield Sample(
        "mul_relu",
        net(lambda m, x, y: F.relu(torch.relu(x * y) * y)),
        (IMAGE, IMAGE),
        FX,
    )
    yield Sample("inplace_add", net(lambda m, x, y: operator.iadd(x * y, y)), (IMAGE, IMAGE), FX)
    yield Sample("scalar", net(lambda m, x: F.relu(x + 0.5) * 1.5 + 2), (IMAGE,), FX)
    yield Sample("matmul", net(lambda m, x, y: torch.matmul(x, y)), ((3, 4), (4, 5)), FX)
    yield Sample("matmul_batched", net(lambda m, x, y: x @ y), ((2, 3, 4), (2, 4, 5)), FX)
    yield Sample("cat", net(lambda m, x, y: torch.cat([x, y * 3.0], 1)), (IMAGE, IMAGE), FX)
    yield Sample("sub_div", net(lambda m, x, y: (x - y) / 3.0 + y), (IMAGE, IMAGE), FX)
    ff = nnq.FloatFunctional
    yield Sample(
        "float_functional",
        net(
            lambda m, x, y: m.e.cat([m.d.add_relu(m.b.mul(m.a.add(x, y), y), x), y], 1),
            a=ff,
            b=ff,
            d=ff,
            e=ff,
        ),
        (IMAGE, IMAGE),
        ("eager-ptq", "eager-qat"),
    )
    yield Sample(
        "float_functional_scalar",
        net(
            lambda m, x, y: m.c.add(m.b.mul_scalar(m.a.add_scalar(x, 0.5), 1.5), y),
            a=ff,
            b=ff,
            c=ff,
        ),
        (IMAGE, IMAGE),
        ("eager-ptq", "eager-qat"),
    )


def _pools() -> Iterator[Sample]:
    for d, shape in ((1, LINE), (2, IMAGE), (3, VOLUME)):
        for kind, args in (
            ("Max", (2,)),
            ("Avg", (2,)),
            ("AdaptiveAvg", (2,)),
            ("AdaptiveMax", (2,)),
        ):
            module = getattr(nn, f"{kind}Pool{d}d")
            snake = {
                "Max": "max",
                "Avg": "avg",
                "AdaptiveAvg": "adaptive_avg",
                "AdaptiveMax": "adaptive_max",
            }[kind]
            function = getattr(F, f"{snake}_pool{d}d")
            yield Sample(f"{snake}_pool{d}d", chain(lambda k=module, a=args: k(*a)), (shape,))
            yield Sample(
                f"functional_{snake}_pool{d}d",
                net(lambda m, x, f=function, a=args: f(x, *a)),
                (shape,),
            )
    yield Sample("mean", net(lambda m, x: x.mean([2, 3])), (IMAGE,))
    yield Sample("mean_keepdim", net(lambda m, x: torch.mean(x, [2, 3], True)), (IMAGE,))


def _activations() -> Iterator[Sample]:
    modules = {
        "relu": nn.ReLU,
        "relu6": nn.ReLU6,
        "hardtanh": lambda: nn.Hardtanh(-0.5, 0.7),
        "hardswish": nn.Hardswish,
        "hardsigmoid": nn.Hardsigmoid,
        "sigmoid": nn.Sigmoid,
        "tanh": nn.Tanh,
        "elu": lambda: nn.ELU(0.7),
        "celu": lambda: nn.CELU(0.7),
        "leaky_relu": lambda: nn.LeakyReLU(0.1),
        "prelu": lambda: nn.PReLU(4),
        "softmax": lambda: nn.Softmax(1),
        "silu": nn.SiLU,
        "gelu": nn.GELU,
        "threshold": lambda: nn.Threshold(0.1, 0.0),
    }
    functions: dict[str, Any] = {
        "relu": lambda m, x: F.relu(torch.relu(x).relu()).relu_(),
        "relu6": lambda m, x: F.relu6(x),
        "hardtanh": lambda m, x: F.hardtanh(x, -0.5, 0.7),
        "clamp": lambda m, x: torch.clamp(x, -0.5, 0.7).clamp(0.0, 0.5),
        "hardswish": lambda m, x: F.hardswish(x),
        "hardsigmoid": lambda m, x: F.hardsigmoid(x),
        "sigmoid": lambda m, x: torch.sigmoid(x),
        "sigmoid_method": lambda m, x: x.sigmoid(),
        "tanh": lambda m, x: torch.tanh(x),
        "tanh_method": lambda m, x: x.tanh(),
        "elu": lambda m, x: F.elu(x, 0.7),
        "celu": lambda m, x: F.celu(x, 0.7),
        "leaky_relu": lambda m, x: F.leaky_relu(x, 0.1),
        "softmax": lambda m, x: F.softmax(x, 1),
        "silu": lambda m, x: F.silu(x),
        "gelu": lambda m, x: F.gelu(x),
        "threshold": lambda m, x: F.threshold(x, 0.1, 0.0),
    }
    for key, make in modules.items():
        yield Sample(key, chain(make), (IMAGE,))
    for key, function in functions.items():
        yield Sample(f"functional_{key}", net(function), (IMAGE,))
    yield Sample("functional_prelu", net(lambda m, x: F.prelu(x, m.w), w=param(4)), (IMAGE,))


def _norms() -> Iterator[Sample]:
    yield Sample("batch_norm2d", chain(lambda: nn.BatchNorm2d(4)), (IMAGE,))
    yield Sample("batch_norm3d", chain(lambda: nn.BatchNorm3d(2)), (VOLUME,))
    yield Sample("batch_norm1d", chain(lambda: nn.BatchNorm1d(4)), (LINE,))
    yield Sample(
        "bn_relu2d", chain(lambda: nn.BatchNorm2d(4), nn.ReLU), (IMAGE,), fuse=(("0", "1"),)
    )
    yield Sample(
        "bn_relu3d", chain(lambda: nn.BatchNorm3d(2), nn.ReLU), (VOLUME,), fuse=(("0", "1"),)
    )
    yield Sample(
        "functional_batch_norm",
        net(
            lambda m, x: F.batch_norm(x, m.a, m.b),
            a=lambda: nn.Parameter(torch.zeros(4), requires_grad=False),
            b=lambda: nn.Parameter(torch.ones(4), requires_grad=False),
        ),
        (IMAGE,),
    )
    yield Sample("layer_norm", chain(lambda: nn.LayerNorm([6, 6])), (IMAGE,))
    yield Sample("group_norm", chain(lambda: nn.GroupNorm(2, 4)), (IMAGE,))
    for d, shape in ((1, LINE), (2, IMAGE), (3, VOLUME)):
        make = getattr(nn, f"InstanceNorm{d}d")
        yield Sample(
            f"instance_norm{d}d", chain(lambda k=make, c=shape[1]: k(c, affine=True)), (shape,)
        )
    yield Sample(
        "functional_layer_norm",
        net(lambda m, x: F.layer_norm(x, [6], m.w, m.b), w=param(6), b=param(6)),
        (IMAGE,),
    )
    yield Sample(
        "functional_group_norm",
        net(lambda m, x: F.group_norm(x, 2, m.w, m.b), w=param(4), b=param(4)),
        (IMAGE,),
    )
    yield Sample(
        "functional_instance_norm",
        net(lambda m, x: F.instance_norm(x, weight=m.w, bias=m.b), w=param(4), b=param(4)),
        (IMAGE,),
    )


def _shapes() -> Iterator[Sample]:
    functions: dict[str, Any] = {
        "identity": (nn.Identity,),
        "dropout": (nn.Dropout,),
        "dropout1d": (nn.Dropout1d,),
        "dropout2d": (nn.Dropout2d,),
        "upsample_nearest": (lambda: nn.Upsample(scale_factor=2),),
        "upsample_bilinear": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"),),
        "upsampling2d": (lambda: nn.UpsamplingNearest2d(scale_factor=2),),
        "flatten_module": (nn.Flatten,),
        "unflatten_module": (lambda: nn.Unflatten(1, (2, 2)),),
        "pixel_shuffle": (lambda: nn.PixelShuffle(2),),
        "pixel_unshuffle": (lambda: nn.PixelUnshuffle(2),),
        "channel_shuffle": (lambda: nn.ChannelShuffle(2),),
        "zero_pad": (lambda: nn.ZeroPad2d(1),),
        "constant_pad": (lambda: nn.ConstantPad2d(1, 0.3),),
        "reflection_pad": (lambda: nn.ReflectionPad2d(1),),
        "replication_pad": (lambda: nn.ReplicationPad2d(1),),
    }
    for key, parts in functions.items():
        yield Sample(key, chain(*parts), (IMAGE,))
    calls: dict[str, Any] = {
        "functional_dropout": lambda m, x: F.dropout(x, 0.5, m.training),
        "interpolate_nearest": lambda m, x: F.interpolate(x, scale_factor=2.0),
        "interpolate_bilinear": lambda m, x: F.interpolate(
            x, scale_factor=2.0, mode="bilinear", align_corners=False
        ),
        "pad": lambda m, x: F.pad(x, (1, 1, 1, 1)),
        "pad_reflect": lambda m, x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        "flatten": lambda m, x: torch.flatten(x, 1),
        "flatten_method": lambda m, x: x.flatten(1),
        "reshape": lambda m, x: x.reshape(2, -1),
        "torch_reshape": lambda m, x: torch.reshape(x, (2, -1)),
        "view_size": lambda m, x: x.view(x.size(0), x.shape[1] // 2, -1),
        "permute": lambda m, x: x.permute(0, 2, 3, 1),
        "torch_permute": lambda m, x: torch.permute(x, (0, 2, 3, 1)),
        "transpose": lambda m, x: x.transpose(1, 2),
        "torch_transpose": lambda m, x: torch.transpose(x, 1, 2),
        "squeeze": lambda m, x: x.unsqueeze(0).squeeze(0),
        "torch_squeeze": lambda m, x: torch.squeeze(torch.unsqueeze(x, 0), 0),
        "expand": lambda m, x: x.expand(2, 4, 6, 6),
        "repeat": lambda m, x: x.repeat(1, 2, 1, 1),
        "repeat_interleave": lambda m, x: torch.repeat_interleave(x, 2, 1),
        "stack": lambda m, x: torch.stack([x, x], 1),
        "chunk": lambda m, x: torch.chunk(x, 2, 1)[0],
        "chunk_method": lambda m, x: x.chunk(2, 1)[1],
        "split": lambda m, x: torch.split(x, 2, 1)[0],
        "split_method": lambda m, x: x.split(2, 1)[0],
        "unbind": lambda m, x: torch.unbind(x, 1)[0],
        "getitem": lambda m, x: x[:, 1:3],
        "narrow": lambda m, x: torch.narrow(x, 1, 1, 2),
        "select": lambda m, x: x.select(1, 1),
        "roll": lambda m, x: torch.roll(x, 1, 1),
        "flip": lambda m, x: torch.flip(x, [1]),
        "functional_pixel_shuffle": lambda m, x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
        "functional_channel_shuffle": lambda m, x: F.channel_shuffle(x, 2),
        "contiguous": lambda m, x: x.contiguous(),
        "clone": lambda m, x: x.clone(),
        "detach": lambda m, x: x.detach(),
        "to": lambda m, x: x.to("cpu"),
        "unflatten": lambda m, x: x.unflatten(1, (2, 2)),
        "adaptive_size": lambda m, x: x.numel() * x,
    }
    for key, function in calls.items():
        yield Sample(key, net(function), (IMAGE,))


SAMPLES: tuple[Sample, ...] = (
    *_convs(),
    *_linears(),
    *_embeddings(),
    *_binary(),
    *_pools(),
    *_activations(),
    *_norms(),
    *_shapes(),
)

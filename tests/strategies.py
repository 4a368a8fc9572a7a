"""Hypothesis strategies: random small networks, and random ways to prepare them.

A network is drawn as a `Plan`: a tuple of steps that prints, so that a failing example can be
read. Weights come from a seed. Every network is FX-traceable and takes images of 3 x 8 x 8.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.ao import quantization as tq
from torch.ao.quantization import quantize_fx

from fxqfix._torch import quiet

__all__ = ["Case", "Plan", "Recipe", "Step", "batch", "batches", "cases", "plans", "recipes"]

CHANNELS = 4  # every step keeps a multiple of it
SIZE = 8
MOST_CHANNELS = 16


@dataclass(frozen=True)
class Step:
    """One op: its kind, and options that only this kind knows."""

    kind: str
    options: tuple[tuple[str, Any], ...] = ()

    def __repr__(self) -> str:
        return f"{self.kind}({', '.join(f'{k}={v!r}' for k, v in self.options)})"


@dataclass(frozen=True)
class Plan:
    """A network: steps on one image tensor, then a head."""

    steps: tuple[Step, ...]
    head: str
    seed: int
    channels: int = CHANNELS
    inputs: int = 1

    def build(self, kind: type[Net] | None = None) -> nn.Module:
        """The network, with weights from the seed; torch's random state stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return (kind or Net)(self)


# --- what a step does ----------------------------------------------------------------------------


def _swapped(parts: Any) -> Tensor:
    return torch.cat([parts[1], parts[0]], 1)  # by index: FX can't iterate over a proxy


# Ops without state, by how they are spelled.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "F.relu": F.relu,
    ".relu": lambda x: x.relu(),
    "F.relu6": F.relu6,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    ".sigmoid": lambda x: x.sigmoid(),
    "tanh": torch.tanh,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "elu": lambda x: F.elu(x, 0.5),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.5),
    "clamp": lambda x: torch.clamp(x, -0.25, 1.0),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "max_pool": lambda x: F.max_pool2d(x, 3, 1, 1),
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "interpolate": lambda x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0),
    "shuffle": lambda x: (
        x.view(x.size(0), 2, x.size(1) // 2, x.size(2), x.size(3))
        .transpose(1, 2)
        .contiguous()
        .view(x.size(0), x.size(1), x.size(2), x.size(3))
    ),
    "halves": lambda x: _swapped(torch.chunk(x, 2, 1)),
    "add_scalar": lambda x: x + 0.5,
    "mul_scalar": lambda x: x * 0.75,
    "twice": lambda x: x + x,
    "relu_": lambda x: x.relu_(),
    "F.relu inplace": lambda x: F.relu(x, inplace=True),
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "ReLU inplace": lambda: nn.ReLU(inplace=True),
    "ReLU6 inplace": lambda: nn.ReLU6(inplace=True),
    "Hardswish": nn.Hardswish,
    "Hardswish inplace": lambda: nn.Hardswish(inplace=True),
    "Sigmoid": nn.Sigmoid,
    "Hardsigmoid": nn.Hardsigmoid,
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "ELU": nn.ELU,
    "Dropout": lambda: nn.Dropout(0.3),
    "MaxPool2d": lambda: nn.MaxPool2d(3, 1, 1),
    "AvgPool2d": lambda: nn.AvgPool2d(3, 1, 1),
    "AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d(SIZE),
    "Upsample": lambda: nn.Sequential(nn.MaxPool2d(2), nn.Upsample(scale_factor=2)),
    "Identity": nn.Identity,
}

# More functions, for plans that not every flow takes.
WIDE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **FUNCTIONS,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "softmax": lambda x: torch.softmax(x, 1),
    "hardsigmoid": F.hardsigmoid,
    "celu": lambda x: F.celu(x, 0.7),
    "abs": torch.abs,
    "neg": torch.neg,
    "sub_scalar": lambda x: x - 0.25,
    "from one": lambda x: 1 - x,
    "divided": lambda x: x / 3.0,
    "squared": lambda x: x * x,
    "centred": lambda x: x - x.mean([2, 3], keepdim=True),
    "gated": lambda x: x * torch.sigmoid(x.mean([2, 3], keepdim=True)),
    "padded": lambda x: F.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1],
    "permuted": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "stacked": lambda x: torch.stack([x, x], 0)[1],
    "split": lambda x: torch.cat([x[:, :1], x[:, 1:]], 1),
    "bilinear": lambda x: F.interpolate(
        F.max_pool2d(x, 2), scale_factor=2.0, mode="bilinear", align_corners=False
    ),
    "hardswish_": lambda x: F.hardswish(x, inplace=True),
    "clamp_": lambda x: x.clamp_(-1.0, 2.0),
    "add_scalar_": lambda x: x.add_(0.5),
}


class Leaf(nn.Module):
    """What FX can't trace: it branches on a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 if bool(x.sum() > 0) else x * 0.25


class Rows(nn.Module):
    """A layer on sequences, for images: a row per pixel."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.recurrent = layer, isinstance(layer, nn.LSTM)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).transpose(1, 2)
        found = self.layer(rows)
        found = found[0] if self.recurrent else found
        return found.transpose(1, 2).reshape(x.shape)


class Attention(nn.Module):
    """One head over rows, spelled out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(channels, channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(torch.matmul(self.q(x), self.k(x).transpose(1, 2)), -1)
        return torch.matmul(weights, self.v(x))


class Nested(nn.Module):
    """Two convolutions and a residual, in a module of their own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(channels, channels, k, padding=k // 2) for k in (3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.two(torch.relu(self.one(x))) + x)


# Layers that need to know the number of channels.
LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda c: Rows(nn.Linear(c, c)),
    "lstm": lambda c: Rows(nn.LSTM(c, c, batch_first=True)),
    "attention": lambda c: Rows(Attention(c)),
    "layer_norm": lambda c: Rows(nn.LayerNorm(c)),
    "group_norm": lambda c: nn.GroupNorm(1, c),
    "instance_norm": lambda c: nn.InstanceNorm2d(c, affine=True),
    "batch_norm": lambda c: nn.BatchNorm2d(c),
    "prelu": lambda c: nn.PReLU(),
    "transposed": lambda c: nn.ConvTranspose2d(c, c, 3, padding=1),
    "upsampling": lambda c: nn.Sequential(nn.MaxPool2d(2), nn.ConvTranspose2d(c, c, 2, stride=2)),
    "nested": Nested,
    "standalone": Nested,
    "leaf": lambda c: Leaf(),
}


def _iadd(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def _imul(x: Tensor, y: Tensor) -> Tensor:
    x *= y
    return x


# kind -> two values of one shape -> one value.
JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "torch.add": torch.add,
    "add_relu": lambda x, y: F.relu(x + y),
    "add relu_": lambda x, y: (x + y).relu_(),
    "iadd": _iadd,
    "mul": lambda x, y: x * y,
    "torch.mul": torch.mul,
    "imul": _imul,
    "cat": lambda x, y: torch.cat([x, y], 1),
}


class Conv(nn.Module):
    """A convolution with any options, BatchNorm and relu behind it or not; keeps the size."""

    def __init__(self, channels: int, out: int, given: dict[str, Any]) -> None:
        super().__init__()
        kernel, dilation, stride = given["kernel"], given["dilation"], given["stride"]
        groups = {"one": 1, "two": 2, "depthwise": channels}[given["groups"]]
        padding = "same" if given["same"] and stride == 1 else dilation * (kernel // 2)
        self.conv = nn.Conv2d(
            channels,
            out,
            kernel,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=given["bias"],
            padding_mode=given["mode"],
        )
        self.bn = nn.BatchNorm2d(out) if given["bn"] else None
        if self.bn is not None:
            nn.init.normal_(self.bn.weight, 1.0, 0.3)
            nn.init.normal_(self.bn.bias, 0.0, 0.3)
        self.relu = {"no": None, "relu": nn.ReLU(), "inplace": nn.ReLU(inplace=True)}[given["relu"]]
        self.up = nn.Upsample(scale_factor=2) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for layer in (self.bn, self.relu, self.up):
            x = x if layer is None else layer(x)
        return x


class Net(nn.Module):
    """A plan, ready to run."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.steps, self.head = plan.steps, plan.head
        self.stem = nn.Conv2d(3, plan.channels, 3, padding=1)
        self.second = nn.Conv2d(3, plan.channels, 1) if plan.inputs == 2 else None
        layers: dict[str, nn.Module] = {}
        channels = plan.channels
        for i, step in enumerate(plan.steps):
            given = dict(step.options)
            if step.kind == "conv":
                channels = self._conv(layers, str(i), channels, channels, given)
            elif step.kind == "branch":
                inner = dict(given["conv"].options)
                channels = self._conv(layers, str(i), channels, channels, inner)
                channels *= 2 if given["join"] == "cat" else 1
            elif step.kind == "skip":
                channels *= 2 if given["join"] == "cat" else 1
            elif step.kind == "module":
                layers[str(i)] = MODULES[given["name"]]()
            elif step.kind == "layer":
                layers[str(i)] = LAYERS[given["name"]](channels)
            elif step.kind == "constant":
                value = torch.rand(1, channels, 1, 1) + 0.1
                if given["parameter"]:
                    self.register_parameter(f"constant{i}", nn.Parameter(value))
                else:
                    self.register_buffer(f"constant{i}", value)
        self.layers = nn.ModuleDict(layers)
        self.fc = nn.Linear(channels, 3) if plan.head in ("linear", "tuple", "dict") else None

    @staticmethod
    def _conv(
        layers: dict[str, nn.Module], key: str, channels: int, out: int, given: dict[str, Any]
    ) -> int:
        layers[key] = Conv(channels, out, given)
        return out

    def forward(self, x: Tensor) -> Any:
        return self._headed(self._through(self.stem(x)))

    def _through(self, x: Tensor) -> Tensor:
        kept = x
        for i, step in enumerate(self.steps):
            given = dict(step.options)
            if step.kind in ("conv", "module", "layer"):
                x = self.layers[str(i)](x)
            elif step.kind == "again":
                x = self.layers[str(given["of"])](x)
            elif step.kind == "constant":
                x = self._joined(i, given["join"], x, getattr(self, f"constant{i}"))
            elif step.kind == "function":
                x = WIDE_FUNCTIONS[given["name"]](x)
            elif step.kind == "keep":
                kept = x
            elif step.kind == "branch":
                x = self._joined(i, given["join"], self.layers[str(i)](x), x)
            else:  # skip: the value kept last, where its shape still fits
                x = self._joined(i, given["join"], x, kept)
            if step.kind in ("branch", "skip"):
                kept = x  # joins may have changed the number of channels
        return x

    def _joined(self, i: int, join: str, x: Tensor, y: Tensor) -> Tensor:
        return JOINS[join](x, y)

    def _headed(self, x: Tensor) -> Any:
        if self.fc is None:
            return torch.flatten(x, 1) if self.head == "flatten" else x
        found = self.fc(x.mean([2, 3]))
        return {"tuple": (found, x), "dict": {"found": found, "image": x}}.get(self.head, found)


class TwoInputs(Net):
    """A net of two images."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        assert self.second is not None
        return self._headed(self._through(self.stem(x) + self.second(y)))


class EagerNet(Net):
    """A net with the stubs and FloatFunctionals that eager quantization asks for."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        joins = [i for i, s in enumerate(plan.steps) if "join" in dict(s.options)]
        self.joins = nn.ModuleDict({str(i): nn.quantized.FloatFunctional() for i in joins})

    def forward(self, x: Tensor) -> Any:
        found = self._headed(self._through(self.stem(self.quant(x))))
        if isinstance(found, dict):
            return {name: self.dequant(value) for name, value in found.items()}
        return tuple(map(self.dequant, found)) if isinstance(found, tuple) else self.dequant(found)

    def _joined(self, i: int, join: str, x: Tensor, y: Tensor) -> Tensor:
        functional: Any = self.joins[str(i)]
        if join == "cat":
            return functional.cat([x, y], 1)
        if "relu" in join:
            return functional.add_relu(x, y)
        return functional.mul(x, y) if "mul" in join else functional.add(x, y)


# --- drawing networks ----------------------------------------------------------------------------


def _conv_options(qat: bool, lowers: bool) -> st.SearchStrategy[dict[str, Any]]:
    """What torch can prepare and, for `lowers`, what its int8 kernels can compute.

    Its QAT modules and its int8 modules fail on padding="same"; int8 convolutions pad with zeros
    or by reflection only.
    """
    modes = ["zeros", "zeros", "zeros", "reflect"] + (["circular", "replicate"] * (not lowers))
    return st.fixed_dictionaries(
        {
            "kernel": st.sampled_from([1, 3]),
            "dilation": st.sampled_from([1, 1, 2]),
            "stride": st.sampled_from([1, 1, 1, 2]),
            "groups": st.sampled_from(["one", "one", "two", "depthwise"]),
            "same": st.just(False) if qat or lowers else st.booleans(),
            "bias": st.booleans(),
            "bn": st.booleans(),
            "mode": st.sampled_from(modes),
            "relu": st.sampled_from(["no", "relu", "inplace"]),
        }
    )


def _step(kind: str, given: dict[str, Any]) -> Step:
    return Step(kind, tuple(sorted(given.items())))


@st.composite
def plans(
    draw: st.DrawFn, *, most: int = 6, qat: bool = True, lowers: bool = True, wide: bool = False
) -> Plan:
    """Networks of up to `most` steps behind a first convolution; by default any flow takes them.

    Args:
        draw: Hypothesis' own.
        most: Most steps.
        qat: Only what QAT modules take.
        lowers: Only what int8 modules take.
        wide: Also what some flows and engines refuse: constants, blocks, modules called twice, odd
            channels, several inputs and outputs.
    """
    conv = _conv_options(qat, lowers).map(lambda given: _step("conv", given))
    first = channels = draw(st.sampled_from([1, 3, 4, 5, 6, 8])) if wide else CHANNELS
    kinds = ["conv", "conv", "function", "module", "branch", "skip", "keep"]
    kinds += ["again", "constant", "layer", "layer"] * wide
    steps: list[Step] = []
    for _ in range(draw(st.integers(1, most))):
        kind = draw(st.sampled_from(kinds))
        steps.append(_drawn(draw, kind, conv, channels, steps, wide))
        channels *= 2 if dict(steps[-1].options).get("join") == "cat" else 1
    heads = ["linear", "flatten", "image", *["tuple", "dict"] * wide]
    head, seed = draw(st.sampled_from(heads)), draw(st.integers(0, 2**16))
    inputs = draw(st.sampled_from([1, 1, 1, 2])) if wide else 1
    return Plan(tuple(steps), head, seed, first, inputs)


def _drawn(
    draw: st.DrawFn,
    kind: str,
    conv: st.SearchStrategy[Step],
    channels: int,
    steps: list[Step],
    wide: bool,
) -> Step:
    """One step that fits behind the others."""
    if kind == "again":
        widths = _widths(steps, channels)
        fitting = [i for i, s in enumerate(steps) if s.kind in _CALLABLE and widths[i] == channels]
        return _step(kind, {"of": draw(st.sampled_from(fitting))}) if fitting else Step("keep")
    if kind == "constant":
        joins = st.sampled_from(["add", "mul", "torch.add"])
        return _step(kind, {"join": draw(joins), "parameter": draw(st.booleans())})
    if kind == "conv":
        step = draw(conv)
        odd = channels % 2 and dict(step.options)["groups"] == "two"
        return _step(kind, {**dict(step.options), "groups": "one"}) if odd else step
    if kind in ("function", "module", "layer"):
        names = {"function": WIDE_FUNCTIONS if wide else FUNCTIONS, "module": MODULES}
        fitting = [n for n in names.get(kind, LAYERS) if channels % 2 == 0 or n != "shuffle"]
        return _step(kind, {"name": draw(st.sampled_from(fitting))})
    if kind == "keep":
        return Step(kind)
    joins = [j for j in JOINS if j != "cat" or channels * 2 <= MOST_CHANNELS]
    inner = {"conv": _drawn(draw, "conv", conv, channels, steps, wide)} if kind == "branch" else {}
    return _step(kind, {"join": draw(st.sampled_from(joins)), **inner})


_CALLABLE = ("conv", "module", "layer")


def _widths(steps: list[Step], last: int) -> list[int]:
    """The channels that each step was given."""
    found = []
    for step in reversed(steps):
        last //= 2 if dict(step.options).get("join") == "cat" else 1
        found.append(last)
    return found[::-1]


# --- preparing them ------------------------------------------------------------------------------

ENGINES = ("fbgemm", "qnnpack", "x86", "onednn")
_OBSERVERS = {
    "MinMax": tq.MinMaxObserver,
    "MovingAverage": tq.MovingAverageMinMaxObserver,
    "Histogram": tq.HistogramObserver,
}


class Custom(tq.MinMaxObserver):
    """A user's own observer: half of what it saw."""

    def calculate_qparams(self) -> Any:
        return self._calculate_qparams(self.min_val / 2, self.max_val / 2)


class CustomFake(tq.FakeQuantize):
    """A user's own fake-quant."""


@dataclass(frozen=True)
class Recipe:
    """How a network is prepared.

    Attributes:
        qat: Whether by prepare_qat_fx (trained for two steps) or by prepare_fx.
        default: An engine whose default qconfig mapping is taken, or "" for a qconfig of its own.
        kind: Its own qconfig's observer (PTQ) or fake-quant (QAT).
        activation: Its (quant_min, quant_max) in quint8.
        weight: Its (quant_min, quant_max) in qint8.
        per_channel: Whether its weights are per channel.
        observing: Whether observers are left on (QAT).
        symmetric: Whether its activations are symmetric.
        signed: Whether its activations are qint8.
        skipped: Names of modules that stay in float.
        narrow: Names of modules with 4-bit weights.
        custom: Whether its observers are subclasses of torch's.
        converts: An engine to convert for that isn't the qconfig's.
    """

    qat: bool
    default: str = ""
    kind: str = "fused"
    activation: tuple[int, int] = (0, 127)
    weight: tuple[int, int] = (-128, 127)
    per_channel: bool = True
    observing: bool = True
    symmetric: bool = False
    signed: bool = False
    skipped: tuple[str, ...] = ()
    narrow: tuple[str, ...] = ()
    custom: bool = False
    converts: str = ""

    @property
    def engine(self) -> str:
        """The engine to convert for."""
        return self.converts or self.default or "fbgemm"

    def mapping(self) -> tq.QConfigMapping:
        """The QConfigMapping; `default` ones come with fixed qparams for sigmoid and the like."""
        find = tq.get_default_qat_qconfig_mapping if self.qat else tq.get_default_qconfig_mapping
        mapping = find(self.default or "fbgemm")
        if not self.default:
            mapping = _replaced(mapping, self.qconfig())
        for name in self.skipped:
            mapping.set_module_name(name, None)
        for name in self.narrow:
            mapping.set_module_name(name, replace(self, weight=(-8, 7)).qconfig())
        return mapping

    def qconfig(self) -> tq.QConfig:
        """Its own qconfig."""
        scheme = torch.per_channel_symmetric if self.per_channel else torch.per_tensor_symmetric
        low, high = self.activation
        dtype = torch.qint8 if self.signed else torch.quint8
        if self.signed:  # as many codes on both sides of 0
            low, high = -(high + 1) // 2, high // 2
        act = {"dtype": dtype, "quant_min": low, "quant_max": high}
        if self.symmetric:
            act["qscheme"] = torch.per_tensor_symmetric
        weight = {
            "dtype": torch.qint8,
            "quant_min": self.weight[0],
            "quant_max": self.weight[1],
            "qscheme": scheme,
        }
        if not self.qat:
            kind = tq.PerChannelMinMaxObserver if self.per_channel else tq.MinMaxObserver
            observer = Custom if self.custom else _OBSERVERS.get(self.kind, tq.MinMaxObserver)
            return tq.QConfig(observer.with_args(**act), kind.with_args(**weight))
        fake = tq.FusedMovingAvgObsFakeQuantize if self.kind == "fused" else tq.FakeQuantize
        fake = CustomFake if self.custom else fake
        moving = tq.MovingAverageMinMaxObserver
        channel = tq.MovingAveragePerChannelMinMaxObserver if self.per_channel else moving
        return tq.QConfig(
            fake.with_args(observer=moving, **act), fake.with_args(observer=channel, **weight)
        )

    def prepare(self, net: nn.Module, *given: Tensor, custom: Any = None) -> fx.GraphModule:
        """Prepare a copy, run two batches through it, and leave it in eval mode.

        Args:
            net: A network.
            given: Its inputs, where they aren't `batch(0)`.
            custom: A PrepareCustomConfig.
        """
        example = given or (batch(0),)
        make = quantize_fx.prepare_qat_fx if self.qat else quantize_fx.prepare_fx
        with quiet():
            own = copy.deepcopy(net).train(self.qat)
            model = make(own, self.mapping(), example, prepare_custom_config=custom)
            run_in(model, *example)
        if not self.qat:
            return model
        if not self.observing:
            model.apply(tq.disable_observer)
        return model.eval()


def _replaced(mapping: tq.QConfigMapping, qconfig: tq.QConfig) -> tq.QConfigMapping:
    """The mapping with another global qconfig; entries of ops that share it follow."""
    before = mapping.global_qconfig
    mapping.set_global(qconfig)
    for key, value in list(mapping.object_type_qconfigs.items()):
        if value is not None and value.weight is before.weight:
            mapping.set_object_type(key, qconfig)
    return mapping


def run_in(model: nn.Module, *example: Tensor) -> None:
    """Show a prepared model two batches like the example."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for seed in range(2):
            model(*(like(x, seed + 1000 * i) for i, x in enumerate(example)))


@st.composite
def recipes(draw: st.DrawFn, *, wide: bool = False) -> Recipe:
    """Default and own qconfigs, PTQ and QAT, whole, reduced and sub-8-bit ranges.

    Args:
        draw: Hypothesis' own.
        wide: Also what some engines refuse: symmetric and signed activations, layers left out or
            mixed, observers of one's own, another engine than the qconfig is meant for.
    """
    weights = [(-128, 127), (-127, 127), (-8, 7), (-64, 63)]
    qat, observing = draw(st.booleans()), draw(st.booleans())
    more: dict[str, Any] = {}
    if wide:
        names = st.lists(st.sampled_from(["stem", "fc", "layers.0", "layers.1"]), max_size=1)
        more = {"skipped": tuple(draw(names)), "narrow": tuple(draw(names))}
        more["converts"] = draw(st.sampled_from(ENGINES))
    if draw(st.booleans()):
        return Recipe(qat, draw(st.sampled_from(ENGINES)), observing=observing, **more)
    if wide:
        more |= {name: draw(st.booleans()) for name in ("symmetric", "custom")}
        more["signed"] = draw(st.sampled_from([False, False, False, True]))
    kinds = ["fused", "plain"] if qat else list(_OBSERVERS)
    return Recipe(
        qat,
        kind=draw(st.sampled_from(kinds)),
        activation=draw(st.sampled_from([(0, 127), (0, 255), (0, 15), (0, 63)])),
        weight=draw(st.sampled_from(weights)),
        per_channel=draw(st.booleans()),
        observing=observing,
        **more,
    )


@dataclass(frozen=True)
class Case:
    """A network and how it is prepared."""

    plan: Plan
    recipe: Recipe
    _made: list[fx.GraphModule] = field(default_factory=list, repr=False, compare=False)

    def prepared(self) -> fx.GraphModule:
        """A prepared model, calibrated, in eval mode; each call gives a copy of its own."""
        if not self._made:
            self._made.append(self.recipe.prepare(self.plan.build()))
        return copy.deepcopy(self._made[0])

    @contextlib.contextmanager
    def engine(self) -> Iterator[str]:
        """The engine that the recipe is meant for, while the block runs."""
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = self.recipe.engine
        try:
            yield self.recipe.engine
        finally:
            torch.backends.quantized.engine = before

    def int8(self, prepared: fx.GraphModule) -> fx.GraphModule:
        """Torch's own conversion of a copy of `prepared`."""
        with self.engine(), quiet():
            return quantize_fx.convert_fx(copy.deepcopy(prepared))


@st.composite
def cases(draw: st.DrawFn, *, most: int = 6, lowers: bool = True) -> Case:
    """Random networks, prepared in random ways.

    Args:
        draw: Hypothesis' own.
        most: Most steps of a network.
        lowers: Only what torch can convert to int8.
    """
    recipe = draw(recipes())
    return Case(draw(plans(most=most, qat=recipe.qat, lowers=lowers)), recipe)


def batch(seed: int, gain: float = 1.0, count: int = 2) -> Tensor:
    """Random images, always the same for one seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, SIZE, SIZE, generator=generator) * gain


def like(x: Tensor, seed: int, gain: float = 1.0) -> Tensor:
    """Random images in the form of x."""
    found = batch(seed, gain, x.shape[0])
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return found.contiguous(memory_format=torch.channels_last) if last else found


def batches(count: int, *, gain: float = 2.0) -> list[Tensor]:
    """Images that reach beyond what the models were calibrated on."""
    return [batch(100 + i, gain) for i in range(count)]

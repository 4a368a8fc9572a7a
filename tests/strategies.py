"""Hypothesis strategies: random small networks, and random ways to prepare them.

A network is drawn as a `Plan`: a tuple of steps that prints, so that a failing example can be
read. Weights come from a seed. Every network is FX-traceable and takes images of 3 x 8 x 8.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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

    def build(self) -> nn.Module:
        """The network, with weights from the seed; torch's random state stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return Net(self)


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
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        layers: dict[str, nn.Module] = {}
        channels = CHANNELS
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
        self.layers = nn.ModuleDict(layers)
        self.fc = nn.Linear(channels, 3) if plan.head == "linear" else None

    @staticmethod
    def _conv(
        layers: dict[str, nn.Module], key: str, channels: int, out: int, given: dict[str, Any]
    ) -> int:
        layers[key] = Conv(channels, out, given)
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        kept = x
        for i, step in enumerate(self.steps):
            given = dict(step.options)
            if step.kind in ("conv", "module"):
                x = self.layers[str(i)](x)
            elif step.kind == "function":
                x = FUNCTIONS[given["name"]](x)
            elif step.kind == "keep":
                kept = x
            elif step.kind == "branch":
                x = JOINS[given["join"]](self.layers[str(i)](x), x)
            else:  # skip: the value kept last, where its shape still fits
                x = JOINS[given["join"]](x, kept)
            if step.kind in ("branch", "skip"):
                kept = x  # joins may have changed the number of channels
        if self.fc is not None:
            return self.fc(x.mean([2, 3]))
        return torch.flatten(x, 1) if self.head == "flatten" else x


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
def plans(draw: st.DrawFn, *, most: int = 6, qat: bool = True, lowers: bool = True) -> Plan:
    """Networks of up to `most` steps behind a first convolution; by default any flow takes them."""
    conv = _conv_options(qat, lowers).map(lambda given: _step("conv", given))
    steps: list[Step] = []
    channels = CHANNELS
    for _ in range(draw(st.integers(1, most))):
        kind = draw(
            st.sampled_from(["conv", "conv", "function", "module", "branch", "skip", "keep"])
        )
        joins = [j for j in JOINS if j != "cat" or channels * 2 <= MOST_CHANNELS]
        if kind == "conv":
            steps.append(draw(conv))
        elif kind == "function":
            steps.append(_step(kind, {"name": draw(st.sampled_from(list(FUNCTIONS)))}))
        elif kind == "module":
            steps.append(_step(kind, {"name": draw(st.sampled_from(list(MODULES)))}))
        elif kind == "keep":
            steps.append(Step("keep"))
        else:
            join = draw(st.sampled_from(joins))
            channels *= 2 if join == "cat" else 1
            inner = {"conv": draw(conv)} if kind == "branch" else {}
            steps.append(_step(kind, {"join": join, **inner}))
    head = draw(st.sampled_from(["linear", "flatten", "image"]))
    return Plan(tuple(steps), head, draw(st.integers(0, 2**16)))


# --- preparing them ------------------------------------------------------------------------------

ENGINES = ("fbgemm", "qnnpack", "x86", "onednn")
_OBSERVERS = {
    "MinMax": tq.MinMaxObserver,
    "MovingAverage": tq.MovingAverageMinMaxObserver,
    "Histogram": tq.HistogramObserver,
}


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
    """

    qat: bool
    default: str = ""
    kind: str = "fused"
    activation: tuple[int, int] = (0, 127)
    weight: tuple[int, int] = (-128, 127)
    per_channel: bool = True
    observing: bool = True

    @property
    def engine(self) -> str:
        """The engine to convert for."""
        return self.default or "fbgemm"

    def mapping(self) -> tq.QConfigMapping:
        """The QConfigMapping; `default` ones come with fixed qparams for sigmoid and the like."""
        find = tq.get_default_qat_qconfig_mapping if self.qat else tq.get_default_qconfig_mapping
        if self.default:
            return find(self.default)
        mapping = find("fbgemm")
        return _replaced(mapping, self._qconfig())

    def _qconfig(self) -> tq.QConfig:
        scheme = torch.per_channel_symmetric if self.per_channel else torch.per_tensor_symmetric
        low, high = self.activation
        act = {"dtype": torch.quint8, "quant_min": low, "quant_max": high}
        weight = {
            "dtype": torch.qint8,
            "quant_min": self.weight[0],
            "quant_max": self.weight[1],
            "qscheme": scheme,
        }
        if not self.qat:
            kind = tq.PerChannelMinMaxObserver if self.per_channel else tq.MinMaxObserver
            return tq.QConfig(_OBSERVERS[self.kind].with_args(**act), kind.with_args(**weight))
        fake = tq.FusedMovingAvgObsFakeQuantize if self.kind == "fused" else tq.FakeQuantize
        moving = tq.MovingAverageMinMaxObserver
        channel = tq.MovingAveragePerChannelMinMaxObserver if self.per_channel else moving
        return tq.QConfig(
            fake.with_args(observer=moving, **act), fake.with_args(observer=channel, **weight)
        )

    def prepare(self, net: nn.Module) -> fx.GraphModule:
        """Prepare a copy, run two batches through it, and leave it in eval mode."""
        with quiet():
            if not self.qat:
                own = copy.deepcopy(net).eval()
                model = quantize_fx.prepare_fx(own, self.mapping(), (batch(0),))
                _run(model)
                return model
            own = copy.deepcopy(net).train()
            model = quantize_fx.prepare_qat_fx(own, self.mapping(), (batch(0),))
            _run(model)
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


def _run(model: nn.Module) -> None:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for seed in range(2):
            model(batch(seed))


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Default and own qconfigs, PTQ and QAT, whole, reduced and sub-8-bit ranges."""
    weights = [(-128, 127), (-127, 127), (-8, 7), (-64, 63)]
    qat = draw(st.booleans())
    observing = draw(st.booleans())
    if draw(st.booleans()):
        return Recipe(qat, draw(st.sampled_from(ENGINES)), observing=observing)
    kinds = ["fused", "plain"] if qat else list(_OBSERVERS)
    return Recipe(
        qat,
        kind=draw(st.sampled_from(kinds)),
        activation=draw(st.sampled_from([(0, 127), (0, 255), (0, 15), (0, 63)])),
        weight=draw(st.sampled_from(weights)),
        per_channel=draw(st.booleans()),
        observing=observing,
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


def batches(count: int, *, gain: float = 2.0) -> list[Tensor]:
    """Images that reach beyond what the models were calibrated on."""
    return [batch(100 + i, gain) for i in range(count)]

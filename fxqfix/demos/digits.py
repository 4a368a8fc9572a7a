"""Digits: a small CNN, trained with QAT on real images, and judged on images that it never saw."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.nn.intrinsic.qat import freeze_bn_stats
from torch.ao.quantization import disable_observer, get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

from fxqfix._extras import require
from fxqfix.demos._replay import calls, causes, differing, paragraph, replay, title
from fxqfix.names import Engine
from fxqfix.report import Report

__all__ = ["Digits", "Images", "accuracy", "convert", "images", "models", "run"]

ENGINE: Engine = "fbgemm"
TRAIN = 1347  # three quarters; the rest is held out
BRIGHTER = 1.5
FLOAT_EPOCHS, QAT_EPOCHS, SETTLED_EPOCHS = 10, 4, 2


class Digits(nn.Module):
    """Convolution, depthwise convolution, residual, hardswish, concatenation, pool, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_bn(1, 16, 3), nn.ReLU())
        self.depthwise = nn.Sequential(*_conv_bn(16, 16, 3, groups=16), nn.ReLU())
        self.pointwise = nn.Sequential(*_conv_bn(16, 16, 1))
        self.relu = nn.ReLU()
        self.branch = nn.Sequential(*_conv_bn(16, 16, 3), nn.Hardswish())
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of 8x8 images."""
        x = self.stem(x)
        x = self.relu(x + self.pointwise(self.depthwise(x)))
        x = torch.cat([x, self.branch(x)], 1)
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits


def _conv_bn(inputs: int, outputs: int, kernel: int, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


@dataclass(frozen=True)
class Images:
    """Images (N, 1, 8, 8) in [0, 1], and the digit that each shows."""

    pixels: Tensor
    labels: Tensor

    def __getitem__(self, index: Any) -> Images:
        """Some of them."""
        return Images(self.pixels[index], self.labels[index])

    def brighter(self, factor: float = BRIGHTER) -> Images:
        """The same images, brighter than any that was trained on."""
        return Images(factor * self.pixels, self.labels)

    @property
    def batches(self) -> list[Tensor]:
        """The pixels in batches of 64."""
        return [*torch.split(self.pixels, 64)]


def images() -> tuple[Images, Images]:
    """Images to train on and held-out ones, split by the random state.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    loaded = require("sklearn.datasets", "examples", "demo digits").load_digits()
    pixels = torch.tensor(loaded.images, dtype=torch.float32)[:, None] / 16
    everything = Images(pixels, torch.tensor(loaded.target))
    order = torch.randperm(len(pixels))
    return everything[order[:TRAIN]], everything[order[TRAIN:]]


def train(model: nn.Module, data: Images, epochs: int, rate: float) -> None:
    """Adam on cross entropy, shuffled by the random state."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(epochs):
        for index in torch.split(torch.randperm(len(data.pixels)), 64):
            batch = data[index]
            optimizer.zero_grad()
            F.cross_entropy(model(batch.pixels), batch.labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


@dataclass(frozen=True)
class Trained:
    """The network trained in float, then with QAT, and the images it never saw."""

    network: nn.Module
    prepared: fx.GraphModule
    held_out: Images


def models() -> Trained:
    """Train in float, then with QAT: a few seconds."""
    data, held_out = images()
    network = Digits()
    train(network, data, FLOAT_EPOCHS, 1e-2)
    example = (data.pixels[:1],)
    mapping = get_default_qat_qconfig_mapping("fbgemm")
    prepared: fx.GraphModule = prepare_qat_fx(copy.deepcopy(network).train(), mapping, example)
    train(prepared, data, QAT_EPOCHS, 1e-3)
    prepared.apply(disable_observer).apply(freeze_bn_stats)
    train(prepared, data, SETTLED_EPOCHS, 1e-3)
    return Trained(network.eval(), prepared.eval(), held_out)


def convert(prepared: fx.GraphModule) -> fx.GraphModule:
    """Convert a copy, as torch does it."""
    converted: fx.GraphModule = convert_fx(copy.deepcopy(prepared))
    return converted


def accuracy(model: nn.Module, data: Images) -> float:
    """Share of the images whose digit the model names."""
    right = calls(model, data.pixels).argmax(1) == data.labels
    return float(right.float().mean())


def run(out: TextIO) -> Report:
    """Write the story to `out`; the report is that of the held-out images before the fix."""
    from fxqfix import compare

    with replay(ENGINE):
        trained = models()
        prepared, plain = trained.prepared, trained.held_out
        converted = convert(prepared)
        sets = {"held-out": plain, f"{BRIGHTER}x brighter": plain.brighter()}
        title(out, f"Digits: a CNN trained with QAT, on {len(plain.pixels)} held-out ({ENGINE})")
        _saw(out, trained, converted, sets)
        reports = {
            name: compare(prepared, converted, data.batches, engine=ENGINE)
            for name, data in sets.items()
        }
        print("\n2. compare(prepared, convert_fx(prepared), data)", file=out)
        for name, report in reports.items():
            print(f"\n   {name}\n{report}", file=out)
        print("\n3. Why", file=out)
        for name, report in reports.items():
            _why(out, name, report)
        print("\n4. After", file=out)
        _after(out, prepared, sets)
    return reports["held-out"]


def _saw(out: TextIO, trained: Trained, converted: fx.GraphModule, sets: dict[str, Images]) -> None:
    print("1. What one sees", file=out)
    names = {"float": trained.network, "QAT": trained.prepared, "int8": converted}
    for kind, data in sets.items():
        parts = [f"{n} {100 * accuracy(m, data):.1f}%" for n, m in names.items()]
        expected, got = calls(trained.prepared, data.pixels), calls(converted, data.pixels)
        labels = differing(expected.argmax(1), got.argmax(1))
        print(f"   {kind:13} accuracy {', '.join(parts)};", file=out)
        print(
            f"{'':17}QAT against int8: {differing(expected, got)} of {got.numel()} logits differ, "
            f"{labels} of {len(got)} predictions",
            file=out,
        )


def _why(out: TextIO, name: str, report: Report) -> None:
    last = report.rows[-1]
    worst = next(r for r in report.worst(len(report.rows)) if r.kind == "activation")
    found = worst.local or worst.cumulative
    paragraph(
        out,
        f"{name}: worst on the same inputs is {worst.name}, {found.differing} of "
        f"{found.elements} codes by up to {found.max_lsb} LSB.",
        f"{last.name} inherits {last.causes.get('upstream', 0)} of its {last.differing}.",
        f"Causes over all rows: {causes(report)}.",
    )


def _after(out: TextIO, prepared: fx.GraphModule, sets: dict[str, Images]) -> None:
    from fxqfix import compare, freeze, to_decomposed

    frozen = freeze(prepared)
    decomposed, converted = to_decomposed(prepared), convert(frozen)
    for name, data in sets.items():
        expected = calls(frozen, data.pixels)
        logits = calls(decomposed, data.pixels)
        wrong = differing(logits, expected)
        labels = differing(logits.argmax(1), calls(prepared, data.pixels).argmax(1))
        print(
            f"   {name}: to_decomposed(prepared) against freeze(prepared): {wrong} of "
            f"{expected.numel()} logits differ;\n      against prepared: {labels} of "
            f"{len(expected)} predictions, accuracy {100 * accuracy(decomposed, data):.1f}%",
            file=out,
        )
    for name, data in sets.items():
        report = compare(prepared, converted, data.batches, engine=ENGINE)
        print(f"   {name}: convert_fx(freeze(prepared)) against prepared:", file=out)
        print(f"      {causes(report)}", file=out)

"""What the benchmarks share: networks, interleaved timing, and what the figures depend on."""

from __future__ import annotations

import copy
import datetime
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import disable_observer, get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

from fxqfix.engines import isa_of

ENGINE = "fbgemm"


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv_bn(channels, channels, 3), nn.ReLU(), *_conv_bn(channels, channels, 3)
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.body(x))


class Inverted(nn.Module):
    """Expand, depthwise, project; with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 4 * channels
        self.body = nn.Sequential(
            *(*_conv_bn(channels, wide, 1), nn.ReLU6()),
            *(*_conv_bn(wide, wide, 3, groups=wide), nn.ReLU6()),
            *_conv_bn(wide, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _conv_bn(a: int, b: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(a, b, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(b)]


def resnet_like() -> nn.Module:
    """20 convolutions, 0.7 million weights."""
    layers: list[nn.Module] = [*_conv_bn(3, 16, 3), nn.ReLU()]
    for channels in (16, 32, 64):
        layers += [Residual(channels) for _ in range(3)]
        if channels < 64:
            layers += [*_conv_bn(channels, 2 * channels, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mobilenet_like() -> nn.Module:
    """21 convolutions, 6 of them depthwise."""
    layers: list[nn.Module] = [*_conv_bn(3, 16, 3), nn.ReLU6()]
    for channels in (16, 32, 64):
        layers += [Inverted(channels) for _ in range(2)]
        if channels < 64:
            layers += [*_conv_bn(channels, 2 * channels, 1, stride=2), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def chain(layers: int) -> nn.Module:
    """Convolution, BatchNorm and relu, so many times; as small as it goes."""
    found = [nn.Sequential(*_conv_bn(4, 4, 3), nn.ReLU()) for _ in range(layers)]
    return nn.Sequential(*found)


class Block(nn.Module):
    """A basic block of resnet18; with a stride, its skip is a convolution of 1x1."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        first, second = _conv_bn(a, b, 3, stride), _conv_bn(b, b, 3)
        self.body = nn.Sequential(*first, nn.ReLU(inplace=True), *second)
        self.skip = nn.Sequential(*_conv_bn(a, b, 1, stride)) if stride > 1 else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.skip(x))


class Bottleneck(nn.Module):
    """An inverted residual of mobilenet_v2."""

    def __init__(self, a: int, b: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = a * expand
        wider = [*_conv_bn(a, wide, 1), nn.ReLU6(inplace=True)] if expand > 1 else []
        deep = [*_conv_bn(wide, wide, 3, stride, groups=wide), nn.ReLU6(inplace=True)]
        self.body = nn.Sequential(*wider, *deep, *_conv_bn(wide, b, 1))
        self.adds = stride == 1 and a == b

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def resnet18() -> nn.Module:
    """20 convolutions and a linear, 11.7 million weights: torchvision's architecture."""
    layers: list[nn.Module] = [*_conv_bn(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    width = 64
    for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Block(width, channels, stride), Block(channels, channels, 1)]
        width = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def mobilenet_v2() -> nn.Module:
    """52 convolutions, 17 of them depthwise, and a linear: torchvision's architecture."""
    layers: list[nn.Module] = [*_conv_bn(3, 32, 3, 2), nn.ReLU6(inplace=True)]
    width = 32
    rows = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1))
    for expand, channels, count, stride in (*rows, (6, 160, 3, 2), (6, 320, 1, 1)):
        for i in range(count):
            layers.append(Bottleneck(width, channels, 1 if i else stride, expand))
            width = channels
    layers += [*_conv_bn(320, 1280, 1), nn.ReLU6(inplace=True), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1280, 1000))


NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "resnet-like": resnet_like,
    "mobilenet-like": mobilenet_like,
}


def prepare(net: nn.Module, x: Tensor) -> fx.GraphModule:
    """A prepared model with settled observers, in eval mode."""
    prepared = prepare_qat_fx(net.train(), get_default_qat_qconfig_mapping(ENGINE), (x,))
    with torch.no_grad():
        for _ in range(2):
            prepared(x)
    return prepared.apply(disable_observer).eval()


def convert(prepared: fx.GraphModule) -> fx.GraphModule:
    return convert_fx(copy.deepcopy(prepared))


def medians(functions: Mapping[str, Callable[[], object]], repeats: int = 7) -> dict[str, float]:
    """CPU seconds of each, interleaved (A B C A B C ...), after one round that doesn't count.

    CPU time, with one thread: what else runs on the machine doesn't count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(repeats + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if round_:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def settle() -> None:
    """One thread, one seed, one engine, and none of torch's notices."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.backends.quantized.engine = ENGINE
    print(f"{datetime.date.today()}, torch {torch.__version__}, {ENGINE}, one thread, {_cpu()}")


def machine() -> dict[str, str]:
    """What figures depend on: the day, the CPU and what its kernels run at, the versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu(),
        "levels": str(isa_of(None)),
        "engine": ENGINE,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchao": _version("torchao"),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _cpu() -> str:
    known = ("avx2", "avx512f", "avx512_vnni", "avx_vnni")
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    flags = set(info.partition("flags")[2].partition("\n")[0].split())
    return f"{platform.machine()} with {', '.join(f for f in known if f in flags) or 'no AVX2'}"

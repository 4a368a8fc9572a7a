"""How fast the deployed integers run on a GPU, beside the float model; and a step of training.

    python benchmarks/gpu_speed.py [--json FILE] [--quick]

ResNet-18 and MobileNetV2, batch 32 of 224x224, TF32 convolutions on as torch has them by default.
Milliseconds are medians of interleaved runs, the device waited for. Codes have to be those of the
same emulation on the CPU, and outputs of the trained model those of `to_int8`; exit code 1 where
one differs. `--quick` takes small images and two rounds, on the CPU where there is no GPU: it tries
the script. `make gpu` runs it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from gpu import machine
from torch import Tensor, nn
from torch.ao.nn.intrinsic.qat import freeze_bn_stats
from torch.ao.quantization import disable_observer, get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import fxqfix
from fxqfix._torch import quantized_engine, quiet
from fxqfix.engines import _paths

ENGINE, ISA = "onednn", "vnni"


def conv(a: int, b: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    found = nn.Conv2d(a, b, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [found, nn.BatchNorm2d(b)]


class Basic(nn.Module):
    """A block of ResNet-18."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv(a, b, 3, stride), nn.ReLU(), *conv(b, b))
        self.short = nn.Sequential(*conv(a, b, 1, stride)) if stride > 1 else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.short(x))


def resnet18() -> nn.Module:
    layers: list[nn.Module] = [*conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    sizes = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    for a, b, stride in sizes:
        layers += [Basic(a, b, stride), Basic(b, b, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


class Inverted(nn.Module):
    """A block of MobileNetV2."""

    def __init__(self, a: int, b: int, stride: int, wider: int) -> None:
        super().__init__()
        wide = a * wider
        expand = [*conv(a, wide, 1), nn.ReLU6()] if wider > 1 else []
        depth = [*conv(wide, wide, 3, stride, wide), nn.ReLU6()]
        self.body = nn.Sequential(*expand, *depth, *conv(wide, b, 1))
        self.residual = stride == 1 and a == b

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def mobilenet_v2() -> nn.Module:
    layers: list[nn.Module] = [*conv(3, 32, 3, 2), nn.ReLU6()]
    rows = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1)]
    rows += [(6, 160, 3, 2), (6, 320, 1, 1)]
    inputs = 32
    for wider, outputs, count, stride in rows:
        for index in range(count):
            layers.append(Inverted(inputs, outputs, 1 if index else stride, wider))
            inputs = outputs
    layers += [*conv(320, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(1280, 1000))


NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "resnet18": resnet18,
    "mobilenet_v2": mobilenet_v2,
}


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def medians(
    functions: Mapping[str, Callable[[], Any]], device: str, rounds: int
) -> dict[str, float]:
    """Milliseconds of each, interleaved, after two rounds that don't count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 2):
        for name, function in functions.items():
            wait(device)
            start = time.perf_counter()
            function()
            wait(device)
            if round_ > 1:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(found) for name, found in seconds.items()}


def forward(model: Callable[..., Any], x: Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return model(x)

    return run


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)

    def run() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return run


def measure(name: str, device: str, batch: int, size: int, rounds: int) -> dict[str, Any]:
    """The figures of one net."""
    torch.manual_seed(0)
    x = torch.rand(batch, 3, size, size)
    net = NETWORKS[name]().train()
    prepared = prepare_qat_fx(net, get_default_qat_qconfig_mapping("fbgemm"), (x[:2],)).to(device)
    there = x.to(device)
    with torch.no_grad():
        prepared(there)
    prepared.apply(disable_observer).eval()
    plain = copy.deepcopy(net).to(device).eval()
    int8 = fxqfix.to_int8(prepared, engine=ENGINE)
    emulated = fxqfix.emulate(int8, engine=ENGINE, isa=ISA, threads=1)
    wanted = forward(emulated, x[:1])()
    emulated = copy.deepcopy(emulated).to(device)
    _paths._PROVEN.clear()
    found = forward(emulated, there)()
    forms = {
        "fp32": forward(plain, there),
        "prepared": forward(prepared, there),
        "emulated": forward(emulated, there),
    }
    if device.startswith("cuda"):
        forms["fp32, compiled"] = forward(torch.compile(plain), there)
        forms["emulated, compiled"] = forward(torch.compile(emulated), there)
    times = medians(forms, device, rounds)
    same = {"emulated": bool(torch.equal(found[:1].cpu(), wanted))}
    if "emulated, compiled" in forms:
        same["compiled"] = bool(torch.equal(forms["emulated, compiled"](), found))
    training = copy.deepcopy(prepared).train().apply(freeze_bn_stats)
    model = fxqfix.as_deployed(prepared, engine=ENGINE, isa=ISA, threads=1)
    steps = {"prepared": step(training, there), "as deployed": step(model, there)}
    times_of_step = medians(steps, device, max(2, rounds // 3))
    there_again = fxqfix.emulate(
        fxqfix.to_int8(model, engine=ENGINE), engine=ENGINE, isa=ISA, threads=1
    ).to(device)
    same["as deployed"] = bool(torch.equal(forward(model, there)(), forward(there_again, there)()))
    proofs = list(_paths._PROVEN.values())
    return {
        "net": name,
        "ms": times,
        "ms of a step": times_of_step,
        "emulated / fp32": times["emulated"] / times["fp32"],
        "compiled / fp32": times.get("emulated, compiled", float("nan")) / times["fp32"],
        "step / prepared step": times_of_step["as deployed"] / times_of_step["prepared"],
        "equal": same,
        "proofs": f"{sum(proofs)} of {len(proofs)} fast paths proved exact",
    }


def main() -> int:
    """Measure both nets; 1 where a code differs."""
    parser = argparse.ArgumentParser(description="Speed of the deployed integers on a GPU.")
    parser.add_argument("--json", type=Path, help="write the results there, too")
    parser.add_argument("--quick", action="store_true", help="try the script, on the CPU too")
    given = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu and not given.quick:
        print("torch sees no GPU; --quick tries this script on the CPU")
        return 2
    device, sizes = ("cuda:0" if gpu else "cpu"), ((2, 32, 2) if given.quick else (32, 224, 15))
    warnings.simplefilter("ignore")
    rows = []
    with quantized_engine(ENGINE), quiet():
        for name in NETWORKS:
            rows.append(measure(name, device, *sizes))
            print(json.dumps(rows[-1], indent=1), flush=True)
    result = {**(machine(device) if gpu else {"gpu": "none"}), "rows": rows}
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(not all(all(row["equal"].values()) for row in rows))


if __name__ == "__main__":
    sys.exit(main())

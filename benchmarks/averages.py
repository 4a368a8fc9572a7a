"""Cost of to_int8's exact averages: its forward with averages="exact" over that with "kernel".

python benchmarks/averages.py
"""

from __future__ import annotations

import functools

import _common
import torch
from torch import Tensor, fx, nn

from fxqfix import certificate_of, to_int8

SIZES = (32, 64)


def pooled() -> nn.Module:
    """Four convolutions, an average pool behind each: the most that averages can cost."""
    layers: list[nn.Module] = []
    for a, b in ((3, 16), (16, 32), (32, 64)):
        layers += [*_common._conv_bn(a, b, 3), nn.ReLU(), nn.AvgPool2d(2)]
    layers += [*_common._conv_bn(64, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10))


def forward(model: fx.GraphModule, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def main() -> None:
    _common.settle()
    for network, make in {**_common.NETWORKS, "a pool behind each": pooled}.items():
        prepared = _common.prepare(make(), torch.rand(8, 3, 32, 32))
        forms = {name: to_int8(prepared, averages=name) for name in ("kernel", "exact")}
        routed = len(certificate_of(forms["exact"]).routed)
        for size in SIZES:
            x = torch.rand(8, 3, size, size)
            calls = {name: functools.partial(forward, m, x) for name, m in forms.items()}
            found = _common.medians(calls, 101)
            print(
                f"{network}, {routed} averages, {size}x{size}: {1000 * found['kernel']:.2f} -> "
                f"{1000 * found['exact']:.2f} ms, {found['exact'] / found['kernel']:.3f}x"
            )


if __name__ == "__main__":
    main()

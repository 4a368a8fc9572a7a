"""Cost of to_int8's clamps: the int8 forward of to_int8 against that of convert_fx.

python benchmarks/restore_range.py
"""

from __future__ import annotations

import functools

import _common
import torch
from torch import Tensor, fx

from fxqfix import certificate_of, compare, freeze, to_int8

LIMITS = {"resnet-like": 1.05, "mobilenet-like": 1.08}
SIZES = (32, 64)  # of the images: with small ones it is the calls that cost


def forward(model: fx.GraphModule, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def out_of_range(prepared: fx.GraphModule, model: fx.GraphModule, x: Tensor) -> int:
    report = compare(freeze(prepared), model, [3 * x], noise_floor=False, attribute=False)
    return sum(row.local.out_of_range for row in report.rows)


def main() -> None:
    _common.settle()
    for network, make in _common.NETWORKS.items():
        x = torch.rand(8, 3, 32, 32)
        prepared = _common.prepare(make(), x)
        forms = {
            "convert_fx": _common.convert(prepared),
            "to_int8": to_int8(prepared, averages="kernel"),
        }
        ranges = certificate_of(forms["to_int8"]).ranges
        outside = {name: out_of_range(prepared, model, x) for name, model in forms.items()}
        print(f"{network}: {len(ranges)} ranges, {sum(r.clamped for r in ranges)} clamps")
        print(f"  codes out of range at 3x: {outside}")
        for size in SIZES:
            images = torch.rand(8, 3, size, size)
            calls = {name: functools.partial(forward, m, images) for name, m in forms.items()}
            found = _common.medians(calls, 101)
            ratio = found["to_int8"] / found["convert_fx"]
            print(
                f"  {size}x{size}: {1000 * found['convert_fx']:.1f} -> "
                f"{1000 * found['to_int8']:.1f} ms, {ratio:.3f}x (at most {LIMITS[network]}x)"
            )


if __name__ == "__main__":
    main()

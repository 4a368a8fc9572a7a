"""Time over the number of layers: is it about linear?

python benchmarks/scaling.py [LAYERS ...]
"""

from __future__ import annotations

import functools
import math
import sys

import _common
import torch

from fxqfix import compare, freeze, inspect, to_decomposed


def measure(layers: int) -> dict[str, float]:
    x = torch.rand(2, 4, 8, 8)
    prepared = _common.prepare(_common.chain(layers), x)
    converted = _common.convert(prepared)
    calls = {
        "convert_fx": functools.partial(_common.convert, prepared),
        "inspect": functools.partial(inspect, prepared),
        "freeze": functools.partial(freeze, prepared),
        "to_decomposed": functools.partial(to_decomposed, prepared),
        "compare": functools.partial(compare, prepared, converted, [x], progress=False),
    }
    return _common.medians(calls, repeats=3)


def main(counts: list[int]) -> None:
    _common.settle()
    found = {layers: measure(layers) for layers in counts}
    names = list(found[counts[0]])
    print(f"{'layers':>8}" + "".join(f"{name:>24}" for name in names))
    for layers, seconds in found.items():
        cells = (f"{s:.2f} s, {1000 * s / layers:5.1f} ms each" for s in seconds.values())
        print(f"{layers:8}" + "".join(f"{cell:>24}" for cell in cells))
    print(f"{'exponent':>8}" + "".join(f"{_exponent(found, name):>24.2f}" for name in names))


def _exponent(found: dict[int, dict[str, float]], name: str) -> float:
    """Of the power law between the last two counts: 1 is linear, 2 quadratic."""
    (a, first), (b, last) = list(found.items())[-2:]
    return math.log(last[name] / first[name]) / math.log(b / a)


if __name__ == "__main__":
    main([int(n) for n in sys.argv[1:]] or [10, 30, 100, 300])

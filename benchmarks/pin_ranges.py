"""Cost of the clamps that keep the range: the decomposed forward with and without them.

python benchmarks/pin_ranges.py
"""

from __future__ import annotations

import functools

import _common
import torch
from torch import Tensor, fx

from fxqfix import to_decomposed


def forward(model: fx.GraphModule, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def main() -> None:
    _common.settle()
    x = torch.rand(8, 3, 32, 32)
    for network, make in _common.NETWORKS.items():
        prepared = _common.prepare(make(), x)
        forms = {
            "prepared": prepared,
            "convert_fx": _common.convert(prepared),
            "plain": to_decomposed(prepared, pin_ranges=False),
            "pinned": to_decomposed(prepared),
        }
        found = _common.medians(
            {name: functools.partial(forward, model, x) for name, model in forms.items()}, 21
        )
        same = torch.equal(forward(forms["plain"], 2 * x), forward(forms["pinned"], 2 * x))
        print(
            f"{network}: pinned / plain {found['pinned'] / found['plain']:.3f}x, same bits: {same}"
        )
        for name, seconds in found.items():
            print(f"  {name:11} {1000 * seconds:6.1f} ms, {seconds / found['plain']:.2f}x of plain")


if __name__ == "__main__":
    main()

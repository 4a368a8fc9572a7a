"""Cost of lint: milliseconds for a model of about 100 sites, and over one forward of it.

python benchmarks/lint.py
"""

from __future__ import annotations

import functools

import _common
import torch

from fxqfix import freeze, lint


def main() -> None:
    _common.settle()
    x = torch.rand(2, 4, 8, 8)
    trained = _common.prepare(_common.chain(50), x)
    for name, model in {"as trained": trained, "frozen": freeze(trained)}.items():
        functions = {
            "lint": functools.partial(lint, model, engine="fbgemm"),
            "forward": functools.partial(model, x),
        }
        with torch.no_grad():
            found = _common.medians(functions, 15)
        sites = lint(model, engine="fbgemm").sites
        print(f"{name}, {sites} sites: lint / forward {found['lint'] / found['forward']:.2f}x")
        for what, seconds in found.items():
            print(f"  {what:8} {1000 * seconds:6.1f} ms")


if __name__ == "__main__":
    main()

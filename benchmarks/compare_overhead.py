"""Cost of compare: time over the two forwards that it replaces, and peak memory over batches.

python benchmarks/compare_overhead.py
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import _common
import torch
from torch import Tensor, fx

from fxqfix import compare, freeze

BATCH, SIZE = 8, 32
VARIANTS = {
    "full": {},
    "attribute=False": {"attribute": False},
    "noise_floor=False": {"noise_floor": False},
}
MORE = 3


def batches(count: int) -> Iterator[Tensor]:
    """Random images, made when they are asked for."""
    for seed in range(count):
        yield torch.rand(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def models(network: str, frozen: bool) -> tuple[fx.GraphModule, fx.GraphModule]:
    prepared = _common.prepare(_common.NETWORKS[network](), next(batches(1)))
    prepared = freeze(prepared) if frozen else prepared
    return prepared, _common.convert(prepared)


def forwards(prepared: fx.GraphModule, converted: fx.GraphModule) -> None:
    with torch.no_grad():
        for x in batches(MORE):
            prepared(x)
            converted(x)


def times(network: str, frozen: bool) -> None:
    prepared, converted = models(network, frozen)
    calls = {"forwards": functools.partial(forwards, prepared, converted)}
    variants = {"full": {}} if frozen else VARIANTS
    for name, options in variants.items():
        for count in (1, 1 + MORE):
            calls[f"{name} {count}"] = functools.partial(
                _run, prepared, converted, count, **options
            )
    found = _common.medians(calls, repeats=3)
    forward = found["forwards"] / MORE
    state = "frozen, few codes differ" if frozen else "as trained"
    print(f"\n{network}, {state}: both forwards {1000 * forward:.0f} ms a batch")
    for name in variants:
        batch = (found[f"{name} {1 + MORE}"] - found[f"{name} 1"]) / MORE
        start = found[f"{name} 1"] - batch
        print(
            f"  {name:18} {batch / forward:5.2f}x a batch, {start:.2f} s before the first",
            flush=True,
        )


def _run(prepared: fx.GraphModule, converted: fx.GraphModule, count: int, **options: bool) -> None:
    compare(prepared, converted, batches(count), progress=False, **options)


def peak(network: str, count: int) -> int:
    """Peak memory in KiB of a process that compares so many batches."""
    command = [sys.executable, __file__, network, str(count)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(output.splitlines()[-1])


def high_water() -> int:
    """Peak memory of this process in KiB (Linux).

    Not getrusage: its maximum begins with that of the process that started this one.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0])


def main() -> None:
    for network in _common.NETWORKS:
        for frozen in (False, True):
            times(network, frozen)
    print("\npeak memory of the process")
    for network in _common.NETWORKS:
        found = {count: peak(network, count) for count in (0, 1, 8, 32)}
        first = found[1]
        for count, kib in found.items():
            print(f"  {network:15} {count:2} batches {kib / 1024:7.1f} MiB {kib / first:.3f}x")


if __name__ == "__main__":
    _common.settle()
    if len(sys.argv) == 1:
        main()
    else:
        pair = models(sys.argv[1], frozen=False)
        if int(sys.argv[2]):
            _run(*pair, int(sys.argv[2]))
        print(high_water())

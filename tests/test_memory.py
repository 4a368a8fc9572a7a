"""Nothing but numbers outlives a batch: peak memory does not depend on how many there are."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fxqfix
from fxqfix.passes import InsertShadows
from tests.faults.injectors import SHAPE, trained

CHILD = """
import copy, json, resource, sys, warnings
warnings.simplefilter("ignore")
import torch
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx
import fxqfix
torch.manual_seed(0)
torch.set_num_threads(1)
torch.backends.quantized.engine = "fbgemm"
layers = []
for i in range(3):
    layers += [nn.Conv2d(16 if i else 3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
x = torch.randn(8, 3, 24, 24)
prepared = prepare_qat_fx(nn.Sequential(*layers).train(), get_default_qat_qconfig_mapping(), (x,))
prepared(x)
prepared.eval()
converted = convert_fx(copy.deepcopy(prepared))
def peak(batches):
    generator = torch.Generator().manual_seed(1)
    data = (torch.randn(8, 3, 24, 24, generator=generator) for _ in range(batches))
    report = fxqfix.compare(prepared, converted, data)
    assert report.batches == batches and report.causes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([peak(1), peak(32)]))
"""


@pytest.mark.slow
def test_peak_memory_is_the_same_for_1_and_for_32_batches() -> None:
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    one, many = json.loads(done.stdout)
    assert many <= 1.05 * one, f"{one} KiB with 1 batch, {many} KiB with 32"


class Meter(TorchDispatchMode):
    """Adds up the bytes of all storages that are alive, after every op; keeps the peak.

    The dead are only counted out when the sum with them would be a new peak: no peak is missed,
    and the cost is not (ops x storages).
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                ref = StorageWeakRef(storage)
                self.bytes += storage.nbytes() - self.alive.get(ref.cdata, (None, 0))[1]
                self.alive[ref.cdata] = (ref, storage.nbytes())
        if self.bytes > self.peak:
            self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
            self.bytes = sum(size for _, size in self.alive.values())
            self.peak = max(self.peak, self.bytes)
        return out


def metered(run: Callable[[], Any]) -> int:
    gc.collect()
    with Meter() as meter:
        run()
    return meter.peak


def layers_deep(depth: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(8 if i else 3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    mapping = get_default_qat_qconfig_mapping("fbgemm")
    prepared = prepare_qat_fx(nn.Sequential(*layers).train(), mapping, (images(1)[0],))
    prepared(images(1)[0])
    prepared.eval()
    return prepared, convert_fx(copy.deepcopy(prepared))


def images(count: int) -> list[torch.Tensor]:
    return [torch.randn(8, 3, 16, 16) for _ in range(count)]


@pytest.mark.parametrize("kind", ["int8", "decomposed"])
def test_bytes_alive_do_not_depend_on_the_number_of_batches(kind: str) -> None:
    """Counted to the byte, model and report included: 1 batch against 4."""
    prepared, converted = layers_deep(4)
    if kind == "decomposed":
        converted = fxqfix.to_decomposed(prepared)
    fxqfix.compare(prepared, converted, images(1))  # kernels are probed once in a process
    # The batches come from a generator that makes them outside of the meter's sight.
    one, many = (
        metered(lambda n=n: fxqfix.compare(prepared, converted, images(n))) - 4 * 8 * 3 * 256 * n
        for n in (1, 4)
    )
    assert many <= 1.05 * one
    assert one <= 1.05 * many


def test_the_meter_sees_a_leak() -> None:
    """A probe that keeps its tensors is what the test above would catch."""
    prepared, converted = layers_deep(6)
    kept: list[Any] = []

    class Hoarder(nn.Module):
        def forward(self, *values: Any) -> None:
            kept.append(values)

    def leak(count: int) -> int:
        kept.clear()
        twin = InsertShadows(prepared, lambda _: Hoarder())(converted).graph_module
        with torch.no_grad():
            return metered(lambda: [twin(x) for x in images(count)])

    assert leak(4) > 2 * leak(1)


def test_a_tensor_dies_at_its_last_use() -> None:
    """Twice the layers, the same peak but for their weights: nothing waits for the batch's end."""
    activation = 4 * 8 * 8 * 256  # one float activation of one branch, in bytes
    batch = images(1)
    peaks, weights = [], []
    for depth in (4, 8):
        prepared, converted = layers_deep(depth)
        weights.append(sum(p.numel() * 4 for p in prepared.parameters()))
        peaks.append(metered(lambda p=prepared, c=converted: fxqfix.compare(p, c, batch)))
    # 4 layers have 4 activations in each of five branches; copies of the models are allowed.
    assert peaks[1] - peaks[0] < 8 * (weights[1] - weights[0]) + activation


def test_no_batch_is_kept_alive_and_each_is_read_once() -> None:
    prepared = trained()
    alive: list[weakref.ref[torch.Tensor]] = []
    reads = 0

    def batches() -> Iterator[torch.Tensor]:
        nonlocal reads
        for _ in range(4):
            reads += 1
            gc.collect()
            # The one being processed is still held by the loop that asks for the next.
            assert sum(ref() is not None for ref in alive) <= 1
            batch = torch.randn(SHAPE)
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    report = fxqfix.compare(prepared, fxqfix.to_decomposed(prepared), batches(), progress=False)
    gc.collect()
    assert reads == report.batches == 4
    assert not [ref for ref in alive if ref() is not None]

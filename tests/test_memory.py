"""Nothing but numbers outlives a batch: peak memory does not depend on how many there are."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch

import fxqfix
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
for i in range(20):
    layers += [nn.Conv2d(16 if i else 3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
x = torch.randn(8, 3, 48, 48)
prepared = prepare_qat_fx(nn.Sequential(*layers).train(), get_default_qat_qconfig_mapping(), (x,))
prepared(x)
prepared.eval()
converted = convert_fx(copy.deepcopy(prepared))
def peak(batches):
    generator = torch.Generator().manual_seed(1)
    data = (torch.randn(8, 3, 48, 48, generator=generator) for _ in range(batches))
    report = fxqfix.compare(prepared, converted, data)
    assert report.batches == batches and report.causes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([peak(1), peak(32)]))
"""


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

"""int16 saturation against the real kernels, with the instruction set capped to AVX2.

The cap has to be in the environment before the process starts, so every case runs in one child
process; on a machine without VNNI the cap changes nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn

from fxqfix import emulate
from fxqfix._torch import quantized_engine, quiet
from fxqfix.dialects.weights import WeightView
from fxqfix.engines import Call, isa_of, saturation_possible
from fxqfix.qparams import QParams

CAPS = {"FBGEMM_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}

# The kernel for small groups looks at the CPU, not at the cap.
CAPPED = replace(isa_of("avx2"), cpu=isa_of(None).cpu)

# input channels, output channels, kernel, stride, padding, dilation, groups, input zero point.
# 4 input channels in each of 3 groups crash fbgemm itself on AVX2 (heap corruption, torch 2.13).
CASES = [
    (3, 8, 3, 1, 0, 1, 1, 0),
    (3, 8, 3, 1, 1, 1, 1, 65),
    (8, 16, 3, 2, 1, 1, 1, 30),
    (16, 16, 1, 1, 0, 1, 1, 10),
    (16, 16, 3, 1, 1, 1, 4, 10),
    (5, 7, 2, 1, 1, 2, 1, 128),
]

CHILD = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
import torch.ao.nn.quantized as nnq
torch.set_num_threads(1)
engine, cases = sys.argv[1], json.loads(sys.argv[2])
torch.backends.quantized.engine = engine
found = []
for cin, cout, k, s, p, d, g, zx in cases:
    gen = torch.Generator().manual_seed(cin * 100 + cout)
    w = torch.randint(-128, 128, (cout, cin // g, k, k), generator=gen)
    hot = torch.rand(w.shape, generator=gen) < 0.7
    sign = torch.arange(cout).reshape(-1, 1, 1, 1) % 2 * 2 - 1
    w = torch.where(hot, 120 * sign, w)
    x = torch.randint(150, 256, (2, cin, 9, 9), generator=gen, dtype=torch.uint8)
    conv = nnq.Conv2d(cin, cout, k, s, p, d, g)
    conv.set_weight_bias(torch._make_per_tensor_quantized_tensor(w.to(torch.int8), 0.5, 0), None)
    # Powers of two: requantization is exact, ties round to even as torch.round does.
    conv.scale, conv.zero_point = 2.0 ** 11, 128
    y = conv(torch._make_per_tensor_quantized_tensor(x, 0.5, zx)).int_repr()
    found.append([w.tolist(), x.tolist(), y.tolist()])
print(json.dumps(found))
"""


def _kernel_codes(engine: str) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(weight, input, output codes) of every case, from the capped kernel."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, engine, json.dumps(CASES)],
        env={**os.environ, **CAPS},
        capture_output=True,
        text=True,
        check=True,
    )
    return [tuple(torch.tensor(t) for t in case) for case in json.loads(done.stdout)]


class Conv(nn.Module):
    """The layer of one case, as the child process has it."""

    def __init__(self, case: tuple[int, ...], weight: Tensor) -> None:
        super().__init__()
        cin, cout, k, s, p, d, g, self.zx = case
        self.conv = nnq.Conv2d(cin, cout, k, s, p, d, g)
        make = torch._make_per_tensor_quantized_tensor
        self.conv.set_weight_bias(make(weight.to(torch.int8), 0.5, 0), None)
        self.conv.scale, self.conv.zero_point = 2.0**11, 128

    def forward(self, x: Tensor) -> Any:
        return self.conv(torch.quantize_per_tensor(x, 0.5, self.zx, torch.quint8))


@pytest.mark.parametrize("engine", ["fbgemm", "onednn"])
def test_emulation_gives_the_codes_of_the_capped_kernels(engine: str) -> None:
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this torch has no engine {engine}")
    missed_by_exact = 0
    for case, (w, x, y) in zip(CASES, _kernel_codes(engine), strict=True):
        values = (x.int() - case[-1]) * 0.5
        with quantized_engine(engine), quiet():
            layer = Conv(case, w)
            capped, exact = (emulate(layer, engine=engine, isa=isa) for isa in (CAPPED, "vnni"))
            assert torch.equal(capped(values).int(), y.int()), case
            missed_by_exact += int((exact(values).int() != y.int()).sum())
    assert missed_by_exact > 0  # the inputs are hot enough to saturate at all


@pytest.mark.parametrize("engine", ["fbgemm", "onednn"])
def test_the_bound_is_sound_and_tight(engine: str) -> None:
    """No input saturates where the bound says so; one more step of a weight, and one does."""
    for weights, pairs in (((64, 64), 0), ((65, 64), 1), ((-64, -64), 0), ((-65, -64), 1)):
        codes = torch.tensor([[*weights, 127, -128]], dtype=torch.int8)
        grid = QParams(1.0, 0, -128, 127, torch.qint8)
        source = QParams(1.0, 0, 0, 255, torch.quint8)
        call = Call("n", engine, "linear", qparams=(source,), isa=isa_of("avx2"))
        assert saturation_possible(replace(call, weight=WeightView(codes, grid))) == pairs
        products = 255 * sum(weights)
        assert (not -(2**15) <= products < 2**15) == bool(pairs)

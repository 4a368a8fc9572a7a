"""int16 saturation against the real kernels, with the instruction set capped to AVX2.

The cap has to be in the environment before the process starts, so every case runs in one child
process; on a machine without VNNI the cap changes nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fxqfix.engines import Geometry, saturated_sums

CAPS = {"FBGEMM_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}

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


def _codes(sums: torch.Tensor, zx: int, weight: torch.Tensor) -> torch.Tensor:
    """Requantize (N, O, H, W) raw sums: symmetric weights, all scales powers of two."""
    corrected = sums - zx * weight.sum((1, 2, 3)).reshape(1, -1, 1, 1)
    return (torch.round(corrected.double() * 2.0**-13) + 128).clamp(0, 255)


@pytest.mark.parametrize("engine", ["fbgemm", "onednn"])
def test_pair_sums_are_the_capped_kernels(engine: str) -> None:
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this torch has no engine {engine}")
    missed_by_exact = 0
    for case, (w, x, y) in zip(CASES, _kernel_codes(engine), strict=True):
        _, _, _, s, p, d, g, zx = case
        geometry = Geometry((s, s), (p, p), (d, d), g)
        at = torch.ones_like(y).nonzero()
        sums, _, _ = saturated_sums(x, zx, w, geometry, at, by_channel=engine == "onednn")
        assert torch.equal(_codes(sums.reshape(y.shape), zx, w), y.double()), case
        padded = F.pad(x.double(), (p, p, p, p), value=zx)
        exact = F.conv2d(padded, w.double(), None, s, 0, d, g)
        missed_by_exact += int((_codes(exact, zx, w) != y).sum())
    assert missed_by_exact > 0  # the inputs are hot enough to saturate at all


def test_without_overflow_the_sums_are_exact() -> None:
    x = torch.randint(0, 128, (2, 6, 5, 5), dtype=torch.uint8)
    w = torch.randint(-128, 128, (4, 3, 3, 3), dtype=torch.int8)
    geometry = Geometry((2, 1), (1, 0), (1, 1), 2)
    wanted = F.conv2d(F.pad(x.double(), (0, 0, 1, 1), value=7), w.double(), None, (2, 1), 0, 1, 2)
    at = torch.ones_like(wanted).nonzero()
    for by_channel in (False, True):
        sums, activations, saturated = saturated_sums(x, 7, w, geometry, at, by_channel=by_channel)
        assert torch.equal(sums.reshape(wanted.shape), wanted.long())
        assert not saturated.any()
        ones = torch.ones_like(w).double()
        padded = F.pad(x.double(), (0, 0, 1, 1), value=7)
        plain = F.conv2d(padded, ones, None, (2, 1), 0, 1, 2)
        assert torch.equal(activations.reshape(wanted.shape), plain.long())


def test_nothing_asked_for() -> None:
    x, w = torch.zeros(1, 1, 1, 1, dtype=torch.uint8), torch.zeros(1, 1, 1, 1, dtype=torch.int8)
    none = torch.zeros(0, 4, dtype=torch.int64)
    sums, activations, _ = saturated_sums(x, 0, w, Geometry(), none, by_channel=False)
    assert sums.shape == activations.shape == (0,)

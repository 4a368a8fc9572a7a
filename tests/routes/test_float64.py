"""Route float64: what the graph's own float32 arithmetic rounds otherwise than exact arithmetic."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxqfix import certify
from tests.routes import nets

OPS = torch.ops.quantized_decomposed
GRID = (1.0, 0, -128, 127, torch.int8)
WIDE = 2.0**24  # from here on float32 has no odd numbers


class Absorbs(nn.Module):
    """x, but for what float32 loses: ``(x * 2**24 + x) - x * 2**24``."""

    def forward(self, x: Tensor) -> Tensor:
        x = OPS.dequantize_per_tensor(OPS.quantize_per_tensor(x, *GRID), *GRID)
        y = (x * WIDE + x) - x * WIDE
        return OPS.dequantize_per_tensor(OPS.quantize_per_tensor(y, *GRID), *GRID)


def test_it_counts_what_float32_loses() -> None:
    codes = np.arange(-128, 128)
    found = certify(fx.symbolic_trace(Absorbs()), "float64", [torch.from_numpy(codes).float()])
    x = codes.astype(np.float32)
    wide = x * np.float32(WIDE)
    wanted = np.clip(np.rint((wide + x) - wide), -128, 127)
    assert found.differing == np.count_nonzero(wanted != codes) > 0
    assert found.sites[0].found.differing == 0  # the input: quantized by the graph's own op
    assert found.max_lsb == np.abs(wanted - codes).max()
    assert dict(found.causes) == {"rounding": found.differing}


def test_a_healthy_network_has_a_low_floor() -> None:
    found = certify(nets.decomposed("mobile"), "float64", nets.batches())
    assert set(found.causes) <= {"rounding"}
    assert found.out_of_range == 0
    assert found.max_lsb <= 1
    elements = sum(site.found.elements for site in found.sites)
    # The reason for a bound: a code of 127 steps is within float32 rounding (a few 2**-24 of the
    # value) of a tie for about one value in 10,000 at most; measured are 2 of 126,888.
    assert found.differing <= 1e-4 * elements

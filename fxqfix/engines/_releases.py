"""Which release of oneDNN this torch has, told by what its kernels do.

Builds of torch bring releases of their own; each is named by the first one that does so:

* 3.5 (torch 2.6): every kernel joins the scales.
* 3.10 (torch 2.11): the transposed convolutions' own kernel joins them, and the matrix product that
  takes what is left.
* 3.12 (torch 2.13): that of the rows in `onednn`.
* 3.13 (torch 2.15): linear on a zero point runs the reference, and transposed convolutions with a
  stride have one kernel more.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxqfix import _rng, _torch
from fxqfix._settings import entry
from fxqfix.engines._arithmetic import single

__all__ = ["joins_one_row", "release"]

_SCALE, _INPUT = 0.0391, 0.0599  # a fiftieth of the sums tells the three ways apart
_OUTPUT = _INPUT * _SCALE * 2  # every second sum is a tie


@functools.cache
@entry
def release() -> str:
    """Return "3.5", "3.10", "3.12" or "3.13"; 3.12 where this torch has no oneDNN."""
    if "onednn" not in torch.backends.quantized.supported_engines:
        return "3.12"
    with _torch.quiet(), _rng.same_rng(), torch.no_grad(), _torch.quantized_engine("onednn"):
        if _matrix_product() == "joined":
            return "3.5" if joins_one_row() else "3.10"
        return "3.13" if _linear(64, 64, 3) == "reference" else "3.12"


def joins_one_row() -> bool:
    """Whether linear joins the scales of one row of 16 inputs, which AMX leaves to VNNI."""
    return _linear(1, 16, 0) == "joined"


def _codes(*shape: int) -> Tensor:
    return torch.randint(0, 13, shape, generator=torch.Generator().manual_seed(len(shape)))


def _weight(codes: Tensor) -> Tensor:
    return torch.quantize_per_tensor(codes * single(_SCALE), _SCALE, 0, torch.qint8)


def _input(codes: Tensor, point: int) -> Tensor:
    return torch.quantize_per_tensor((codes - point) * single(_INPUT), _INPUT, point, torch.quint8)


def _matrix_product() -> str:
    """Of a transposed convolution that no other kernel takes: its padding exceeds the kernel."""
    x, w = _codes(1, 8, 17, 19), _codes(8, 8, 1, 1) - 6
    ops: Any = torch.ops.quantized
    packed = ops.conv_transpose2d_prepack(_weight(w), None, [1, 1], [1, 1], [0, 0], [1, 1], 1)
    found = ops.conv_transpose2d(_input(x, 0), packed, _OUTPUT, 128)
    return _kind(found, F.conv_transpose2d(x.double(), w.double(), padding=1), single(_SCALE))


def _linear(rows: int, inputs: int, point: int) -> str:
    x, w = _codes(rows, inputs), _codes(1024, inputs) - 6
    ops: Any = torch.ops.quantized
    found = ops.linear(_input(x, point), ops.linear_prepack(_weight(w), None), _OUTPUT, 128)
    return _kind(found, (x - point).double() @ w.double().T, _there_and_back(_SCALE))


def _there_and_back(scale: float) -> float:
    return single(1.0 / single(1.0 / scale))


def _kind(found: Tensor, sums: Tensor, b: float) -> str:
    """How a kernel scales sums: "joined", "separate", "reference", or "" for none of these."""
    a, output = _there_and_back(_INPUT), _there_and_back(_OUTPUT)
    apart = (sums.float() * a) * b
    kinds = {
        "joined": (sums.float() * single(a * b)) * single(1.0 / output),
        "separate": apart * single(1.0 / output),
        "reference": apart / output,
    }
    codes = {n: (p + 128).round().clamp(0, 255).to(torch.uint8) for n, p in kinds.items()}
    return next((name for name, own in codes.items() if torch.equal(own, found.int_repr())), "")

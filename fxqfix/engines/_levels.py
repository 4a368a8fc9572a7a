"""Which levels this process runs: the kernels themselves are asked, so that caps count.

oneDNN's five differ in whether pairs of products saturate and in how two scales are rounded
together: two linear layers tell four of them apart, a grouped convolution AVX2-VNNI from
AVX512-VNNI. Each probe leaves random state and torch.backends.quantized.engine as they were.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxqfix import _rng, _torch
from fxqfix.engines._arithmetic import single
from fxqfix.engines._releases import release

__all__ = ["aten", "fbgemm", "onednn"]

_X86 = ("x86_64", "amd64", "i386", "i686")
_ONEDNN = {
    (True, "joined"): "avx2",
    (True, "separate"): "avx512",
    (False, "separate"): "vnni",
    (False, "joined"): "amx",
}


def _asked(engine: str, probe: Callable[[], str]) -> str:
    if platform.machine().lower() not in _X86:
        return "unknown"
    if engine not in torch.backends.quantized.supported_engines:
        return "unknown"
    with _torch.quiet(), _rng.same_rng(), torch.no_grad(), _torch.quantized_engine(engine):
        return probe()


def onednn() -> str:
    """OneDNN's level."""
    return _asked("onednn", _onednn)


def fbgemm() -> str:
    """Fbgemm's level; AVX512 without VNNI computes what AVX2 does."""
    return _asked("fbgemm", lambda: "avx2" if _saturates() else "vnni")


def aten() -> str:
    """The width of ATen's vectors."""
    found = torch.backends.cpu.get_cpu_capability().lower()
    return {"no avx": "default"}.get(found, found) if found in _ATEN else "unknown"


_ATEN = ("default", "no avx", "avx2", "avx512")
_SCALE = 0.0123


def _weight(codes: Tensor) -> Tensor:
    """A weight of these codes."""
    return torch.quantize_per_tensor(codes * single(_SCALE), _SCALE, 0, torch.qint8)


def _dynamic(codes: Tensor, x: Tensor) -> Tensor:
    ops: Any = torch.ops.quantized
    found: Tensor = ops.linear_dynamic(x, ops.linear_prepack(_weight(codes), None), False)
    return found


def _saturates() -> bool:
    """Whether 64 products of the hottest codes come out short."""
    found = _dynamic(torch.full((64, 64), 127.0), torch.ones(64, 64))
    return bool((found - 64 * 127 * _SCALE).abs().max() > 1)


def _there_and_back(scale: float) -> float:
    return 1.0 / single(1.0 / scale)


def _onednn() -> str:
    codes = (torch.arange(4096) % 7 - 3).reshape(64, 64).float()
    x = (torch.arange(4096) % 256).reshape(64, 64).float()
    found = _dynamic(codes, x * 0.037)
    step = _there_and_back(float((x * 0.037).max()) / 255)
    kind = _rounding(found, (x.double() @ codes.double().T).float(), step)
    level = _ONEDNN.get((_saturates(), kind), "unknown")
    if release() == "3.5":  # its kernels join the scales at every level
        return _old(level)
    return "avx2_vnni" if level == "vnni" and _joins_groups() else level


def _old(level: str) -> str:
    """Where one way of rounding tells no levels apart, the CPU has to; caps it doesn't know."""
    known = {("avx2", "avx2"): "avx2", ("amx", "vnni"): "vnni"}
    return "unknown" if _torch.has_tiles() else known.get((level, _torch.cpu_level()), "unknown")


def _rounding(found: Tensor, sums: Tensor, step: float) -> str:
    """How sums are scaled: "joined" ``A * f(X * W)``, "separate" ``f(A * X) * W``, or ""."""
    a, b = single(step), single(_there_and_back(_SCALE))
    if torch.equal(found, sums * single(a * b)):
        return "joined"
    return "separate" if torch.equal(found, (sums * a) * b) else ""


def _joins_groups() -> bool:
    """Whether a convolution in groups of 4 channels joins the scales, seen on ties."""
    x_scale, scale = 0.037, 0.037 * _SCALE * 2
    codes = (torch.arange(2 * 8 * 81) * 7 % 256).reshape(2, 8, 9, 9)
    weight = (torch.arange(8 * 4 * 9) * 5 % 7 - 3).reshape(8, 4, 3, 3)
    x = torch.quantize_per_tensor(codes * single(x_scale), x_scale, 0, torch.quint8)
    ops: Any = torch.ops.quantized
    packed = ops.conv2d_prepack(_weight(weight.float()), None, [1, 1], [0, 0], [1, 1], 2)
    found = ops.conv2d(x, packed, scale, 128).int_repr()
    sums = F.conv2d(codes.double(), weight.double(), groups=2).float()
    a, b, inverse = single(_there_and_back(x_scale)), single(_SCALE), 1.0 / _there_and_back(scale)

    def codes_of(p: Tensor) -> Tensor:
        return (p * single(inverse) + 128).round().clamp(0, 255).to(torch.uint8)

    joined, apart = codes_of(sums * single(a * b)), codes_of((sums * a) * b)
    return torch.equal(found, joined) and not torch.equal(joined, apart)

"""pad: codes are moved; a constant is quantized once, by `quantize_per_tensor`'s rule."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxqfix.engines._base import Call, Exact, kernel
from fxqfix.engines._layout import suggested
from fxqfix.qparams import quantize_native

__all__ = ["Pad"]

_ALL = ("fbgemm", "onednn", "qnnpack")


class Pad(Exact):
    """Codes with a margin.

    Args:
        margin: Of each side, the last axis first.
        mode: "constant" or "reflect".
        code: The constant's code.
    """

    def __init__(self, margin: list[int], mode: str, code: int) -> None:
        super().__init__()
        self.margin, self.mode, self.code = margin, mode, code

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        if self.mode == "constant":
            return suggested(F.pad(codes, self.margin, value=self.code), codes)
        return F.pad(codes.float().contiguous(), self.margin, mode=self.mode).to(codes.dtype)

    def extra_repr(self) -> str:
        """What is padded."""
        return f"{self.margin}, {self.mode}"


@kernel("pad", engines=_ALL)
def _pad(call: Call) -> nn.Module:
    margin: Any = call.option("padding" if call.module is not None else "pad")
    if isinstance(margin, fx.Node) or any(isinstance(m, fx.Node) for m in margin):
        raise call.refuse("its margin is not a constant")
    mode, value = _filling(call)
    if mode not in ("constant", "reflect"):
        raise call.refuse(f"its kernel has no mode {mode!r}")
    code = quantize_native(torch.tensor([float(value or 0.0)]), call.source, call.point_first)
    return Pad(list(margin), mode, int(code))


def _filling(call: Call) -> tuple[str, float | None]:
    """Mode and value."""
    if call.module is None:
        return call.option("mode", "constant"), call.option("value")
    kind = type(call.module).__name__
    modes = {"Reflection": "reflect", "Replication": "replicate", "Circular": "circular"}
    found = next((mode for name, mode in modes.items() if kind.startswith(name)), "constant")
    return found, call.option("value")

"""The names that options and records take, as types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Union

from torch import nn

if TYPE_CHECKING:
    from torch.ao.quantization import QConfig, QConfigMapping
    from torch.export import ExportedProgram

__all__ = [
    "Averages",
    "Engine",
    "IsaName",
    "PinPlace",
    "RangesFrom",
    "RowKind",
    "Saturation",
    "Severity",
]

Engine = Literal["fbgemm", "x86", "onednn", "qnnpack"]
IsaName = Literal["avx2", "avx2_vnni", "avx512", "vnni", "amx"]
RowKind = Literal["activation", "weight", "output"]
Severity = Literal["error", "warning", "info"]
Saturation = Literal["warn", "island"]
Averages = Literal["exact", "kernel"]
PinPlace = Literal["values", "codes"]
# What declares ranges: a prepared model, or what it was prepared with.
RangesFrom = Union[nn.Module, "ExportedProgram", "QConfigMapping", "QConfig"]

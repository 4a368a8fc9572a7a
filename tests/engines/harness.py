"""Emulated against the real kernel: same codes, same layout, counted."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fxqfix import Isa
from fxqfix._torch import quantized_engine, quiet
from fxqfix.flows.emulate import emulate

ENGINES = ("fbgemm", "x86", "onednn", "qnnpack")
# How `emulate` refuses what no row follows at the level of this process.
AT_THIS_LEVEL = ("no row predicts", "no row says", "no row follows")


# A model's emulations, by their options: most of a comparison's time is making one.
_EMULATED: WeakKeyDictionary[nn.Module, dict[Any, nn.Module]] = WeakKeyDictionary()


def values(
    codes: Tensor, scale: float, zero_point: int, dtype: torch.dtype = torch.quint8
) -> Tensor:
    """Float values that a model's own quantize turns into exactly these codes."""
    make = torch._make_per_tensor_quantized_tensor
    found = make(codes.to(torch.uint8 if dtype == torch.quint8 else torch.int8), scale, zero_point)
    back = found.dequantize()
    again = torch.quantize_per_tensor(back, scale, zero_point, dtype)
    assert torch.equal(again.int_repr(), found.int_repr())
    return back


def differing(
    model: nn.Module, *inputs: Tensor, engine: str, isa: str | Isa | None = None, threads: int = 1
) -> tuple[int, int]:
    """(codes that differ, codes compared) between a model's int8 ops and their emulation.

    The model is a plain module that quantizes its inputs, runs int8 ops and returns a quantized
    tensor (or a tuple of them); shapes, dtypes and strides have to be equal in any case. Emulated
    once: make one model for all its inputs, and change nothing of it (the codes would differ).
    """
    with quantized_engine(engine), torch.no_grad(), quiet():
        made = _EMULATED.setdefault(model, {})
        if (engine, isa, threads) not in made:
            new = emulate(model, engine=engine, isa=isa, threads=threads)
            made[engine, isa, threads] = new
        emulated = made[engine, isa, threads]
        wanted: Any = model(*inputs)
        found: Any = emulated(*inputs)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    found = found if isinstance(found, tuple) else (found,)
    bad = total = 0
    for a, b in zip(wanted, found, strict=True):
        codes = a.int_repr() if a.is_quantized else a
        assert codes.dtype == b.dtype
        assert codes.shape == b.shape
        assert a.stride() == b.stride(), f"layout {b.stride()} where the kernel has {a.stride()}"
        bad += int((codes != b).sum())
        total += codes.numel()
    return bad, total

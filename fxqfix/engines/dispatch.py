"""Which engine's kernel an op really runs on: x86 picks between fbgemm and onednn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fxqfix import _torch
from fxqfix.engines import _probes
from fxqfix.engines._base import Call
from fxqfix.engines.isa import Isa, isa_of

__all__ = ["cell_weights", "check_packed", "dispatch", "placed"]


def dispatch(call: Call) -> str:
    """The engine whose kernel runs a call.

    Args:
        call: The op; its `engine` is the one that the model was converted for.

    Returns:
        "fbgemm", "onednn" or "qnnpack". x86 takes onednn for a convolution where the CPU has
        AVX512-VNNI (whatever caps say), groups <= 100, no weight has a zero point and there is no
        output padding; else fbgemm. qnnpack's own kernels without weights take quint8 only (in
        builds with XNNPACK its add takes qint8 too); all else runs on those that fbgemm and onednn
        share.

    Source:
        torch's should_use_onednn_quant; measured in tests/engines.

    Example:
        >>> from fxqfix.engines import Call, dispatch
        >>> dispatch(Call("fc", "x86", "linear"))
        'fbgemm'
    """
    if call.engine == "qnnpack" and call.weight is None and not _all_quint8(call):
        return "qnnpack" if _signed_sum(call) else "fbgemm"
    if call.engine != "x86":
        return call.engine
    symmetric = call.weight is not None and not any(call.weight.qparams.zero_points)
    conv = call.key.startswith("conv")
    fits = symmetric and call.option("groups", 1) <= 100 and not _output_padding(call)
    return "onednn" if conv and fits and call.isa.cpu == "vnni" else "fbgemm"


def placed(call: Call, engine: str, isa: str | Isa) -> Call:
    """The call of a model that was converted for an engine, on the kernel that really runs it.

    Args:
        call: The op.
        engine: The engine that the model was converted for.
        isa: The levels of the kernels, or their name.

    Example:
        >>> from fxqfix.engines import Call, placed
        >>> placed(Call("fc", "", "linear"), "x86", "avx2").engine
        'fbgemm'
    """
    there = replace(call, engine=engine, isa=isa_of(isa, "placed"))
    found = dispatch(there)
    return there if found == engine else replace(there, engine=found)


def _signed_sum(call: Call) -> bool:
    """Whether two qint8 tensors are added, which XNNPACK does for qnnpack, where a build has it."""
    signed = [q is not None and q.dtype == torch.qint8 for q in call.qparams]
    two = call.key == "add" and len(signed) == 2 and all(signed)
    return two and _probes.xnnpack_takes("add")


def _all_quint8(call: Call) -> bool:
    grids = [q for q in (*call.qparams, call.output) if q is not None]
    return all(q.dtype == torch.quint8 for q in grids)


def _output_padding(call: Call) -> bool:
    found = call.option("output_padding", 0)
    return any(found) if isinstance(found, list | tuple) else bool(found)


def check_packed(call: Call, engine: str) -> None:
    """Refuse a weight that another engine packed: its kernel is what runs, whatever is asked for.

    Args:
        call: The op.
        engine: The engine that is asked for.

    Raises:
        UnsupportedError: The weight is packed for another engine.

    Source:
        Measured: the kernel follows the packed weight, not torch.backends.quantized.engine.
    """
    runs = ("fbgemm", "onednn") if engine == "x86" else (engine,)
    for packed in _packed(call):
        found = _torch.packed_engine(packed)
        if found is not None and found not in runs:
            raise call.refuse(f"its weight is packed for {found}, whose kernel is what runs")


def _packed(call: Call) -> list[Any]:
    """The packed weights that the call holds, those of a module in all of its parts."""
    if call.module is None:
        return [v for v in call.arguments.values() if _torch.is_packed_params(v)]
    values = [v for part in call.module.modules() for v in vars(part).values()]
    cells = [cell_weights(v)[0] for v in values if _is_cell(v)]
    return [
        v for v in (*values, *(w for cell in cells for w in cell)) if _torch.is_packed_params(v)
    ]


def _is_cell(value: object) -> bool:
    return isinstance(value, torch.ScriptObject) and "CellParams" in str(value._type())


def cell_weights(params: Any) -> tuple[list[Any], bool]:
    """Packed weights of input and state of a dynamic recurrent layer, and its reduce_range."""
    (_, _, _, numbers, packed), _ = params.__getstate__()
    return list(packed), any(numbers)

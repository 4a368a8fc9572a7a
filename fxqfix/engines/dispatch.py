"""Which engine's kernel an op really runs on: x86 picks between fbgemm and onednn."""

from __future__ import annotations

from fxqfix.engines._base import Call

__all__ = ["dispatch"]


def dispatch(call: Call) -> str:
    """The engine whose kernel runs a call.

    Args:
        call: The op; its `engine` is the one that the model was converted for.

    Returns:
        "fbgemm", "onednn" or "qnnpack". x86 takes onednn for a convolution where the CPU has VNNI,
        groups <= 100, no weight has a zero point and there is no output padding; else fbgemm.

    Source:
        torch's should_use_onednn_quant; measured in tests/engines.
    """
    if call.engine != "x86":
        return call.engine
    symmetric = call.weight is not None and not any(call.weight.qparams.zero_points)
    conv = call.key.startswith("conv")
    fits = symmetric and call.option("groups", 1) <= 100 and not _output_padding(call)
    return "onednn" if conv and fits and call.isa == "vnni" else "fbgemm"


def _output_padding(call: Call) -> bool:
    found = call.option("output_padding", 0)
    return any(found) if isinstance(found, list | tuple) else bool(found)

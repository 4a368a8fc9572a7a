"""What to do about a cause: its advice in a sentence, and code to paste."""

from __future__ import annotations

from collections.abc import Iterable

from fxqfix.causes import registry

__all__ = ["advice", "code"]

# What ends in the training script and not in the conversion. `prepared`, `converted` and `data` are
# the names of the reader's own models and batches in all code here.
_SCRIPT = {
    "bn-training": "prepared.eval()",
    "dropout-training": "prepared.eval()",
    "uncalibrated": "with torch.no_grad():\n    for batch in data:\n        prepared(batch)",
    "fake-quant-off": "prepared.apply(torch.ao.quantization.enable_fake_quant)",
    "observer-only": "prepared = fxqfix.freeze(prepared)  # quantizes where prepared only observes",
}


def advice(cause: str) -> str:
    """What to do about a cause, in a sentence; "" where nobody knows it.

    Example:
        >>> advice("rounding")
        'nothing to repair: at most 1 code apart, on ties only'
    """
    return next((known.advice for known in registry() if known.name == cause), "")


def code(causes: Iterable[str], engine: str = "") -> str:
    """Code to paste that ends causes of these names; "" where no code can.

    Args:
        causes: Names, in the order in which they are mentioned.
        engine: The engine to convert for; "" for the one that torch is set to.

    Example:
        >>> print(code(["range-lost"], "fbgemm"))
        import fxqfix, torch
        # converted anew, without range-lost:
        int8 = fxqfix.to_int8(prepared, engine='fbgemm')
        # or the model that you have, repaired and compared again:
        print(fxqfix.repair(prepared, converted, data=data))
    """
    named = list(causes)
    repairs = {known.name: known.repair for known in registry() if known.name not in _SCRIPT}
    lines = list(dict.fromkeys(_SCRIPT[name] for name in named if name in _SCRIPT))
    kernels = [name for name in named if repairs.get(name) not in (None, "", "to_decomposed")]
    if kernels:
        option = f", engine={engine!r}" if engine else ""
        lines += [
            f"# converted anew, without {', '.join(kernels)}:",
            f"int8 = fxqfix.to_int8(prepared{option})",
            "# or the model that you have, repaired and compared again:",
            "print(fxqfix.repair(prepared, converted, data=data))",
        ]
    graphs = [name for name in named if repairs.get(name) == "to_decomposed"]
    if graphs:
        lines += [
            f"# a graph whose ops carry their own grids, without {', '.join(graphs)}:",
            "decomposed = fxqfix.to_decomposed(prepared)",
        ]
    return "\n".join(["import fxqfix, torch", *lines]) if lines else ""

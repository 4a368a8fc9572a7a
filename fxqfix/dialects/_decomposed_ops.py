"""The decomposed ops themselves: which node is one, its arguments and its qparams."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxqfix.dialects._arguments import fetch
from fxqfix.dialects.quantizer import qparams_of
from fxqfix.qparams import QParams

__all__ = ["arguments", "is_blockwise", "is_dequantize", "is_quantize", "kind_of", "qparams_of_op"]

_NAMES = {
    "per_tensor": ("input", "scale", "zero_point", "quant_min", "quant_max", "dtype"),
    "per_channel": ("input", "scales", "zero_points", "axis", "quant_min", "quant_max", "dtype"),
}


def kind_of(node: fx.Node) -> tuple[str, str] | None:
    """("quantize" or "dequantize", "per_tensor" or "per_channel") of a decomposed op, else None."""
    if node.op != "call_function" or "quantized_decomposed" not in str(node.target):
        return None
    name = str(node.target).split("quantized_decomposed.")[-1].split(".")[0]
    verb, _, how = name.partition("_")
    return (verb, how) if verb in ("quantize", "dequantize") and how in _NAMES else None


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a decomposed op by name; channel scales and points as "scale" too."""
    kind = kind_of(node)
    given = {**dict(zip(_NAMES[kind[1] if kind else "per_tensor"], node.args, strict=False))}
    given |= node.kwargs
    for plural, single in (("scales", "scale"), ("zero_points", "zero_point")):
        if plural in given:
            given[single] = given.pop(plural)
    return given


def qparams_of_op(node: fx.Node, graph_module: fx.GraphModule) -> QParams | None:
    """The qparams of a decomposed op; None where they are chosen at run time (dynamic)."""
    given = arguments(node)
    scale, point = (fetch(graph_module, given[k]) for k in ("scale", "zero_point"))
    if scale is None or point is None:
        return None
    return qparams_of(
        scale, point, given["quant_min"], given["quant_max"], given["dtype"], given.get("axis")
    )


def is_blockwise(node: fx.Node) -> bool:
    """True for torchao's (de)quantize ops with grids by block, group or token."""
    name = str(node.target)
    return node.op == "call_function" and "torchao" in name and "quantize_affine" in name


def is_quantize(node: fx.Node) -> bool:
    """True for a decomposed quantize op."""
    kind = kind_of(node)
    return kind is not None and kind[0] == "quantize"


def is_dequantize(node: fx.Node) -> bool:
    """True for a decomposed dequantize op."""
    kind = kind_of(node)
    return kind is not None and kind[0] == "dequantize"

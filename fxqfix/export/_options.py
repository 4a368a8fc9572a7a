"""The options of an op, whichever way it is spelled: of a module, a packed weight, or a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxqfix import ops
from fxqfix.dialects import int8
from fxqfix.dialects._base import modules_of
from fxqfix.dialects.weights import WeightView
from fxqfix.ops import OPS

__all__ = ["arguments_of", "float_tensors", "options", "sizes_of"]

_OF_MODULES = (
    *("kernel_size", "stride", "padding", "dilation", "groups", "output_padding", "padding_mode"),
    *("ceil_mode", "count_include_pad", "divisor_override", "output_size", "return_indices"),
    *("negative_slope", "alpha", "min_val", "max_val", "threshold", "value", "dim", "approximate"),
    *("start_dim", "end_dim", "unflattened_size", "eps", "normalized_shape", "num_groups"),
    *("num_features", "size", "scale_factor", "mode", "align_corners"),
    *("upscale_factor", "downscale_factor", "mode", "include_last_offset"),
)
_OF_PACKED = ("stride", "padding", "dilation", "groups", "output_padding")
# Grids are told apart from options; quantized schemas spell them in these ways.
_GRIDS = ("scale", "zero_point", "output_scale", "output_zero_point", "scale_i", "zero_point_i")


def arguments_of(node: fx.Node, graph_module: fx.GraphModule) -> dict[str, Any]:
    """A call's arguments by name; see `int8.arguments`."""
    given = int8.arguments(node, graph_module)
    if node.op == "call_module" or not given.keys() <= {"args", "kwargs"}:
        return given
    # The signature says nothing (aten overloads, x.permute(0, 2, 1)): names are the schema's.
    found_row = ops.match(node.target)
    name = node.target if isinstance(node.target, str) else getattr(found_row, "key", "")
    target: Any = getattr(torch.ops.aten, name, None)
    overloads = [getattr(target, o) for o in target.overloads()] if target is not None else []
    if getattr(node.target, "namespace", "") == "aten":  # an overload, and not a name for several
        overloads = [node.target]
    for overload in overloads:
        names = [argument.name for argument in overload._schema.arguments]
        if _fits(node, overload._schema.arguments):
            found = dict(zip(names, node.args, strict=False))
            if len(names) == 2 and len(node.args) > 2:  # x.permute(0, 2, 1)
                found[names[1]] = node.args[1:]
            return {
                name: int8.fetch(graph_module, value)
                if isinstance(value, fx.Node) and value.op == "get_attr"
                else value
                for name, value in {**found, **node.kwargs}.items()
            }
    return given


def _fits(node: fx.Node, arguments: Any) -> bool:
    """Whether a schema takes the arguments, by their number, names and kinds."""
    names = [argument.name for argument in arguments]
    many = len(names) == 2 and str(arguments[1].type).startswith("List")
    if (len(node.args) > len(names) and not many) or not node.kwargs.keys() <= set(names):
        return False
    kinds = {a.name: str(a.type).removeprefix("Optional[") for a in arguments}
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    wrong = ("Dimname", "str", "Tensor")
    return not any(
        kinds[name].startswith(wrong) and isinstance(value, int | float)
        for name, value in given.items()
    )


def sizes_of(graph_module: fx.GraphModule) -> set[fx.Node]:
    """Nodes that are sizes and what is computed of sizes alone; they are no tensors."""
    modules, found = modules_of(graph_module), set[fx.Node]()
    for node in graph_module.graph.nodes:
        row = ops.match_node(node, modules)
        asks = row is not None and row.spec.output == "none"
        if asks or (node.all_input_nodes and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found - {graph_module.graph.output_node()}


def options(
    key: str, module: nn.Module | None, arguments: Mapping[str, Any], weight: WeightView | None
) -> dict[str, Any]:
    """Options by name, as plain values; those of convolutions and pools are complete."""
    found: dict[str, Any] = {}
    for name in _OF_MODULES if module is not None else ():
        value = getattr(module, name, None)
        if value is not None and _plain(value):
            found[name] = _simple(value)
    for name, value in arguments.items():
        if hasattr(value, "unpack"):
            found |= {n: _simple(getattr(value, n)()) for n in _OF_PACKED if hasattr(value, n)}
        elif name not in _GRIDS and value is not None and _plain(value):
            found[name] = _simple(value)
    return _complete(key, found, weight)


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(v) for v in value)
    kinds = (bool, int, float, str, torch.dtype, torch.memory_format)
    return value is None or isinstance(value, kinds)


def _simple(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_simple(v) for v in value)
    if isinstance(value, torch.dtype | torch.memory_format):
        return str(value).removeprefix("torch.")
    return value


def _complete(key: str, found: dict[str, Any], weight: WeightView | None) -> dict[str, Any]:
    """Defaults of convolutions and pools, one number per axis."""
    row = OPS.get(key.removesuffix("_dynamic"))
    dims = row.dims if row is not None else 0
    if row is None or not dims or not key.startswith(("conv", "max_pool", "avg_pool")):
        return found
    if weight is not None:
        found["kernel_size"] = tuple(weight.codes.shape[2:])
    conv = key.startswith("conv")
    stride = 1 if conv else found.get("kernel_size", 1)
    defaults: dict[str, Any] = {"stride": stride, "padding": 0}
    if conv or key.startswith("max_pool"):
        defaults["dilation"] = 1
    if row.transposed:
        defaults["output_padding"] = 0
    if found.get("stride") == ():  # the functions' way to say "as the kernel"
        del found["stride"]
    complete = {**defaults, **({"groups": 1} if conv else {}), **found}
    for name in (*defaults, "kernel_size"):
        value = complete.get(name)
        if isinstance(value, tuple) and len(value) > dims:  # conv1d is packed as conv2d
            complete[name] = value[-dims:]
        elif isinstance(value, tuple) and len(value) == 1:
            complete[name] = value * dims
        elif isinstance(value, int):
            complete[name] = (value,) * dims
    return complete


def float_tensors(module: nn.Module | None, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Float tensors that an op computes with, by name (normalizations, PReLU)."""
    held: dict[str, Any] = dict(arguments)
    if module is not None:
        held = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    return {
        name.replace(".", "_"): value
        for name, value in held.items()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and not value.is_quantized
        and name not in _GRIDS
    }

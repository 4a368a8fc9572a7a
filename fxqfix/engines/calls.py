"""The int8 ops of a converted graph, as the engines' kernels see them."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fxqfix import ops
from fxqfix.dialects import int8
from fxqfix.dialects._base import modules_of
from fxqfix.engines._base import Call
from fxqfix.engines._memory import readers_behind
from fxqfix.engines.dispatch import placed
from fxqfix.engines.isa import Isa, isa_of
from fxqfix.errors import UnsupportedError
from fxqfix.inserted import InMemoryOrder
from fxqfix.qparams import QParams

__all__ = ["calls"]

_WRITES_OVER = {"conv2d_add": 1}  # onednn's: the place of the input that its result is written to


def calls(
    graph_module: fx.GraphModule,
    engine: str,
    isa: str | Isa | None = "vnni",
    threads: int = 1,
    *,
    strict: bool = True,
    given: Mapping[fx.Node, QParams] | None = None,
) -> dict[fx.Node, Call]:
    """Every op that takes or gives quantized values, or has integer weights, in graph order.

    Args:
        graph_module: A model of dialect "fx-int8".
        engine: The engine that it was converted for; each call has the one that really runs it.
        isa: The levels of the kernels, or their name; None for what this process runs.
        threads: Number of threads of the kernels.
        strict: Refuse ops that no row knows, instead of leaving them out.
        given: The grids of placeholders that codes come in by.

    Raises:
        UnsupportedError: An op on quantized values is in no row of the op table, or a weight can't
            be read (if strict).
    """
    qparams, modules = int8.propagate(graph_module, given), modules_of(graph_module)
    levels = isa_of(isa, "calls")
    found: dict[fx.Node, Call] = {}
    for node in graph_module.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        match = ops.match_node(node, modules)
        inputs = _inputs(node, match, graph_module)
        quantized = node in qparams or any(n in qparams for n in inputs)
        if match is None and quantized and strict:
            raise UnsupportedError(
                "the op table has no such op",
                where=f"node {node.name!r}",
                found=str(node.target),
                remedy="see `fxqfix engines` for the ops that each engine runs",
            )
        try:
            weight = int8.weight_of(node, graph_module, modules) if match is not None else None
        except UnsupportedError:
            if strict:
                raise
            continue
        if match is None or match.spec.output == "none":
            continue
        in_integers = weight is not None and match.column != "spelled"  # no float island
        if not (quantized or in_integers or _is_dynamic(match)):
            continue
        call = _call(node, match, inputs, qparams, graph_module, modules)
        place = _WRITES_OVER.get(call.key, len(inputs))
        if place < len(inputs):
            call = replace(call, rereads=readers_behind(node, inputs[place], modules))
        found[node] = placed(replace(call, weight=weight, threads=threads), engine, levels)
    return _reused(found)


def _reused(found: dict[fx.Node, Call]) -> dict[fx.Node, Call]:
    """Each call with what else its packed weight is called for: on which grids, fused with what."""
    groups: defaultdict[int, list[fx.Node]] = defaultdict(list)
    for node, call in found.items():
        packed = next((v for v in call.arguments.values() if hasattr(v, "unpack")), None)
        owner = call.module if call.module is not None else packed
        if owner is not None and call.weight is not None:
            groups[id(owner)].append(node)
    for nodes in groups.values():
        calls = [found[node] for node in nodes]
        for node, call in zip(nodes, calls, strict=True):
            others = [c for c in calls if c is not call]
            grids = tuple(g for c in others for g in c.qparams[:1])
            otherwise = any(_fused(c) != _fused(call) and _on_grids_of(c, call) for c in others)
            found[node] = replace(call, others=grids, fused_otherwise=otherwise)
    return found


def _fused(call: Call) -> tuple[Any, ...]:
    """What the kernel does behind the sums."""
    return call.key, call.relu, call.option("negative_slope")


def _on_grids_of(call: Call, other: Call) -> bool:
    return (call.qparams, call.output) == (other.qparams, other.output)


def _is_dynamic(match: ops.Match) -> bool:
    """Whether an op chooses its input's grid for each batch; the lookup of embeddings has none."""
    return match.column == "dynamic" and match.spec.family != "embedding"


def _inputs(
    node: fx.Node, match: ops.Match | None, graph_module: fx.GraphModule
) -> tuple[fx.Node, ...]:
    """The values of the graph that an op takes, in order, repeated ones too; no constants."""
    flat: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), flat.append)
    if match is not None and match.key == "quantize":
        return tuple(flat[:1])
    return tuple(n for n in flat if n.op != "get_attr" or _is_value(int8.fetch(graph_module, n)))


def _is_value(constant: Any) -> bool:
    return isinstance(constant, torch.Tensor) and constant.is_quantized


def _call(
    node: fx.Node,
    match: ops.Match,
    inputs: tuple[fx.Node, ...],
    qparams: dict[fx.Node, QParams],
    graph_module: fx.GraphModule,
    modules: Mapping[str, nn.Module],
) -> Call:
    module = modules[str(node.target)] if node.op == "call_module" else None
    in_memory_order = isinstance(module, InMemoryOrder)
    module = module.inner if isinstance(module, InMemoryOrder) else module
    return Call(
        node=node.name,
        engine="",
        key=f"{match.spec.key}_dynamic" if _is_dynamic(match) else match.spec.key,
        relu=match.relu,
        arguments=_arguments(node, module, graph_module),
        module=module,
        target=None if module is not None else node.target,
        inputs=inputs,
        qparams=tuple(qparams.get(n) for n in inputs),
        output=qparams.get(node),
        in_memory_order=in_memory_order,
    )


def _arguments(
    node: fx.Node, module: nn.Module | None, graph_module: fx.GraphModule
) -> dict[str, Any]:
    """By name; of a module those that it was called with."""
    if module is None:
        return int8.arguments(node, graph_module)
    try:
        return dict(inspect.signature(module.forward).bind(*node.args, **node.kwargs).arguments)
    except (TypeError, ValueError):
        return {}

"""Steps of an int8 model: its nodes as they stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import fx, nn

from fxqfix import engines, ops
from fxqfix.dialects import Reading, Tap, int8
from fxqfix.dialects._base import modules_of, scope
from fxqfix.dialects.weights import holder
from fxqfix.errors import UnsupportedError
from fxqfix.export._options import arguments_of, float_tensors, options, sizes_of
from fxqfix.export.step import Program, Step
from fxqfix.inserted import FloatIsland, InMemoryOrder

__all__ = ["program"]


def program(reading: Reading, ranges: Mapping[str, tuple[int, int]]) -> Program:
    """Steps of an int8 model; `ranges` are the declared ones by site."""
    graph_module = reading.graph_module
    modules = modules_of(graph_module)
    taps = [t for t in reading.activations if t.site.used is not None]
    limits = {t.kernel: (q.quant_min, q.quant_max) for t in taps if (q := t.site.used)}
    limits |= {t.kernel: ranges[t.site.name] for t in taps if t.site.name in ranges}
    held: dict[fx.Node, Tap] = {t.held: t for t in taps if t.held is not None}
    # The engine's name only says which kernel runs, and that is not asked here.
    calls = engines.calls(graph_module, "qnnpack")
    sizes = sizes_of(graph_module)
    names = {t.node: n.name for n, t in held.items()}
    skipped = {"placeholder", "output", "get_attr"}
    found = [
        _named(_step(node, calls.get(node), graph_module, modules, limits, sizes), names, held)
        for node in graph_module.graph.nodes
        if node.op not in skipped and node not in sizes and node not in names
    ]
    returned: list[fx.Node] = []
    fx.map_arg(graph_module.graph.output_node().args, returned.append)
    inputs = tuple(n.name for n in graph_module.graph.nodes if n.op == "placeholder")
    outputs = tuple(names.get(n, n.name) for n in returned)
    return Program(graph_module, tuple(found), inputs, outputs)


def _named(step: Step, names: Mapping[fx.Node, str], held: Mapping[fx.Node, Tap]) -> Step:
    """An op and what holds its range are one step: the op's name, the value behind both."""
    renamed = {hold.name: name for hold, name in names.items()}
    hold = held.get(step.value)
    value = hold.node if hold is not None else step.value
    limits = None if step.output is None else step.output.container
    if hold is not None and hold.site.used is not None:
        limits = hold.site.used.quant_min, hold.site.used.quant_max
    return replace(
        step, value=value, limits=limits, inputs=tuple(renamed.get(n, n) for n in step.inputs)
    )


def _module(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """The module with the options: what a float island holds."""
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, InMemoryOrder):
        return module.inner
    return holder(module) if isinstance(module, FloatIsland) else module


def _step(
    node: fx.Node,
    call: engines.Call | None,
    graph_module: fx.GraphModule,
    modules: Mapping[str, nn.Module],
    limits: Mapping[fx.Node, tuple[int, int]],
    sizes: set[fx.Node],
) -> Step:
    found = ops.match_node(node, modules)
    key = found.key if found is not None else str(getattr(node.target, "__name__", node.target))
    place = scope(node, graph_module)
    if found is not None and found.spec.output == "tuple" and found.column != "spelled":
        raise UnsupportedError(
            "the weights inside this module can't be read",
            where=f"extract_parameters, node {node.name!r}",
            found=found.key,
            remedy="leave it out of the quantized part of the model",
        )
    if call is None:  # an op on floats
        inputs = [n for n in node.all_input_nodes if n.op != "get_attr" and n not in sizes]
        weight = int8.weight_of(node, graph_module, modules)  # of a float island
        return Step(
            node.name,
            key,
            place,
            node,
            tuple(n.name for n in inputs),
            options(key, _module(node, modules), arguments_of(node, graph_module), weight),
            (None,) * len(inputs),
            weight=weight,
        )
    if call.weight is not None:
        call.weight.checked(f"extract_parameters, node {node.name!r}")
    arguments = arguments_of(node, graph_module)
    given = [(n, q) for n, q in zip(call.inputs, call.qparams, strict=True) if n not in sizes]
    qparams = [q.with_range(*limits[n]) if q is not None and n in limits else q for n, q in given]
    output = call.output
    if output is not None and node in limits:
        output = output.with_range(*limits[node])
    return Step(
        name=node.name,
        op=key,
        module=place,
        value=node,
        inputs=tuple(n.name for n, _ in given),
        options=options(call.key, call.module, arguments, call.weight),
        input_qparams=tuple(qparams),
        output=output,
        weight=call.weight,
        weighted=found is not None and found.spec.family == "weighted",
        tensors={} if call.weight is not None else float_tensors(call.module, arguments),
    )

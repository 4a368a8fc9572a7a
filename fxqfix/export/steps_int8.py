"""Steps of an int8 model: its nodes as they stand."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from fxqfix import engines, ops
from fxqfix.dialects import Reading
from fxqfix.dialects._base import modules_of, scope
from fxqfix.errors import UnsupportedError
from fxqfix.export._options import arguments_of, float_tensors, options, sizes_of
from fxqfix.export.step import Program, Step

__all__ = ["program"]


def program(reading: Reading, ranges: Mapping[str, tuple[int, int]]) -> Program:
    """Steps of an int8 model; `ranges` are the declared ones by site."""
    graph_module = reading.graph_module
    modules = modules_of(graph_module)
    limits = {t.node: ranges[t.site.name] for t in reading.activations if t.site.name in ranges}
    # The engine's name only says which kernel runs, and that is not asked here.
    calls = engines.calls(graph_module, "qnnpack")
    sizes = sizes_of(graph_module)
    found = [
        _step(node, calls.get(node), graph_module, modules, limits, sizes)
        for node in graph_module.graph.nodes
        if node.op not in ("placeholder", "output", "get_attr") and node not in sizes
    ]
    returned: list[fx.Node] = []
    fx.map_arg(graph_module.graph.output_node().args, returned.append)
    inputs = tuple(n.name for n in graph_module.graph.nodes if n.op == "placeholder")
    return Program(graph_module, tuple(found), inputs, tuple(n.name for n in returned))


def _step(
    node: fx.Node,
    call: engines.Call | None,
    graph_module: fx.GraphModule,
    modules: dict[str, nn.Module],
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
        return Step(
            node.name,
            key,
            place,
            node,
            tuple(n.name for n in inputs),
            options(key, modules.get(str(node.target)), arguments_of(node, graph_module), None),
            (None,) * len(inputs),
        )
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

"""Steps of a decomposed model: a float op, the relu behind it and its quantize are one step."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, fx

from fxqfix import ops
from fxqfix.dialects import Reading, Tap, decomposed
from fxqfix.dialects._base import modules_of, op_name, scope
from fxqfix.dialects.weights import WeightView, holder
from fxqfix.errors import UnsupportedError
from fxqfix.export._options import arguments_of, float_tensors, options, sizes_of
from fxqfix.export.step import Program, Step
from fxqfix.qparams import QParams, dequantize

__all__ = ["program"]


def program(reading: Reading) -> Program:
    """Steps of a decomposed model."""
    walk = _Walk(reading)
    for node in reading.graph_module.graph.nodes:
        walk.visit(node)
    inputs = tuple(n.name for n in reading.graph_module.graph.nodes if n.op == "placeholder")
    outputs = tuple(n.name if n in walk.ends else walk.names[n] for n in walk.returned)
    return Program(reading.graph_module, tuple(walk.steps), inputs, outputs)


class _Walk:
    """Names, grids and weights as they are met, in graph order."""

    def __init__(self, reading: Reading) -> None:
        self.graph_module = reading.graph_module
        self.modules = modules_of(reading.graph_module)
        self.taps = {tap.kernel: tap for tap in reading.activations}
        self.pins = {tap.node for tap in reading.activations if tap.held is not None}
        # Of a constant, under its quantize or dequantize; of a reference module, under its call.
        views: dict[fx.Node, WeightView] = {}
        for tap in reading.weights:
            nodes = (tap.producer, *(node for node, _ in tap.repeats))
            views |= dict.fromkeys(nodes, tap.weight()) if tap.weight is not None else {}
        self.held = {n: view for n, view in views.items() if n.op == "call_module"}
        # Each op takes its own bias.
        loose = views.keys() - self.held.keys()
        self.weights = {n: replace(views[n], bias=None) for n in views if n in loose}
        self.sizes = sizes_of(reading.graph_module)
        self.steps: list[Step] = []
        self.names: dict[fx.Node, str] = {}  # of the step whose value a node has
        self.grids: dict[str, QParams | None] = {}
        self.returned: list[fx.Node] = []
        fx.map_arg(self.graph_module.graph.output_node().args, self.returned.append)
        self.ends: set[fx.Node] = set()
        # An op belongs to the first quantize behind it, and with a fused relu the op before too.
        self.owners: dict[fx.Node, Tap] = {}
        self.heads: dict[fx.Node, fx.Node] = {}
        for tap in reading.activations:
            if tap.producer.op == "placeholder" or self._is_boundary(tap.producer):
                continue
            self.owners.setdefault(tap.producer, tap)
            found = ops.match_node(tap.producer, self.modules)
            if found is not None and found.key == "relu" and tap.site.op.endswith("_relu"):
                self.heads[tap.producer] = tap.producer.all_input_nodes[0]
        self.inner = set(self.heads.values())

    def visit(self, node: fx.Node) -> None:
        """Add the step of a node, where it begins or ends one."""
        if node.op in ("output", "get_attr") or node in self.sizes:
            return
        if node.op == "placeholder":
            self.names[node] = node.name
        elif self._is_boundary(node):
            self._boundary(node)
        elif node in self.pins or decomposed.is_pin(node):
            self.names[node] = self.names[node.all_input_nodes[0]]
        elif self._is_weight(node):
            self.weights[node] = self.weights[node.all_input_nodes[0]]
        elif node not in self.inner and node.users:  # PT2E leaves checks that nothing reads
            self._op(node)

    def _is_boundary(self, node: fx.Node) -> bool:
        found = ops.match_node(node, self.modules)
        return found is not None and found.spec.family == "boundary"

    def _is_weight(self, node: fx.Node) -> bool:
        """A weight on its way, cast to another dtype."""
        return node.target == "to" and node.all_input_nodes[0] in self.weights

    def _boundary(self, node: fx.Node) -> None:
        source = node.all_input_nodes[0]
        if node in self.weights or source in self.weights:
            self.weights[node] = self.weights[node if node in self.weights else source]
            return
        if source not in self.names:
            raise self._dynamic(node)
        name, tap = self.names[source], self.taps.get(node)
        if tap is not None:
            if not (name in self.grids and self._owns(tap)):
                inputs, name = (name,), node.name
                grid = self.grids.get(inputs[0])
                self._add(Step(name, "quantize", tap.site.module, node, inputs, {}, (grid,)), tap)
        elif "dequantize" not in str(node.target):
            raise self._dynamic(node)
        elif node in self.returned:
            step = Step(node.name, "dequantize", "", node, (name,), {}, (self.grids.get(name),))
            self._add(step, None)
            self.ends.add(node)
        self.names[node] = name

    def _owns(self, tap: Tap) -> bool:
        return self.owners.get(tap.producer) is tap

    def _dynamic(self, node: fx.Node) -> UnsupportedError:
        dtype = decomposed.arguments(node)["dtype"]
        what = "qparams that are chosen at run time"
        if dtype.is_floating_point:
            what = f"values of {dtype}, which are no integers,"
        return UnsupportedError(
            f"{what} can't be extracted",
            where=f"extract_parameters, node {node.name!r}",
            found=node.format_node(),
            remedy="quantize statically, to integers, or leave this value in float",
        )

    def _add(self, step: Step, tap: Tap | None) -> None:
        output = tap.site.used if tap is not None else None
        self.grids[step.name] = output
        limits = None if output is None else (output.quant_min, output.quant_max)
        self.steps.append(replace(step, output=output, limits=limits))

    def _op(self, node: fx.Node) -> None:
        head, tap = self.heads.get(node, node), self.owners.get(node)
        found = ops.match_node(head, self.modules)
        flat: list[fx.Node] = []
        fx.map_arg((head.args, head.kwargs), flat.append)
        inputs = tuple(self.names[n] for n in flat if n in self.names)
        grids = tuple(self.grids.get(name) for name in inputs)
        arguments = arguments_of(head, self.graph_module)
        module = self.modules[str(head.target)] if head.op == "call_module" else None
        weight = self._weight(head, flat, arguments.get("bias"))
        if module is not None and weight is not None:  # the convolution inside a fused module
            module = holder(module)
        family, rule = (found.spec.family, found.spec.output) if found is not None else ("", "")
        step = Step(
            name=node.name,
            op=op_name(node, self.modules),
            module=scope(node, self.graph_module),
            value=tap.node if tap is not None else node,
            inputs=inputs,
            options=options(found.spec.key if found is not None else "", module, arguments, weight),
            input_qparams=grids,
            weight=weight,
            weighted=family == "weighted",
            tensors={} if weight is not None else float_tensors(module, arguments),
        )
        self._add(step, tap)
        self.names[node] = node.name
        if tap is None and rule == "shape" and grids:  # the same codes, moved
            self.grids[node.name] = grids[0]
            limits = None if grids[0] is None else (grids[0].quant_min, grids[0].quant_max)
            self.steps[-1] = replace(self.steps[-1], output=grids[0], limits=limits)

    def _weight(self, head: fx.Node, flat: list[fx.Node], bias: object) -> WeightView | None:
        held = [self.weights[n] for n in flat if n in self.weights]
        view = self.held.get(head) or (held[0] if held else None)
        if isinstance(bias, fx.Node) and bias in self.weights:  # quantized as well
            values = self.weights[bias]
            bias = dequantize(values.codes, values.qparams)
        if view is None or not isinstance(bias, Tensor):
            return view
        return replace(view, bias=bias)

"""emulate-engine: every int8 op replaced by its engine's integer arithmetic in plain tensor ops."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxqfix import dialects, engines, ops
from fxqfix.dialects import int8
from fxqfix.dialects._base import modules_of
from fxqfix.errors import DialectError, UnsupportedError
from fxqfix.passes._base import Pass, Rewriter
from fxqfix.qparams import QParams

__all__ = ["EmulateEngine"]


@dataclass(frozen=True)
class EmulateEngine(Pass):
    """Replace int8 ops by modules that compute the same codes on any machine.

    Quantized tensors become integer tensors of their codes; a model that returns a quantized
    tensor returns its codes.

    Attributes:
        engine: The engine that the model was converted for.
        isa: "vnni" or "avx2"; see `fxqfix.emulate`.
        threads: Number of threads that the kernels are taken to run on.

    Example:
        >>> from fxqfix.passes import EmulateEngine
        >>> EmulateEngine("qnnpack").isa
        'vnni'
    """

    engine: str
    isa: str = "vnni"
    threads: int = 1
    name: ClassVar[str] = "emulate-engine"

    def rewrite(self, rewriter: Rewriter) -> None:
        """Replace node by node, in the graph's order."""
        model = rewriter.graph_module
        if dialects.read(model).dialect != int8.NAME:
            raise DialectError(
                "only int8 models are emulated",
                where=self.name,
                found=f"a model of dialect {dialects.read(model).dialect}",
                expected=int8.NAME,
                remedy="pass what convert_fx returned",
            )
        qparams, modules = int8.propagate(model), modules_of(model)
        for node in list(model.graph.nodes):
            found = ops.match_node(node, modules)
            inputs = _inputs(node, found, model)
            quantized = node in qparams or any(n in qparams for n in inputs)
            if node.op in ("placeholder", "output", "get_attr"):
                continue
            if found is None and quantized and node.op != "output":
                raise self._unknown(node, "the op table has no such op")
            weight = int8.weight_of(node, model, modules) if found is not None else None
            if found is None or not (quantized or weight is not None):
                continue
            if found.spec.output == "none":
                continue
            call = _call(self, node, found, inputs, qparams, weight, model)
            new = self._replace(rewriter, node, call)
            if node in qparams:
                qparams[new] = qparams[node]
        for node in reversed(model.graph.nodes):  # scales and packed weights that nothing reads
            if node.op == "get_attr" and not node.users:
                model.graph.erase_node(node)

    def _replace(self, rewriter: Rewriter, node: fx.Node, call: engines.Call) -> fx.Node:
        call = replace(call, engine=engines.dispatch(call))
        row = engines.table().get((call.engine, call.key))
        if row is None:
            raise self._unknown(node, f"{call.engine} has no exact arithmetic for {call.key!r}")
        if row.build is None:
            return node
        name = rewriter.add_module(f"emulated_{node.name}", row.build(call))
        with rewriter.graph.inserting_before(node):
            new = rewriter.graph.create_node("call_module", name, call.inputs)
        rewriter.replace(node, new, f"{call.key} in integers, as {call.engine} computes it")
        return new

    def _unknown(self, node: fx.Node, reason: str) -> UnsupportedError:
        return UnsupportedError(
            f"node can't be emulated: {reason}",
            where=f"{self.name}, node {node.name!r}",
            found=str(node.target),
            remedy="see `fxqfix engines` for the ops that each engine runs",
        )


def _inputs(node: fx.Node, found: ops.Match | None, model: fx.GraphModule) -> tuple[fx.Node, ...]:
    """The values of the graph that an op takes, in order, repeated ones too; no constants."""
    flat: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), flat.append)
    if found is not None and found.key == "quantize":
        return tuple(flat[:1])
    return tuple(n for n in flat if n.op != "get_attr" or _is_value(int8.fetch(model, n)))


def _is_value(constant: Any) -> bool:
    return isinstance(constant, torch.Tensor) and constant.is_quantized


def _call(
    options: EmulateEngine,
    node: fx.Node,
    found: ops.Match,
    inputs: tuple[fx.Node, ...],
    qparams: dict[fx.Node, QParams],
    weight: Any,
    model: fx.GraphModule,
) -> engines.Call:
    module: nn.Module | None = None
    if node.op == "call_module":
        module = modules_of(model)[str(node.target)]
    return engines.Call(
        node=node.name,
        engine=options.engine,
        key=found.spec.key,
        relu=found.relu,
        arguments=int8.arguments(node, model),
        module=module,
        target=None if module is not None else node.target,
        inputs=inputs,
        qparams=tuple(qparams.get(n) for n in inputs),
        output=qparams.get(node),
        weight=weight,
        isa=options.isa,
        threads=options.threads,
    )

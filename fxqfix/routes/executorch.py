"""Route "executorch": XNNPACK's int8 kernels, lowered and run in process.

The graph is suited to XNNPACK first (pass `suit-xnnpack`, which changes no value): its range pins
become clamps of codes, and unsigned codes become signed ones. Deploy that graph, and not the
decomposed one itself:

    program = torch.export.export(SuitXnnpack()(decomposed).graph_module, (x,))
    to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()

XNNPACK's integers are known for convolution, transposed convolution, linear, add, sub, mul and the
global average: int32 biases, a float32 multiplier (add and sub: a fixed-point one of 21 bits), and
ties to even (add and sub: up). Pools but max, sigmoid, hardswish, softmax and the like run in
float32 between dequantize and quantize, whatever the graph says. The certificate counts the int8
ops, and lists those that XNNPACK does not run at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxqfix import _torch
from fxqfix._extras import require
from fxqfix.dialects.decomposed import is_dequantize
from fxqfix.errors import RouteError
from fxqfix.passes import SuitXnnpack
from fxqfix.passes.cut_sites import output_nodes
from fxqfix.passes.signed_codes import SHIFT, is_unsigned
from fxqfix.routes._base import Deployed, Route
from fxqfix.routes._xnnpack import codes_of_site
from fxqfix.routes.export import Dynamic, exported

__all__ = ["ROUTE"]

_PLUMBING = ("getitem", "alloc", "dim_order_copy", "clone_dim_order")
_IMPLICIT = "IS_IMPLICIT_Q_DQ_TAG"  # executorch's mark on what it fuses into an int8 kernel


@dataclass(frozen=True)
class _Method:
    """A loaded program, and what it reads while it runs: executorch keeps neither alive."""

    signs: _Signs
    buffers: Any
    program: Any
    method: Any
    writes: bool

    def __call__(self, *inputs: Any) -> Sequence[Tensor]:
        # A method that writes buffers starts anew only where it is loaded anew.
        method = self.program.load_method("forward") if self.writes else self.method
        found = method.execute(self.signs.taken(inputs))
        # The next run writes to the same memory.
        return self.signs.returned([value.clone() for value in found])


@dataclass(frozen=True)
class _Signs:
    """Which inputs and outputs of a graph are unsigned codes, which its suited form has signed."""

    inputs: tuple[bool, ...]
    outputs: tuple[bool, ...]

    @classmethod
    def of(cls, graph_module: fx.GraphModule) -> _Signs:
        """Those of a decomposed graph."""
        nodes = list(graph_module.graph.nodes)
        return cls(
            tuple(
                any(is_unsigned(u) and is_dequantize(u) for u in n.users)
                for n in nodes
                if n.op == "placeholder"
            ),
            tuple(is_unsigned(n) and not is_dequantize(n) for n in output_nodes(graph_module)),
        )

    def taken(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Inputs as the suited graph takes them; those with defaults may be left out."""
        return tuple(
            _contiguous((v.to(torch.int16) - SHIFT).to(torch.int8) if unsigned else v)
            for v, unsigned in zip(inputs, self.inputs, strict=False)
        )

    def returned(self, outputs: list[Tensor]) -> list[Tensor]:
        """Outputs as the graph returns them."""
        return [
            (v.to(torch.int16) + SHIFT).to(torch.uint8) if unsigned else v
            for v, unsigned in zip(outputs, self.outputs, strict=True)
        ]


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def _deploy(graph_module: fx.GraphModule, batch: tuple[Any, ...], dynamic: Dynamic) -> Deployed:
    with _torch.quiet():
        exir, partition, runtime = (
            require(f"executorch.{name}", "executorch", "certify, route executorch")
            for name in ("exir", "backends.xnnpack.partition.xnnpack_partitioner", "runtime")
        )
        suited, signs = SuitXnnpack()(graph_module), _Signs.of(graph_module)
        program = exported(suited.graph_module, signs.taken(batch), dynamic)
        edge = exir.to_edge_transform_and_lower(
            program, partitioner=[partition.XnnpackPartitioner()]
        )
        seen = _Lowered.of(edge.exported_program().graph_module)
        buffers = edge.to_executorch()
        loaded = runtime.Runtime.get().load_program(buffers.buffer)
        writes = bool(program.graph_signature.buffers_to_mutate)
        run = _Method(signs, buffers, loaded, loaded.load_method("forward"), writes)
    return Deployed(run, tuple(seen.integers.items()), tuple(seen.notes(suited.edits)))


@dataclass(frozen=True)
class _Lowered:
    """What executorch made of a graph.

    Attributes:
        integers: Op -> how often XNNPACK computes it on int8 codes.
        floats: Op -> how often XNNPACK computes it on floats.
        outside: Op -> how often it is left to executorch's portable kernels.
        dynamic: How many activations are quantized at run time.
    """

    integers: Counter[str]
    floats: Counter[str]
    outside: Counter[str]
    dynamic: int

    @classmethod
    def of(cls, lowered: fx.GraphModule) -> _Lowered:
        """Count the ops of a lowered program."""
        integers, floats, outside = Counter[str](), Counter[str](), Counter[str]()
        dynamic = 0
        for node in _calls(lowered):
            if "call_delegate" not in str(node.target):
                outside[_name(node)] += 1
                continue
            delegate: Any = getattr(lowered, str(node.all_input_nodes[0].target))
            inner = delegate.original_module.graph_module
            _check(inner)
            for op in _calls(inner):
                if "choose_qparams" in str(op.target):
                    dynamic += 1
                elif "quantize_per" not in str(op.target) and not _is_fused(op):
                    # Or the weight is: padding="same" may have put a pad of codes in between.
                    own = any(map(_is_implicit, op.all_input_nodes))
                    (integers if own else floats)[_name(op)] += 1
        return cls(integers, floats, outside, dynamic)

    def notes(self, edits: tuple[str, ...]) -> Iterator[str]:
        """What a reader of the certificate has to know."""
        if edits:
            yield f"suited to XNNPACK first: pass suit-xnnpack, {len(edits)} edits"
        if self.dynamic:
            yield (
                f"{self.dynamic} activations are quantized at run time: XNNPACK chooses a grid per "
                "row, the graph one per tensor"
            )
        for what, ops in (
            ("XNNPACK computes in float32", self.floats),
            ("left to executorch's portable kernels", self.outside),
        ):
            if ops:
                yield f"{what}: " + ", ".join(f"{n} {name}" for name, n in ops.items())


def _calls(graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    """The ops of a lowered graph, without what only hands values on."""
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and not any(n in str(node.target) for n in _PLUMBING):
            yield node


def _name(node: fx.Node) -> str:
    """The name of an edge op, whose target prints its whole schema: "aten.add.Tensor"."""
    return str(getattr(node.target, "__name__", node.target)).removesuffix(".default")


def _is_implicit(node: fx.Node) -> bool:
    """Whether executorch marked a dequantize op as part of the int8 kernel that reads it."""
    return is_dequantize(node) and bool(node.meta.get(_IMPLICIT))


def _is_fused(node: fx.Node) -> bool:
    """Whether an activation is part of the kernel before it."""
    before = node.all_input_nodes[0]
    fusible = _name(before) in ("aten.convolution", "aten.linear", "aten.add.Tensor")
    return _name(node) in ("aten.relu", "aten.hardtanh") and fusible and len(before.users) == 1


def _check(inner: fx.GraphModule) -> None:
    """Raise where a delegate returns codes in the place of floats (seen in executorch 1.5.1)."""
    output = list(inner.graph.nodes)[-1]
    for node in output.all_input_nodes:
        if _is_implicit(node):
            raise RouteError(
                "executorch lowers this graph to a program that reads codes as floats",
                where="certify, route executorch",
                found=f"node {node.name}, which an op outside of XNNPACK reads",
                remedy="quantize that op too, or leave its weight float",
            )


ROUTE = Route(
    name="executorch",
    summary="ExecuTorch with XNNPACK's int8 kernels, lowered and run in process",
    deploy=_deploy,
    extra="executorch",
    packages=("executorch",),
    arithmetic=codes_of_site,
)

"""The certificate of `to_int8`: read off the result and checked against the frozen model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fxqfix import _torch, ops
from fxqfix.checks import drawing
from fxqfix.dialects import Reading, int8
from fxqfix.dialects._base import modules_of
from fxqfix.dialects._propagate import misplaced, unread
from fxqfix.dialects.weights import WeightView
from fxqfix.engines import ISAS, Interval, calls, intervals, isa_of, placed, saturation_possible
from fxqfix.inserted import FloatIsland, InMemoryOrder
from fxqfix.pairing import Pair, Pairing, pair
from fxqfix.passes._detours import ROUTE
from fxqfix.passes._ends import rounded_outputs
from fxqfix.passes._met import defects_of
from fxqfix.passes.explicit_writes import QUANTIZED
from fxqfix.report import CheckedRange, CheckedWeight, Int8Certificate, Routed, Saturating

__all__ = ["certify"]


def certify(own: Reading, result: Reading, engine: str) -> Int8Certificate:
    """Check an int8 model.

    Args:
        own: The reading of the frozen prepared model.
        result: The reading of the int8 model.
        engine: The engine that it is packed for.
    """
    pairing = pair(own, result)
    found = intervals(result.graph_module)
    activations = [p for p in pairing.pairs if p.prepared.site.kind == "activation"]
    ranges = [_range(p, found) for p in activations if p.converted.site.used is not None]
    weights = [p for p in pairing.pairs if p.prepared.site.kind == "weight"]
    return Int8Certificate(
        engine=engine,
        torch=torch.__version__,
        ranges=tuple(ranges),
        weights=tuple(w for p in weights if (w := _weight(p, own)) is not None),
        routed=tuple(_routed(result.graph_module)),
        saturating=tuple(_saturating(result.graph_module, engine)),
        unchecked=(*_unmeasured(engine), *_unchecked(own, result, pairing)),
        broken=tuple(misplaced(result.graph_module)),
        **_wrong_kernels(result.graph_module, engine),
    )


def _range(p: Pair, found: dict[fx.Node, Interval]) -> CheckedRange:
    declared, used = p.prepared.site.used, p.converted.site.used
    assert declared is not None and used is not None  # noqa: PT018  # pairs have both
    behind, kernel = found[p.converted.node], found[p.converted.kernel]
    low, high = declared.quant_min, declared.quant_max
    return CheckedRange(
        site=p.prepared.site.name,
        quant_min=low,
        quant_max=high,
        clamped=p.converted.held is not None,
        reason=kernel.reason,
        held=behind.within(low, high),
        same_grid=declared.same_grid(used),
    )


def _weight(p: Pair, own: Reading) -> CheckedWeight | None:
    if p.prepared.weight is None or p.converted.weight is None:
        return None
    mine, theirs = p.prepared.weight(), p.converted.weight()
    if p.prepared.producer.op == "get_attr":  # of a functional op, which takes the bias itself
        bias = int8.arguments(p.prepared.node, own.graph_module).get("bias")
        mine = replace(mine, bias=bias if isinstance(bias, Tensor) else None)
    return CheckedWeight(
        site=p.prepared.site.name,
        elements=mine.codes.numel(),
        differing=int((mine.codes.int() != theirs.codes.int()).sum()),
        same_qparams=mine.qparams.same_grid(theirs.qparams),
        bias=_bias(mine, theirs),
    )


def _bias(mine: WeightView, theirs: WeightView) -> str:
    held: list[Tensor] = [b.detach() for b in (mine.bias, theirs.bias) if b is not None]
    if not held:
        return "none"
    if len(held) == 1:  # torch packs zeros where there is none
        held.append(torch.zeros_like(held[0]))
    return "equal" if torch.equal(*held) else f"bias differs by {(held[0] - held[1]).abs().max():g}"


def _routed(graph_module: fx.GraphModule) -> Iterator[Routed]:
    modules = modules_of(graph_module)
    for node in graph_module.graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        match = ops.match_node(node, modules)
        key = match.key if match is not None else str(node.target)
        if isinstance(module, FloatIsland):
            yield Routed(node.name, key, "float island", module.reason)
        elif isinstance(module, InMemoryOrder):
            yield Routed(node.name, key, "memory order", module.reason)
        elif ROUTE in node.meta:
            yield Routed(node.name, key, *node.meta[ROUTE])


def _saturating(graph_module: fx.GraphModule, engine: str) -> Iterator[Saturating]:
    found = intervals(graph_module)
    for node, call in calls(graph_module, engine, strict=False).items():
        up = found.get(call.inputs[0]) if call.inputs else None
        if up is None or call.weight is None or call.weight.qparams.storage != torch.int8:
            continue
        pairs = saturation_possible(placed(call, engine, "avx2"), highest=up.high)
        if pairs:
            yield Saturating(node.name, pairs, up.high)


def _wrong_kernels(graph_module: fx.GraphModule, engine: str) -> dict[str, Any]:
    """Ops that run on a wrong kernel, those of which the graph can't tell, and sizes of inputs."""
    found: dict[str, Any] = {"defects": (), "possible": ()}
    by_size: dict[str, list[str]] = {}
    for node, defect, levels in defects_of(graph_module, engine, unlikely=True):
        at = f" (at {', '.join(levels)})" if len(levels) < len(ISAS) else ""
        reason = f"{defect.name}{at}: {defect.condition}"
        if defect.by_size:
            by_size.setdefault(reason, []).append(node.name)
        else:
            said = f"{reason}; way round: {defect.way_round}"
            found["defects" if defect.certain else "possible"] += ((node.name, said),)
    unless = ((f"{len(n)} op{'s' * (len(n) > 1)}, {n[0]} first", r) for r, n in by_size.items())
    return {**found, "unless": tuple(unless)}


def _unmeasured(engine: str) -> Iterator[tuple[str, str]]:
    """The engine itself, where which of its kernels are wrong is not known on this CPU."""
    if reason := isa_of(None).unmeasured(engine):
        yield engine, reason


def _unchecked(own: Reading, result: Reading, pairing: Pairing) -> Iterator[tuple[str, str]]:
    for tap, side, reason in pairing.unpaired:
        yield tap.site.name, f"{side} model: {reason}"
    for reading in (own, result):
        for site, reason in reading.unsupported:
            yield site.name, f"{reading.dialect}: {reason}"
    for i, p in enumerate(rounded_outputs(own, result, pairing)):
        if p is not None:
            yield f"output {i}", f"quantized, as {p.prepared.site.name} is; in training in float"
    for name in unread(result.graph_module):
        yield name, "reads codes, and no row of the op table knows what it makes of them"
    for node in drawing(own.graph_module):
        yield node.name, "draws random numbers, which a certificate without data can't compare"
    for node in own.graph_module.graph.nodes:
        if QUANTIZED in node.meta:
            op = node.meta[QUANTIZED]
            yield node.name, f"reads {op}, written in place, quantized; in training in float"
    for node in result.graph_module.graph.nodes:
        if node.op == "call_module" and _torch.is_reference_module(
            result.graph_module.get_submodule(str(node.target))
        ):
            yield node.name, "torch's conversion left it in float, on its quantized weight"

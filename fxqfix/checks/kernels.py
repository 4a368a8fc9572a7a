"""The engine: whether it fits, what its kernels saturate, get wrong, refuse or leave in float."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxqfix.checks._base import Check, Finding, Subject
from fxqfix.engines import ENGINES, defect_rows, isa_of, placed, saturation_possible

__all__ = ["CHECKS"]


def _saturation(subject: Subject) -> Iterator[Finding]:
    if subject.engine == "qnnpack":
        return
    for tap, call in subject.calls:
        if tap is None or call.weight is None or call.weight.qparams.storage != torch.int8:
            continue
        source = call.source
        if source.bits > 8:  # 16-bit codes meet no kernel that adds pairs in int16
            continue
        pairs = held = saturation_possible(call) or 0
        if not pairs:
            continue
        if source.quant_max - source.container[0] <= 127:
            held = 0  # 2 * 127 * 128 < 2**15
        elif source.is_narrow:
            held = saturation_possible(call, highest=source.quant_max) or 0
        yield Finding(
            "int16-saturation",
            "warning",
            tap.site.name,
            f"{pairs} pair{'s' * (pairs != 1)} of weights can leave int16 on CPUs without VNNI; "
            f"{held} while activations stay in [{source.quant_min},{source.quant_max}]",
            "a quantizer with reduce_range=True, and fxqfix.to_decomposed, which holds the range"
            if subject.exported
            else "hold activations in [0,127] (reduce_range and fxqfix.to_int8), or use qnnpack",
        )


def _defects(subject: Subject) -> Iterator[Finding]:
    if subject.exported:
        return
    isa = isa_of(None)
    if reason := isa.unmeasured(subject.engine):
        remedy = "judge what it computes on your data: fxqfix.certify(model, route, data)"
        yield Finding("kernel-defect", "warning", "", f"not judged: {reason}", remedy)
    for _, capped in subject.calls:
        call = placed(capped, subject.engine, isa)
        found = next((d for d in defect_rows(call) if not d.by_size and d.present), None)
        if found is not None:
            yield Finding(
                "kernel-defect",
                "error" if found.certain else "warning",
                call.node,
                f"{call.engine}: {found.condition}: {found.effect}",
                found.way_round,
            )


def _fit(subject: Subject) -> Iterator[Finding]:
    if subject.exported:
        return
    known = torch.backends.quantized.supported_engines
    if subject.engine not in known:
        evidence = f"this torch has {', '.join(e for e in known if e != 'none')}"
        yield Finding("engine-mismatch", "error", "", evidence, "choose another engine")
    current = torch.backends.quantized.engine
    if subject.engine in ENGINES and subject.engine != current:
        yield Finding(
            "engine-mismatch",
            "warning",
            "",
            f"torch.backends.quantized.engine is {current!r}: conversion would pack for it",
            f"torch.backends.quantized.engine = {subject.engine!r} before converting",
        )
    for tap in subject.reading.weights:
        used = tap.site.used
        if subject.engine == "onednn" and used is not None and any(used.zero_points):
            points = sum(z != 0 for z in used.zero_points)
            yield Finding(
                "engine-mismatch",
                "error",
                tap.site.name,
                f"{points} zero points of the weight are not 0: onednn refuses to pack it",
                "symmetric weights, another engine, or fxqfix.to_int8, which routes round it",
            )
    for tap in subject.reading.activations:
        used = tap.site.used
        if used is not None and used.dtype == torch.qint8 and subject.engine != "onednn":
            yield Finding(
                "engine-mismatch",
                "error",
                tap.site.name,
                f"qint8 activations: {subject.engine}'s kernels take quint8",
                "a qconfig with quint8 activations",
            )


def _float(subject: Subject) -> Iterator[Finding]:
    quantized = {tap.node for tap in subject.reading.weights}
    for node, match in subject.matches.items():
        if match.spec.family != "weighted" or node in quantized or match.column != "spelled":
            continue
        if subject.exported and _quantized_weight(subject, node):
            continue  # one weight of several ops, a site of the first
        if not subject.exported and any(
            n in subject.taps or n.op == "get_attr" for n in node.all_input_nodes[1:]
        ):
            continue  # a functional op, whose weight is a site of its own
        yield Finding(
            "not-lowered",
            "info",
            node.name,
            f"{match.key} has no quantized weight: it stays in float",
            "annotate it in the quantizer, unless that is meant"
            if subject.exported
            else "give it a qconfig, unless that is meant",
        )


def _quantized_weight(subject: Subject, node: fx.Node) -> bool:
    """Whether an exported op's weight comes from a quantizer, behind reshapes of it."""
    weight: Any = node.args[1]
    while weight in subject.matches and subject.matches[weight].spec.output == "shape":
        weight = weight.all_input_nodes[0]
    return any(tap.quantizer is weight for tap in subject.reading.weights)


PLACE = 60
CHECKS = (
    Check("engine-mismatch", "an engine that the model or this torch does not fit", _fit),
    Check("int16-saturation", "weights whose products can leave int16", _saturation),
    Check("kernel-defect", "ops whose kernel is known to be wrong", _defects),
    Check("not-lowered", "ops that stay in float", _float),
)

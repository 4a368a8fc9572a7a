"""Dialect "decomposed": quantized_decomposed ops, which carry quant_min and quant_max.

Reads what fxqfix's `to_decomposed`, torch's `_convert_to_reference_decomposed_fx` and PT2E's
convert return.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fxqfix import _pt2e, ops
from fxqfix.dialects._base import (
    Reading,
    Tap,
    inside,
    is_exported,
    modules_of,
    op_name,
    scope,
    unique,
)
from fxqfix.dialects._constants import bias_of, constant, constants, reader, role
from fxqfix.dialects._decomposed_ops import (
    arguments,
    is_blockwise,
    is_dequantize,
    is_quantize,
    kind_of,
    qparams_of_op,
)
from fxqfix.dialects.site import Site
from fxqfix.dialects.weights import WeightView, reference_weight
from fxqfix.names import RowKind
from fxqfix.qparams import QParams, quantize

__all__ = [
    "NAME",
    "arguments",
    "code_pin",
    "floats_of",
    "held_by",
    "is_blockwise",
    "is_dequantize",
    "is_pin",
    "is_pinned",
    "is_quantize",
    "matches",
    "qparams_of_op",
    "read",
]

NAME = "decomposed"
PLACE = 30


_CLAMPS = (torch.clamp, torch.ops.aten.clamp.default)


def matches(graph_module: fx.GraphModule) -> bool:
    """True where any node is a quantized_decomposed (or a torchao) quantize or dequantize."""
    nodes = graph_module.graph.nodes
    return any(kind_of(node) is not None or is_blockwise(node) for node in nodes)


def is_pin(node: fx.Node) -> bool:
    """True for the clamp that PinRanges sets before a narrow quantize.

    Told by its structure, so that it is still known after saving and loading: its bounds are the
    real values of the codes that the quantize behind it allows.
    """
    bounds, users = clamp_bounds(node), list(node.users)
    if bounds is None or not users or any(kind_of(u) != ("quantize", "per_tensor") for u in users):
        return False
    given = arguments(users[0])
    if not isinstance(given["scale"], float):
        return False
    names = ("scale", "zero_point", "quant_min", "quant_max")
    return bounds == pin_bounds(*(given[name] for name in names))


def code_pin(node: fx.Node) -> fx.Node | None:
    """The clamp behind a quantize that keeps its codes in their range; None without one."""
    users, given = list(node.users), arguments(node)
    if kind_of(node) != ("quantize", "per_tensor") or len(users) != 1:
        return None
    if users[0].target not in _CLAMPS:
        return None
    bounds = (given["quant_min"], given["quant_max"])
    return users[0] if users[0].args == (node, *bounds) else None


def floats_of(node: fx.Node) -> torch.dtype:
    """The dtype that a quantize op's value comes back in: what is quantized has it too.

    Args:
        node: The quantize op, or the clamp of its codes.
    """
    for user in node.users:
        if clamp_bounds(user) is None and user.target in _CLAMPS:
            return floats_of(user)  # of codes
        if not is_dequantize(user):
            continue
        cast = next((u for u in user.users if u.target is torch.ops.aten.to.dtype), None)
        given = user.kwargs.get("out_dtype") or (cast.args[1] if cast is not None else None)
        if isinstance(given, torch.dtype):
            return given
    return torch.float32


def clamp_bounds(node: fx.Node) -> tuple[float, float] | None:
    """The bounds of a clamp to two constants; None for any other node."""
    if node.target not in _CLAMPS:
        return None
    # Some builds of torch load a saved program's optional arguments by name.
    given = {**dict(zip(("min", "max"), node.args[1:], strict=False)), **node.kwargs}
    low, high = given.get("min"), given.get("max")
    return (low, high) if isinstance(low, float) and isinstance(high, float) else None


def pinned_range(node: fx.Node, scale: float, zero_point: int) -> tuple[int, int] | None:
    """The codes that a clamp holds, where its bounds are the real values of codes; else None.

    Args:
        node: What is quantized.
        scale: The scale that it is quantized with.
        zero_point: The zero point.
    """
    bounds = clamp_bounds(node)
    if bounds is None:
        return None
    low, high = (round(b / scale) + zero_point for b in bounds)
    return (low, high) if bounds == pin_bounds(scale, zero_point, low, high) else None


def pin_bounds(scale: float, zero_point: int, low: int, high: int) -> tuple[float, float]:
    """The real values of the lowest and the highest code of a range."""
    return (low - zero_point) * scale, (high - zero_point) * scale


def read(graph_module: fx.GraphModule) -> Reading:
    """Read every decomposed quantize op and every integer weight as a site."""
    modules = modules_of(graph_module)
    taken: set[str] = set()
    taps: list[Tap] = []
    hidden: list[tuple[Site, str]] = []
    # Elsewhere than in PT2E, a constant that is computed is observed as an activation is.
    fixed = constants(graph_module) if is_exported(graph_module) else frozenset[fx.Node]()
    first: dict[tuple[fx.Node, QParams | None], int] = {}  # the place of a weight's tap
    for node in graph_module.graph.nodes:
        kind = kind_of(node)
        if node.op == "call_module" and (w := reference_weight(modules[str(node.target)])):
            site = Site(
                name=unique(f"{node.name}.weight", taken),
                kind="weight",
                module=str(node.target),
                op=op_name(node, modules),
                used=w.qparams,
                source="reference module",
                shape=tuple(w.codes.shape),
            )
            taps.append(Tap(site, node, node, lambda w=w: w))  # type: ignore[misc]
        if is_blockwise(node):
            hidden += _hidden_blocks(graph_module, node, fixed, taken)
        if kind is None:
            continue
        if arguments(node)["dtype"].is_floating_point:
            hidden += _hidden_floats(graph_module, node, fixed, taken)
            continue
        qparams, source = qparams_of_op(node, graph_module), node.args[0]
        if source.op == "get_attr" or (kind[0] == "quantize" and source in fixed):
            at = first.setdefault((source, qparams), len(taps))
            if at == len(taps):
                taps.append(_weight(graph_module, node, qparams, taken))
            else:  # convert_pt2e repeats dequantize for each reader
                again = _read_by(node, modules)[:2]
                taps[at] = replace(taps[at], repeats=(*taps[at].repeats, again))
        elif kind[0] == "quantize":
            tap = _activation(graph_module, node, qparams, taken)
            if qparams is None:
                hidden.append((tap.site, "qparams are chosen at run time (dynamic)"))
            else:
                taps.append(tap)
    hidden += inside(graph_module, read)
    return Reading(graph_module, NAME, tuple(taps), tuple(hidden), carries_ranges=True)


def _hidden_floats(
    graph_module: fx.GraphModule, node: fx.Node, fixed: frozenset[fx.Node], taken: set[str]
) -> list[tuple[Site, str]]:
    """The site of a quantize to floats of fewer bits, or of the dequantize of such a constant."""
    modules, dtype = modules_of(graph_module), arguments(node)["dtype"]
    source: Any = node.args[0]
    if is_dequantize(node) and source.op != "get_attr":
        return []  # counted at its quantize
    kind: RowKind = "activation"
    producer, shape, name = source, None, source.name
    if source.op == "get_attr" or source in fixed:
        producer, kind = _op_behind(node), "weight"
        shape = tuple(constant(graph_module, source).shape)
        name = f"{producer.name}.weight"
    place = scope(producer, graph_module), op_name(producer, modules)
    site = Site(unique(name, taken), kind, *place, source=f"floats of {dtype}", shape=shape)
    return [(site, f"its values become floats of {dtype}, not integers")]


def _hidden_blocks(
    graph_module: fx.GraphModule, node: fx.Node, fixed: frozenset[fx.Node], taken: set[str]
) -> list[tuple[Site, str]]:
    """The site of a blockwise quantize, or of the dequantize of a constant; none for the others."""
    modules, source = modules_of(graph_module), node.all_input_nodes[0]
    reason = "grids by block, group or token are no QParams"
    if source in fixed:
        user = reader(node, modules)
        if is_blockwise(user):
            return []  # quantized and dequantized in the graph: counted at the dequantize
        name = unique(f"{user.name}.{role(node, user, modules)}", taken)
        shape = tuple(constant(graph_module, source).shape)
        place = scope(user, graph_module), op_name(user, modules)
        return [(Site(name, "weight", *place, source="blockwise", shape=shape), reason)]
    if "dequantize" in str(node.target):
        return []
    place = scope(source, graph_module), op_name(source, modules)
    name = unique(source.name, taken)
    return [(Site(name, "activation", *place, source="blockwise"), reason)]


def _activation(
    graph_module: fx.GraphModule, node: fx.Node, qparams: QParams | None, taken: set[str]
) -> Tap:
    producer = node.all_input_nodes[0]
    if is_pin(producer):
        producer = producer.all_input_nodes[0]
    site = Site(
        name=unique(producer.name, taken),
        kind="activation",
        module=scope(producer, graph_module),
        op=op_name(producer, modules_of(graph_module)),
        used=qparams,
        source="dynamic" if qparams is None else "quantize op's arguments",
        quantizes=qparams is not None,
    )
    pin = code_pin(node)
    held = node if pin is not None else None
    return Tap(site, pin or node, producer, held=held, origins=_pt2e.origins(node))


def is_pinned(tap: Tap, reading: Reading) -> bool:
    """Whether a clamp keeps a site's codes in their range, or those of the codes that it reads.

    Args:
        tap: The site.
        reading: The graph's.
    """
    if tap.held is not None or clamp_bounds(tap.node.all_input_nodes[0]) is not None:
        return True
    sources = held_by(tap, reading)
    return bool(sources) and all(is_pinned(source, reading) for source in sources)


def only_picks(found: ops.Match | None) -> bool:
    """Whether an op only picks values of its inputs: reshapes, cat and max pools do."""
    if found is None or found.relu:
        return False
    return found.spec.output == "shape" or found.spec.values == "picked"


def held_by(tap: Tap, reading: Reading) -> tuple[Tap, ...]:
    """The sites whose ranges keep a site's codes in its own, all of them on its own grid.

    Those of an op that only picks values or moves them towards zero: on one grid and in one range,
    with zero inside, there is no code outside for it to give. Empty for any other op.
    """
    modules, used = modules_of(reading.graph_module), tap.site.used
    found = ops.match_node(tap.producer, modules)
    moves = used is not None and _moves_to_zero(tap.producer, found, modules) and _has_zero(used)
    if not (only_picks(found) or moves):
        return ()
    taps = {t.node: t for t in reading.activations}
    read = [n.all_input_nodes[0] for n in tap.producer.all_input_nodes if is_dequantize(n)]
    sources = tuple(taps[n] for n in read if n in taps and taps[n].site.used == used)
    return sources if len(sources) == len(tap.producer.all_input_nodes) else ()


def _has_zero(qparams: QParams) -> bool:
    points = qparams.zero_points
    return all(qparams.quant_min <= point <= qparams.quant_max for point in points)


def _moves_to_zero(
    node: fx.Node, found: ops.Match | None, modules: Mapping[str, nn.Module]
) -> bool:
    if found is None or found.spec.values != "to-zero":
        return False
    if found.key != "hardtanh":
        return True
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    given = dict(zip(("min_val", "max_val"), node.args[1:], strict=False)) | node.kwargs
    low = getattr(module, "min_val", given.get("min_val", -1.0))
    high = getattr(module, "max_val", given.get("max_val", 1.0))
    return isinstance(low, (int, float)) and isinstance(high, (int, float)) and low <= 0 <= high


def _weight(
    graph_module: fx.GraphModule, node: fx.Node, qparams: QParams | None, taken: set[str]
) -> Tap:
    source: Any = node.args[0]
    value, modules = constant(graph_module, source), modules_of(graph_module)
    assert qparams is not None  # a constant's are constants too
    node, user, name = _read_by(node, modules)
    site = Site(
        name=unique(name or f"{_owner(user)}.weight", taken),
        kind="weight",
        module=scope(user, graph_module),
        op=op_name(user, modules),
        used=qparams,
        source="integer buffer",
        shape=tuple(value.shape),
    )

    def view() -> WeightView:
        bias = bias_of(user, graph_module)
        if value.is_floating_point():
            return WeightView(quantize(value, qparams), qparams, bias, value)
        return WeightView(value, qparams, bias)

    return Tap(site, user, node, view, origins=_pt2e.origins(node))


def _read_by(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[fx.Node, fx.Node, str]:
    """The node that makes a weight's values, the op that reads them, and the weight's name."""
    user = _op_behind(node)
    if getattr(user.target, "namespace", "") != "aten":
        return node, user, ""
    user = reader(node, modules)
    if kind_of(user) is not None:  # of a quantize op, the dequantize behind it
        node, user = user, reader(user, modules)
    return node, user, f"{user.name}.{role(node, user, modules)}"


def _op_behind(node: fx.Node) -> fx.Node:
    """The first op behind a weight's quantize / dequantize nodes."""
    current = node
    for user in _chain(node):
        current = user
        if kind_of(user) is None and user.target not in ("to", torch.ops.aten.t.default):
            break
    return current


def _chain(node: fx.Node) -> Iterator[fx.Node]:
    while node.users:
        node = next(iter(node.users))
        yield node


def _owner(node: fx.Node) -> str:
    """Name of the value that this op's site quantizes: itself, or what is fused behind it."""
    for user in _chain(node):
        if kind_of(user) is not None:
            producer = user.all_input_nodes[0]
            return (producer.all_input_nodes[0] if is_pin(producer) else producer).name
        if len(user.users) > 1 or any(map(_is_weight, user.all_input_nodes)):
            break  # behind it is another op, whose site and whose weight have that name
    return node.name


def _is_weight(node: fx.Node) -> bool:
    """Whether a node dequantizes a constant."""
    while kind_of(node) is not None:
        node = node.all_input_nodes[0]
        if node.op == "get_attr":
            return True
    return False

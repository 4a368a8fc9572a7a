"""What the quantizers of a prepared model hold, read when a cause asks for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from fxqfix import _torch, ops
from fxqfix.causes import Held
from fxqfix.dialects import Reading, Tap, decomposed
from fxqfix.dialects._arguments import output_arguments
from fxqfix.dialects._base import modules_of
from fxqfix.dialects._constants import constant, constants, reader
from fxqfix.dialects.prepared import shared_calls
from fxqfix.dialects.quantizer import buffers_of, read_quantizer
from fxqfix.dialects.weights import weight_quantizer
from fxqfix.evidence.steps import alike
from fxqfix.pairing import Pair, Pairing

__all__ = ["blocks", "floats", "holdings", "picked", "unmoved", "weight_node"]


def weight_node(tap: Tap) -> fx.Node:
    """The node whose module holds a prepared weight's fake-quant."""
    return tap.quantizer or tap.node


def holdings(reading: Reading, tap: Tap, still: bool = False) -> Callable[[str], Held | None]:
    """A function from "" or the path of a weight's module to what that quantizer holds.

    Args:
        reading: The prepared model.
        tap: The site that "" stands for.
        still: Whether no observer moved since the conversion; see `unmoved`.
    """
    weights = {str(weight_node(t).target): t for t in reading.weights}

    @functools.cache
    def held(path: str) -> Held | None:
        found = weights.get(path) if path else tap
        return _held(reading, found, still) if found is not None else None

    return held


def _held(reading: Reading, tap: Tap, still: bool) -> Held | None:
    weight = tap.site.kind == "weight"
    path = str((weight_node(tap) if weight else tap.node).target)
    quantizer: Any = reading.graph_module.get_submodule(path)
    own = _torch.is_quantizer(quantizer) or hasattr(quantizer, "weight_fake_quant")
    if not _torch.is_quantizer(quantizer):
        quantizer = weight_quantizer(quantizer)
    if quantizer is None or tap.site.used is None:
        return None
    state = read_quantizer(quantizer, path)
    observer = getattr(quantizer, "activation_post_process", quantizer)
    return Held(
        used=tap.site.used,
        given=state.baked,
        moved=tap.site.baked,
        buffers=buffers_of(quantizer) if _torch.is_fake_quant(quantizer) else None,
        source=state.source,
        observing=own and state.observing,  # a PTQ weight's observer is made anew each time
        calibrated=state.calibrated,
        observed=hasattr(observer, "min_val"),
        seen=_seen(observer),
        still=still,
    )


def unmoved(reading: Reading, pairs: list[Pair]) -> bool:
    """Whether at least half of the observers of values that are on give what was converted.

    Args:
        reading: The prepared model.
        pairs: Its activation sites and the converted ones.
    """
    found = []
    for p in pairs:
        held = _held(reading, p.prepared, still=False)
        if held is not None and held.observing and held.calibrated:
            used = p.converted.site.used
            found.append(used is not None and alike(used, held.given))
    return bool(found) and 2 * sum(found) >= len(found)


def _seen(observer: Any) -> tuple[float, float] | None:
    """The range of an observer whose range only grows; None for others, and for channels."""
    kinds: list[Any] = [
        _torch.resolve(f"torch.ao.quantization.{name}")
        for name in ("MinMaxObserver", "HistogramObserver")
    ]
    if type(observer) not in kinds or observer.min_val.numel() != 1:
        return None
    return float(observer.min_val), float(observer.max_val)


def picked(reading: Reading) -> Callable[[Tap], str]:
    """A function from a converted value to why no quantizer chose its grid, "" where one did.

    Args:
        reading: The converted model; int8 kernels only have grids of their own.
    """
    if not reading.has_kernels:
        return lambda tap: ""
    modules = modules_of(reading.graph_module)
    # By name: shadows are woven into a copy.
    shared = shared_calls(reading.graph_module).values()
    calls = {node.name: len(nodes) for nodes in shared for node in nodes[:-1]}  # the last one's

    def why(tap: Tap) -> str:
        node, match = tap.kernel, ops.match_node(tap.kernel, modules)
        if match is None or match.key == "quantize":
            return ""
        if node.name in calls:
            return f"{node.target} is called {calls[node.name]} times and has one output grid"
        if tap.inherited:
            return f"the kernel of {match.key} works it out of its input's grid"
        own = node.op == "call_module" or any(v is not None for v in output_arguments(node))
        fixed = match.spec.output == "fixed" and not own
        return f"the kernel of {match.key} has one grid only" if fixed else ""

    return why


def blocks(prepared: fx.GraphModule, reading: Reading) -> dict[str, Tensor]:
    """Node of a prepared weight -> the values that a conversion gives it, by block, group or token.

    Args:
        prepared: The prepared graph, which leaves such weights in float.
        reading: The converted model.
    """
    if not reading.carries_ranges:
        return {}
    modules = modules_of(reading.graph_module)
    nodes = {node.name: node for node in prepared.graph.nodes}
    fixed, found = constants(reading.graph_module), dict[str, Tensor]()
    for node in fixed:
        if not decomposed.is_blockwise(node) or "dequantize" not in str(node.target):
            continue
        user = reader(node, modules)
        own = nodes.get(user.name)
        if own is not None and node in user.args and len(own.args) == len(user.args):
            weight = own.args[user.args.index(node)]
            found[weight.name] = constant(reading.graph_module, node)
    return found


def floats(pairing: Pairing) -> dict[str, tuple[str, Tensor | None]]:
    """What only the prepared model quantizes: fake-quants by node, float weights by path.

    Args:
        pairing: The sites of both models.
    """
    found: dict[str, tuple[str, Tensor | None]] = {}
    for tap, side, _ in pairing.unpaired:
        if side != "prepared" or tap.site.used is None:
            continue
        if tap.weight is None:
            found[tap.node.name] = tap.site.name, None
        elif tap.producer.op == "get_attr":
            found[weight_node(tap).name] = tap.site.name, None
        else:
            found[str(tap.node.target)] = tap.site.name, tap.weight().values
    return found

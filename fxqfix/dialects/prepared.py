"""Dialect "fx-prepared": observers and fake-quants as modules in the graph.

Reads what `prepare_fx` and `prepare_qat_fx` return, and eager prepared models once traced.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from fxqfix import _torch, ops
from fxqfix._observers import answers
from fxqfix.dialects._base import Reading, Tap, modules_of, op_name, scope, unique
from fxqfix.dialects._constants import bias_of
from fxqfix.dialects.quantizer import QuantizerState, read_quantizer
from fxqfix.dialects.site import Site
from fxqfix.dialects.weights import WeightView, holder, prepared_weight, weight_quantizer
from fxqfix.errors import UnsupportedError
from fxqfix.qparams import quantize

__all__ = ["NAME", "matches", "qparams_fields", "read", "refuse_equalized", "shared_calls", "where"]

NAME = "fx-prepared"
PLACE = 20


def matches(graph_module: fx.GraphModule) -> bool:
    """True where any module that the graph calls is, or holds, an observer or a fake-quant.

    Also where prepare_fx put none into the graph: weights alone are observed at conversion.
    """
    paths = {str(n.target) for n in graph_module.graph.nodes if n.op == "call_module"}
    called = [graph_module.get_submodule(path) for path in paths]
    if any(_torch.is_quantizer(m) for root in called for m in root.modules()):
        return True
    observed = _torch.observed_attributes(graph_module)
    names = observed.observed_node_names if observed is not None else ()
    nodes = [n for n in graph_module.graph.nodes if n.op == "call_module" and n.name in names]
    return any(weight_quantizer(graph_module.get_submodule(str(n.target))) for n in nodes)


def read(graph_module: fx.GraphModule, *, settled: bool = True) -> Reading:
    """Read every observer, fake-quant and quantized weight as a site.

    Args:
        graph_module: A prepared graph.
        settled: Whether weights' observers that are on are moved as conversion moves them; without
            it, `baked` is what they hold now, in half the time.
    """
    modules = modules_of(graph_module)
    observed = _torch.observed_attributes(graph_module)
    taken: set[str] = set()
    taps: list[Tap] = []
    hidden: list[tuple[Site, str]] = []
    states: dict[int, QuantizerState] = {}
    known = answers(modules.values())
    refuse_equalized(graph_module)
    for node in graph_module.graph.nodes:
        module = modules[str(node.target)] if node.op == "call_module" else None
        if module is None:
            continue
        if _torch.is_quantizer(module):
            if id(module) not in states:  # a shared observer is read once
                states[id(module)] = read_quantizer(module, where(node), known)
            taps.append(_quantizer_tap(graph_module, node, states[id(module)], modules, taken))
        elif (found := ops.match_node(node, modules)) is not None and found.spec.family in (
            "recurrent",
            "attention",
        ):
            hidden += _inner_sites(node, module, found.key, taken)
        elif (
            observed is None
            or hasattr(module, "weight_fake_quant")
            or node.name in observed.observed_node_names
        ):
            path = f"{node.target}.weight"
            weight = prepared_weight(module, path, settled=settled, known=known)
            if weight is not None:
                taps.append(_weight_tap(node, module, weight, modules, taken))
    return Reading(graph_module, NAME, tuple(taps), tuple(hidden), prepared=True)


def refuse_equalized(model: nn.Module) -> None:
    """Refuse models that prepare_fx was given an equalization config for.

    Args:
        model: A prepared model.

    Raises:
        UnsupportedError: It holds an observer of torch's equalization.
    """
    for path, module in model.named_modules():
        if type(module).__name__ in ("_InputEqualizationObserver", "_WeightEqualizationObserver"):
            raise UnsupportedError(
                "a model prepared for equalization computes something else than its conversion, "
                "which rescales inputs and weights by what these observers saw",
                where="prepared",
                found=f"{type(module).__name__} at {path!r}",
                remedy="prepare without _equalization_config; for equal ranges, equalize the float "
                "model first (torch.ao.quantization's cross-layer equalize)",
            )


def shared_calls(graph_module: fx.GraphModule) -> Mapping[str, list[fx.Node]]:
    """Path -> calls, of modules that are called more than once and convert with an output scale.

    Args:
        graph_module: A prepared graph.
    """
    modules = modules_of(graph_module)
    found: defaultdict[int, list[fx.Node]] = defaultdict(list)
    for node in graph_module.graph.nodes:
        match = ops.match_node(node, modules) if node.op == "call_module" else None
        if match is not None and match.spec.output == "own":
            found[id(modules[str(node.target)])].append(node)
    return {str(nodes[0].target): nodes for nodes in found.values() if len(nodes) > 1}


def where(node: fx.Node) -> str:
    """A quantizer's place in words: the value that it quantizes and its own path."""
    return f"site {node.all_input_nodes[0].name!r} ({node.target})"


def _quantizer_tap(
    graph_module: fx.GraphModule,
    node: fx.Node,
    state: QuantizerState,
    modules: Mapping[str, nn.Module],
    taken: set[str],
) -> Tap:
    producer = node.all_input_nodes[0]
    if producer.op == "get_attr":  # the weight of a functional op
        user = next(iter(node.users), node)
        value: Any = _attribute(graph_module, str(producer.target))
        used = state.used
        site = Site(
            name=unique(f"{user.name}.weight", taken),
            kind="weight",
            module=scope(user, graph_module),
            op=op_name(user, modules),
            shape=tuple(value.shape),
            **qparams_fields(state),
        )
        view = None
        if used is not None:
            bias = bias_of(user, graph_module)
            view = lambda: WeightView(quantize(value, used), used, bias, value)  # noqa: E731
        return Tap(site, user, producer, view, quantizer=node)
    site = Site(
        name=unique(producer.name, taken),
        kind="activation",
        module=scope(producer, graph_module),
        op=op_name(producer, modules),
        **qparams_fields(state),
    )
    return Tap(site, node, producer)


def _weight_tap(
    node: fx.Node,
    module: nn.Module,
    weight: tuple[QuantizerState, Any],
    modules: Mapping[str, nn.Module],
    taken: set[str],
) -> Tap:
    state, view = weight
    site = Site(
        name=unique(f"{node.name}.weight", taken),
        kind="weight",
        module=str(node.target),
        op=op_name(node, modules),
        shape=tuple(holder(module).weight.shape),
        **qparams_fields(state),
    )
    return Tap(site, node, node, view if state.used is not None else None)


def qparams_fields(state: QuantizerState) -> dict[str, Any]:
    """What a site takes over of its quantizer's state."""
    return {
        "used": state.used,
        "baked": state.baked,
        "source": state.source,
        "quantizes": state.quantizes,
        "calibrated": state.calibrated,
    }


def _attribute(graph_module: fx.GraphModule, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    value = getattr(graph_module.get_submodule(owner), name)
    assert isinstance(value, Tensor)  # narrows; get_attr of an observed value
    return value.detach()


def _inner_sites(
    node: fx.Node, module: nn.Module, op: str, taken: set[str]
) -> list[tuple[Site, str]]:
    """Sites inside a module that the graph does not open (LSTM, MultiheadAttention).

    Without an observer inside it is one that stays in float: parts of it may have a qconfig.
    """
    if not any(map(_torch.is_quantizer, module.modules())):
        return []
    found: list[tuple[Site, str]] = []
    reason = f"inside {type(module).__name__} {node.target!r}, which the graph does not open"
    for path, inner in module.named_modules():
        weight = prepared_weight(inner, f"{node.target}.{path}.weight")
        if weight is not None:
            name, where = unique(f"{node.name}.{path}.weight", taken), f"{node.target}.{path}"
            shape = tuple(holder(inner).weight.shape)
            site = Site(name, "weight", where, op, shape=shape, **qparams_fields(weight[0]))
            found.append((site, reason))
        if not _torch.is_quantizer(inner) or path.endswith("weight_fake_quant"):
            continue
        parent, _, own = path.rpartition(".")
        if parent and _torch.is_quantizer(module.get_submodule(parent)):
            continue  # a fake-quant's own observer
        name, where = unique(f"{node.name}.{parent or own}", taken), f"{node.target}.{parent}"
        state = read_quantizer(inner, f"{node.target}.{path}")
        found.append((Site(name, "activation", where, op, **qparams_fields(state)), reason))
    return found

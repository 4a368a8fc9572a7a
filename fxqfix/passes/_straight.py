"""The two graphs of a deployed model: the engine's integers, and the fake-quants' gradients.

Both read the parameters of one prepared model. The first returns, besides its outputs, the codes of
every site; the second takes them in place of what its fake-quants give.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from fxqfix import ops
from fxqfix.dialects import int8
from fxqfix.dialects._base import modules_of
from fxqfix.dialects._writes import is_inplace
from fxqfix.dialects.weights import holder, weight_quantizer
from fxqfix.engines import Present
from fxqfix.errors import UnsupportedError
from fxqfix.inserted import FloatIsland, QuantizedIsland
from fxqfix.names import Engine
from fxqfix.passes._in_integers import EMULATED
from fxqfix.passes._live import (
    DROPOUTS,
    Bare,
    CodesDropout,
    LiveArguments,
    LiveClosed,
    LiveConstant,
    LiveModule,
    LiveOp,
    LiveParts,
    Site,
    parameters_of,
)
from fxqfix.passes._live_sources import Sources, attribute_of, path_of
from fxqfix.passes.emulate_engine import EmulateEngine

__all__ = ["integers", "straight"]

_CLOSED = ("recurrent", "attention")


# ------------------------------------------------------------------------- fake-quants


def straight(sources: Sources, codes: Mapping[str, int]) -> fx.GraphModule:
    """The frozen graph, its weights those of the prepared model, its sites fed with codes.

    Args:
        sources: Where parameters come from.
        codes: Name of the int8 node -> its place among the codes that are handed in.

    Returns:
        A graph whose first argument is the tuple of codes.
    """
    reading = sources.frozen
    root: dict[str, Any] = {}
    graph = fx.Graph()
    given = graph.placeholder("engine_codes")
    done: dict[fx.Node, fx.Node] = {}
    sites = {
        p.prepared.node: p for p in sources.pairing.pairs if p.prepared.site.kind == "activation"
    }
    weights = {tap.node: tap for tap in sources.weights if tap.quantizer is None}
    for node in reading.graph_module.graph.nodes:
        new = done[node] = graph.node_copy(node, done.__getitem__)
        if node in sites and sites[node].prepared.site.used is not None:
            found = sites[node]
            grid = found.converted.site.used
            assert grid is not None  # an int8 value has a grid
            used = found.prepared.site.used
            assert used is not None  # a paired site quantizes
            new.target = f"site_{new.name}"
            root[new.target] = Site(used, grid, found.prepared.site.name)
            with graph.inserting_before(new):
                place = codes[found.converted.node.name]
                new.args = (*new.args, graph.call_function(operator.getitem, (given, place)))
        elif node in weights:
            new.target = f"live_{new.name}"
            root[new.target] = sources.live(weights[node])
        elif node.op == "call_module":
            root[path_of(node)] = _module(sources, path_of(node))
        elif node.op == "get_attr":
            root[path_of(node)] = _value(sources, reading.graph_module, path_of(node))
    graph.lint()
    return fx.GraphModule(root, graph, "Straight")


def _module(sources: Sources, path: str) -> nn.Module:
    own = sources.frozen.graph_module.get_submodule(path)
    theirs = sources.module(path)
    if theirs is None or type(theirs) is not type(own):
        if next(own.parameters(), None) is None:
            return own
        raise UnsupportedError(
            f"{type(own).__name__} has parameters that no prepared module holds",
            where=f"as_deployed, {path}",
            remedy="train the prepared model, and give the result to to_int8",
        )
    row = ops.match(type(theirs))
    if row is not None and row.spec.family in _CLOSED:
        quantizers = {
            path: quantizer
            for path, live in sources.parts(theirs).items()
            if not hasattr(live.owner, "weight_fake_quant")
            and (quantizer := weight_quantizer(live.owner)) is not None
        }
        return LiveClosed(theirs, quantizers)
    hooked = bool(theirs._forward_hooks or theirs._forward_pre_hooks)
    return Bare(theirs) if hooked else theirs


def _value(sources: Sources, model: nn.Module, path: str) -> Any:
    found = attribute_of(sources.prepared, path)
    return attribute_of(model, path) if found is None else found


# ------------------------------------------------------------------------- integers


@dataclass(frozen=True)
class _Trained(EmulateEngine):
    """emulate-engine, with parameters that move."""

    presents: Mapping[str, Present] = field(default_factory=dict, hash=False)

    def present(self, node: fx.Node) -> Present | None:
        """By the node's name."""
        return self.presents.get(node.name)


def integers(
    sources: Sources, engine: Engine, isa: Any, threads: int | None
) -> tuple[fx.GraphModule, dict[str, int]]:
    """The emulated int8 graph, its parameters those of the prepared model.

    Args:
        sources: Where parameters come from.
        engine: As `emulate` takes it.
        isa: As `emulate` takes it.
        threads: As `emulate` takes it.

    Returns:
        A graph that returns its outputs, quantized ones as values, and a tuple of codes; and the
        place of each int8 node's codes among them.
    """
    model = sources.converted.graph_module
    presents = _presents(sources)
    grids = int8.propagate(model)
    emulated = _Trained(engine, isa, threads, presents=presents)(model).graph_module
    nodes = {n.name.removeprefix(EMULATED): n for n in emulated.graph.nodes}
    _follow(sources, emulated, nodes)
    _drop(sources, emulated, nodes, grids)
    taps = [p.converted for p in sources.pairing.pairs if p.converted.site.kind == "activation"]
    names = list(dict.fromkeys(tap.node.name for tap in taps))
    _check_all_read(sources, emulated, presents)
    output = emulated.graph.output_node()
    with emulated.graph.inserting_before(output):
        returned = fx.map_arg(output.args[0], lambda n: _as_values(emulated, n, nodes, grids))
    output.args = ((returned, tuple(_kept(emulated, nodes[name]) for name in names)),)
    emulated.graph.lint()
    emulated.recompile()
    return emulated, {name: place for place, name in enumerate(names)}


def _kept(emulated: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Codes as they are at this node, where a later op writes over them."""
    modules = modules_of(emulated)
    if not any(is_inplace(user, modules) for user in node.users):
        return node
    with emulated.graph.inserting_after(node):
        return emulated.graph.call_method("clone", (node,))


def _as_values(
    emulated: fx.GraphModule, node: fx.Node, nodes: Mapping[str, fx.Node], grids: Any
) -> fx.Node:
    """A returned value: codes are dequantized."""
    grid = next((q for n, q in grids.items() if nodes.get(n.name) is node), None)
    if grid is None:
        return node
    from fxqfix.engines.boundary import Dequantize

    path = f"returned_{node.name}"
    emulated.add_module(path, Dequantize(grid))
    return emulated.graph.call_module(path, (node,))


def _presents(sources: Sources) -> dict[str, Present]:
    """Name of an int8 node -> what gives its parameters."""
    found: dict[str, Present] = {}
    for p in sources.pairing.pairs:
        if p.prepared in sources.weights and p.converted.quantizer is None:
            found[p.converted.node.name] = sources.weights[p.prepared]
    model = sources.converted.graph_module
    modules = modules_of(model)
    for node in model.graph.nodes:
        if node.op == "call_module" and node.name not in found:
            module, theirs = modules[path_of(node)], sources.module(path_of(node))
            row = ops.match_node(node, modules)
            if theirs is not None and row is not None and row.spec.family in _CLOSED:
                found[node.name] = LiveParts(theirs, sources.parts(theirs))
                continue
            floats = [*module._parameters.values(), *module._buffers.values()]
            kept = any(isinstance(t, Tensor) and t.is_floating_point() for t in floats)
            if kept and theirs is not None and not isinstance(module, FloatIsland):
                found[node.name] = LiveModule(holder(theirs))
        elif node.op == "call_function":
            names = int8.bound(node)
            held = {
                k: (sources.prepared, path_of(n))
                for k, n in names.items()
                if isinstance(n, fx.Node)
                and n.op == "get_attr"
                and isinstance(attribute_of(sources.prepared, path_of(n)), nn.Parameter)
            }
            if held and node.name not in found:
                found[node.name] = LiveArguments(held)
    return found


def _follow(sources: Sources, emulated: fx.GraphModule, nodes: Mapping[str, fx.Node]) -> None:
    """Let what stays in float, and constants, read the prepared model's parameters."""
    taps = {p.converted.node.name: p.prepared for p in sources.pairing.pairs}
    constants = {
        p.converted.quantizer.name: p.prepared
        for p in sources.pairing.pairs
        if p.converted.quantizer is not None and p.prepared in sources.weights
    }
    for name, tap in constants.items():
        emulated.set_submodule(path_of(nodes[name]), LiveConstant(sources.weights[tap]))
    for name, node in nodes.items():
        if node.op == "get_attr":
            found = attribute_of(sources.prepared, path_of(node))
            if isinstance(found, Tensor):
                _set(emulated, path_of(node), found)
        if node.op != "call_module" or node.name.startswith(EMULATED):
            continue
        module, own = emulated.get_submodule(path_of(node)), taps.get(name)
        if isinstance(module, FloatIsland) and own in sources.weights:
            module.inner = sources.op(own, module.inner)
        elif isinstance(module, QuantizedIsland) and own in sources.weights:
            module.island.inner = sources.op(own, module.island.inner)
        elif isinstance(module, FloatIsland) and next(module.parameters(), None) is not None:
            path = path_of(node).removesuffix(".island")
            module.inner = _module_of_floats(sources, module.inner, path)
        elif any(True for _ in (*module.parameters(), *module.buffers())):
            emulated.set_submodule(path_of(node), _module_of_floats(sources, module, path_of(node)))


def _drop(
    sources: Sources, emulated: fx.GraphModule, nodes: Mapping[str, fx.Node], grids: Any
) -> None:
    """Let dropout drop in train mode, where the int8 model has it switched off for good."""
    codes = {
        n.name: (grids.get(n.all_input_nodes[0]), q) for n, q in grids.items() if n.all_input_nodes
    }
    for node in sources.frozen.graph_module.graph.nodes:
        theirs = sources.module(path_of(node)) if node.op == "call_module" else None
        own = nodes.get(node.name)
        if own is None or not isinstance(theirs, DROPOUTS):
            continue
        if own.op == "call_function":  # in float, on its way round a kernel
            emulated.add_module(f"drop_{own.name}", theirs)
            own.op, own.target = "call_module", f"drop_{own.name}"
            own.args, own.kwargs = own.args[:1], {}
        elif node.name in codes and own.name.startswith(EMULATED):
            source, grid = codes[node.name]
            assert source is not None  # dropout keeps codes, and so has been given some
            emulated.set_submodule(path_of(own), CodesDropout(theirs, source, grid))


def _module_of_floats(sources: Sources, module: nn.Module, path: str) -> nn.Module:
    theirs = sources.module(path)
    if theirs is not None and type(theirs) is type(module):
        return theirs
    raise UnsupportedError(
        f"{type(module).__name__} holds parameters that no prepared module holds as they are",
        where=f"as_deployed, {path}",
        found="nothing of that kind" if theirs is None else type(theirs).__name__,
        remedy="train the prepared model, and give the result to to_int8",
    )


def _check_all_read(
    sources: Sources, emulated: fx.GraphModule, presents: Mapping[str, Present]
) -> None:
    """Every parameter that the prepared model reads has to reach the integers."""
    due = dict[int, str]()
    names = {id(p): name for name, p in sources.prepared.named_parameters()}
    for live in sources.weights.values():
        due.update({id(p): names[id(p)] for p in parameters_of(live)})
    for node in sources.frozen.graph_module.graph.nodes:
        held = sources.module(path_of(node)) if node.op == "call_module" else None
        due.update({id(p): names[id(p)] for p in _read_by(held)})
        if node.op == "get_attr" and path_of(node) in names.values():
            due[id(attribute_of(sources.prepared, path_of(node)))] = path_of(node)
    lives = [m.live for m in emulated.modules() if isinstance(m, LiveOp | LiveConstant)]
    read = {id(p) for source in (*presents.values(), *lives) for p in parameters_of(source)}
    missing = [
        name for key, name in due.items() if key not in read | set(map(id, emulated.parameters()))
    ]
    if missing:
        raise UnsupportedError(
            "parameters can't be trained as they are deployed: no row reads them while they move",
            where="as_deployed",
            found=", ".join(missing[:5]),
            remedy="train the prepared model, and give the result to to_int8",
        )


def _read_by(module: nn.Module | None) -> Iterator[nn.Parameter]:
    """The parameters of a module, of attention without those that its float form alone reads."""
    for name, parameter in module.named_parameters() if module is not None else ():
        if not name.rpartition(".")[2].startswith("in_proj_"):
            yield parameter


def _set(model: nn.Module, path: str, value: Tensor) -> None:
    owner, _, name = path.rpartition(".")
    parent = model.get_submodule(owner)
    if isinstance(value, nn.Parameter):
        delattr(parent, name)
        parent.register_parameter(name, value)
    else:
        setattr(parent, name, value)

"""What every dialect's reader gives: taps, which tie a site to its nodes in the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import fx, nn

from fxqfix import _torch, ops
from fxqfix.dialects._modes import trains
from fxqfix.dialects.site import Inspection, Site
from fxqfix.dialects.weights import WeightView
from fxqfix.errors import UnknownNameError

__all__ = [
    "Modules",
    "Reading",
    "Tap",
    "inside",
    "is_exported",
    "modules_of",
    "op_name",
    "parents",
    "scope",
    "unique",
]


@dataclass(frozen=True)
class Tap:
    """A site and where its value flows in the graph.

    Attributes:
        site: The public record.
        node: The node whose output is the quantized value: a fake-quant's, an int8 kernel's, a
            quantize op's, or what holds the range behind those; for a weight, the op that uses it.
        producer: The node that computes the value to be quantized.
        weight: Weights only: reads the codes, their qparams, the bias and the float values.
        inherited: The value keeps its input's qparams, so that it is a site only if the other
            model has one there.
        held: Where `node` only holds the range (`hold_range`): the node that computes the codes.
        quantizer: Prepared weights with an observer or fake-quant in the graph: its node.
        origins: Names of the nodes that it was made from, where the conversion recorded them
            (PT2E); for a prepared site the name of its quantizer's node.
        repeats: Decomposed weights only: the other nodes that make the same values of the same
            constant, each with the op that reads it (convert_pt2e repeats dequantize per reader).
    """

    site: Site
    node: fx.Node
    producer: fx.Node
    weight: Callable[[], WeightView] | None = None
    inherited: bool = False
    held: fx.Node | None = None
    quantizer: fx.Node | None = None
    origins: frozenset[str] = frozenset()
    repeats: tuple[tuple[fx.Node, fx.Node], ...] = ()

    @property
    def kernel(self) -> fx.Node:
        """The node that computes the codes: `node`, or the one whose range `node` holds."""
        return self.node if self.held is None else self.held


@dataclass(frozen=True)
class Reading:
    """A graph module as a dialect understands it.

    Attributes:
        graph_module: The graph that was read (the caller's own; readers change nothing).
        dialect: Name of the dialect.
        taps: One per site, in graph order.
        unsupported: Sites that can be read but not followed in the graph, with the reason.
        prepared: Whether the model is a prepared one, of any flow.
        exported: Whether its graph is one of torch.export before conversion: it has no mode but in
            its calls, and runs on no engine's own kernels.
        has_kernels: Whether its ops run on an engine's integer kernels.
        carries_ranges: Whether every quantize op of it says its quant_min and quant_max, and its
            ops compute on floats.
    """

    graph_module: fx.GraphModule
    dialect: str
    taps: tuple[Tap, ...]
    unsupported: tuple[tuple[Site, str], ...] = ()
    prepared: bool = False
    exported: bool = False
    has_kernels: bool = False
    carries_ranges: bool = False

    @property
    def inspection(self) -> Inspection:
        """The public view: sites only."""
        sites = [t.site for t in self.taps if not t.inherited]
        return Inspection(
            self.dialect,
            (*sites, *(site for site, _ in self.unsupported)),
            tuple((site.name, reason) for site, reason in self.unsupported),
        )

    @property
    def training(self) -> bool:
        """Whether the model is in train mode; an exported one has no mode but in its calls."""
        if self.exported:
            return any(trains(node) for node in self.graph_module.graph.nodes)
        return self.graph_module.training

    @property
    def activations(self) -> tuple[Tap, ...]:
        """The taps of activations."""
        return tuple(t for t in self.taps if t.site.kind == "activation")

    @property
    def weights(self) -> tuple[Tap, ...]:
        """The taps of weights."""
        return tuple(t for t in self.taps if t.site.kind == "weight")

    def tap(self, name: str) -> Tap:
        """The tap of the site of that name."""
        for tap in self.taps:
            if tap.site.name == name:
                return tap
        raise UnknownNameError(f"no site is named {name!r}", where=self.dialect)


def inside(
    graph_module: fx.GraphModule, read: Callable[[fx.GraphModule], Reading]
) -> list[tuple[Site, str]]:
    """Sites of the sub-graphs that an exported graph hands to its control flow (while_loop, scan).

    Args:
        graph_module: The graph.
        read: Its dialect's reader.

    Returns:
        (site, reason): they are frozen and converted as all are, but run in no branch of their own.
    """
    found: list[tuple[Site, str]] = []
    for node in graph_module.graph.nodes:
        value = getattr(graph_module, str(node.target), None) if node.op == "get_attr" else None
        if not isinstance(value, fx.GraphModule):
            continue
        reading = read(value)
        for site in reading.inspection:
            reason = f"inside {node.target!r}, which the graph calls as a whole"
            found.append((replace(site, name=f"{node.target}.{site.name}"), reason))
    return found


Modules = Mapping[str, nn.Module]  # by path


class _Modules(Mapping[str, nn.Module]):
    """The modules of a model by path, looked up when asked for: most readers need a few."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root

    def __getitem__(self, path: str) -> nn.Module:
        module: nn.Module | None = self._root
        for name in path.split(".") if path else ():
            module = None if module is None else module._modules.get(name)
        if module is None:
            raise KeyError(path)
        return module

    def __iter__(self) -> Iterator[str]:
        waiting: list[tuple[str, nn.Module]] = [("", self._root)]
        while waiting:  # named_modules, without a generator inside of a generator for each level
            path, module = waiting.pop()
            yield path
            children = reversed(module._modules.items())
            waiting += [(f"{path}.{n}" if path else n, m) for n, m in children if m is not None]

    def __len__(self) -> int:
        return sum(1 for _ in self)


def modules_of(graph_module: fx.GraphModule) -> Modules:
    """All modules by path, as they are when asked for; shared ones under each of their paths."""
    return _Modules(graph_module)


def is_exported(graph_module: fx.GraphModule) -> bool:
    """True for a graph of torch.export: ATen ops, and no module that computes."""
    nodes = graph_module.graph.nodes
    if not any(getattr(n.target, "namespace", "") == "aten" for n in nodes):
        return False
    modules = modules_of(graph_module)
    return not any(n.op == "call_module" and ops.match_node(n, modules) for n in nodes)


def unique(name: str, taken: set[str]) -> str:
    """`name`, or `name_1`, `name_2` ... where it is taken already; remembers what it returns."""
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def scope(node: fx.Node, graph_module: fx.GraphModule) -> str:
    """Path of the module that a node belongs to; "" at the top level or where it is unknown."""
    if node.op == "call_module":
        return str(node.target)
    observed = _torch.observed_attributes(graph_module)
    if observed is not None and node.name in observed.node_name_to_scope:
        return str(observed.node_name_to_scope[node.name][0])
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.items())
    return _scope_path(entries[-1]) if entries else ""


def _scope_path(entry: tuple[str, Any]) -> str:
    key, value = entry
    path = value[0] if isinstance(value, tuple) else key
    return str(path).removeprefix("L['self'].").removeprefix("L__self___")


def op_name(node: fx.Node, modules: Modules) -> str:
    """The op's key in the table; a relu right behind a fusable op reads as one, "add_relu"."""
    if node.op == "placeholder":
        return "input"
    found = ops.match_node(node, modules)
    if found is None:
        return str(getattr(node.target, "__name__", node.target)).rpartition(".")[2]
    if found.spec.key == "stub":
        return "input"
    if found.spec.key != "relu" or not node.all_input_nodes:
        return found.key
    before = node.all_input_nodes[0]
    inner = ops.match_node(before, modules)
    # An int8 kernel's output is a site of its own; only float ops run on into the relu.
    if inner is None or inner.relu or inner.column != "spelled" or len(before.users) > 1:
        return found.key
    # torch.cat is spelled alike on floats and on quantized tensors, and no flow fuses it.
    fusable = inner.spec.family in ("weighted", "element-wise") and inner.spec.key != "cat"
    return f"{inner.spec.key}_relu" if fusable else found.key


def parents(
    start: Iterable[fx.Node],
    taps: Mapping[fx.Node, Tap],
    swaps: Mapping[tuple[fx.Node, fx.Node], fx.Node] = MappingProxyType({}),
) -> Iterator[Tap]:
    """The nearest taps upstream of the `start` nodes (which may be taps themselves).

    Args:
        start: Where the walk begins.
        taps: Where it ends.
        swaps: (node, one of its inputs) -> what to take in place of that input.
    """
    queue, seen = list(start), set[fx.Node]()
    while queue:
        node = queue.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if node in taps:
            yield taps[node]
        else:
            queue.extend(swaps.get((node, up), up) for up in node.all_input_nodes)

"""A reader per flow: each turns a graph into sites. A new flow is a new file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter
from typing import Protocol

from torch import fx, nn

from fxqfix import _torch, ops
from fxqfix._settings import entry
from fxqfix.dialects import prepared, pt2e
from fxqfix.dialects._base import Reading, Tap, modules_of, parents
from fxqfix.dialects._code import CODE, around
from fxqfix.dialects._source import source_line
from fxqfix.dialects._wrappers import check_tool, unwrapped
from fxqfix.dialects.site import Inspection, Site
from fxqfix.dialects.trace import call, check_kind, trace
from fxqfix.dialects.weights import int8_weight
from fxqfix.errors import DialectError
from fxqfix.inserted import FloatIsland, InMemoryOrder
from fxqfix.registry import Registry

__all__ = [
    "CODE",
    "DIALECTS",
    "Inspection",
    "Reading",
    "Site",
    "Tap",
    "call",
    "check_kind",
    "check_tool",
    "inspect",
    "nothing_prepared",
    "nothing_quantized",
    "parents",
    "read",
    "read_prepared",
    "source_line",
    "trace",
    "unwrapped",
]


class Dialect(Protocol):
    """What a reader module offers."""

    NAME: str

    def matches(self, graph_module: fx.GraphModule) -> bool:
        """Whether the graph is of this dialect."""

    def read(self, graph_module: fx.GraphModule) -> Reading:
        """Read the graph's sites."""


_READERS: Registry[str, Dialect] = Registry(
    "dialect", key=attrgetter("NAME"), parts=("matches", "read", "__doc__")
)
_READERS.discover(__name__, but=("qconfig", "quantizer", "site", "trace", "weights"))
# Asked in the order of `PLACE`: a graph can hold what several dialects have, the first is the most
# telling. PT2E's prepared models are prepared ones too, and decomposed ones where part is
# converted.
DIALECTS = tuple(_READERS.values())


def _traced(model: nn.Module, where: str) -> fx.GraphModule:
    check_kind(model, where)
    model = unwrapped(model)
    if isinstance(model, nn.Module):
        check_tool(model, where)
    return trace(model)


def read(model: nn.Module, where: str = "inspect") -> Reading:
    """Read a model of any dialect; eager models are traced first.

    Args:
        model: A prepared or converted model, eager or FX, or an exported program of one.
        where: Who asks, for messages.

    Returns:
        The reading, whose graph module is the model itself where it is a GraphModule.

    Raises:
        TraceError: An eager model can't be traced.
        DialectError: The model holds nothing that quantizes.

    Example:
        >>> import torch
        >>> from torch.ao.nn.quantized import Quantize
        >>> from fxqfix.dialects import read
        >>> reading = read(nn.Sequential(Quantize(0.5, 3, torch.quint8)))
        >>> reading.dialect, [tap.site.used.scale for tap in reading.taps]
        ('fx-int8', [0.5])
    """
    graph_module = _traced(model, where)
    for dialect in DIALECTS:
        if dialect.matches(graph_module):
            return _with_nested(dialect.read(graph_module), model)
    raise nothing_quantized(
        model,
        where,
        expected="a prepared, reference, int8 or decomposed model",
        remedy="pass the result of prepare_fx, prepare_qat_fx, convert_fx, "
        "convert_to_reference_fx, prepare_pt2e, convert_pt2e, or eager prepare / convert",
    )


def nothing_quantized(model: nn.Module, where: str, *, expected: str, remedy: str) -> DialectError:
    """What to raise of a model in which nothing is quantized, be it prepared or not.

    Args:
        model: The model, not wrapped.
        where: Who asks.
        expected: What was expected.
        remedy: What to pass in place of a model that torch did not prepare.

    Example:
        >>> raise nothing_quantized(nn.Linear(2, 2), "lint", expected="fake-quants", remedy="train")
        Traceback (most recent call last):
        fxqfix.errors.DialectError: lint: Linear holds no observer, fake-quant, quantize op or ...
    """
    found = None
    if isinstance(model, fx.GraphModule):
        found = f"{sum(1 for _ in model.graph.nodes)} nodes, all float"
        if _torch.observed_attributes(model) is not None:
            found += ", though torch prepared it: no op of it is observed"
            remedy = "prepare it with a qconfig (or a quantizer) that chooses its ops, and dtypes "
            remedy += "that the backend_config takes for them"
    return DialectError(
        f"{type(model).__name__} holds no observer, fake-quant, quantize op or quantized kernel",
        where=where,
        found=found,
        expected=expected,
        remedy=remedy,
    )


def read_prepared(model: nn.Module, where: str, *, settled: bool = True) -> Reading:
    """Read a prepared model of either flow; eager models are traced first.

    Args:
        model: What prepare_fx, prepare_qat_fx, prepare_pt2e, prepare_qat_pt2e, or eager prepare
            or prepare_qat returned.
        where: Who asks, for messages.
        settled: See `prepared.read`.

    Raises:
        TraceError: An eager model can't be traced.
        DialectError: The model is not a prepared one.
    """
    graph_module = _traced(model, where)
    if pt2e.matches(graph_module):
        return pt2e.read(graph_module)
    if prepared.matches(graph_module):
        return _with_nested(prepared.read(graph_module, settled=settled), model)
    raise nothing_prepared(graph_module, where)


def nothing_prepared(model: nn.Module, where: str) -> DialectError:
    """What to raise of a model without observers and fake-quants, where those are needed.

    Args:
        model: The model, not wrapped.
        where: Who asks.

    Example:
        >>> raise nothing_prepared(nn.Linear(2, 2), "freeze")
        Traceback (most recent call last):
        fxqfix.errors.DialectError: freeze: Linear holds no observer, fake-quant, quantize op or ...
    """
    graph_module = model if isinstance(model, fx.GraphModule) else None
    converted = [d.NAME for d in DIALECTS if graph_module is not None and d.matches(graph_module)]
    if converted:
        return DialectError(
            "only prepared models are checked and frozen",
            where=where,
            found=f"a model of dialect {converted[0]}",
            expected="observers or fake-quants",
            remedy="pass the model as it was before its conversion",
        )
    return nothing_quantized(
        model,
        where,
        expected="a prepared model",
        remedy="pass what prepare_fx, prepare_qat_fx, prepare_pt2e, prepare_qat_pt2e or eager "
        "prepare returned, before its conversion",
    )


def _with_nested(reading: Reading, model: nn.Module) -> Reading:
    """A reading with what the graph does not show: nested graphs, and code around modules."""
    nested = (*_nested(reading.graph_module), *around(unwrapped(model)))
    return replace(reading, unsupported=(*reading.unsupported, *nested)) if nested else reading


def _nested(graph_module: fx.GraphModule) -> Iterator[tuple[Site, str]]:
    """Sites of nested graphs (standalone modules), and modules that quantize where none looks."""
    modules = modules_of(graph_module)
    for node in graph_module.graph.nodes:
        module = modules[str(node.target)] if node.op == "call_module" else None
        if module is None or _torch.is_quantizer(module) or ops.match_node(node, modules):
            continue
        reason = f"inside {node.target!r}, which the graph calls as a whole"
        dialect = None
        if isinstance(module, fx.GraphModule):
            dialect = next((d for d in DIALECTS if d.matches(module)), None)
            for site in dialect.read(module).inspection if dialect is not None else ():
                yield replace(site, name=f"{node.name}.{site.name}"), reason
        if dialect is None and any(map(_quantizes, module.modules())):
            place = str(node.target), type(module).__name__
            yield Site(node.name, "activation", *place, source="closed module"), reason


def _quantizes(module: nn.Module) -> bool:
    """Whether a module observes, fake-quantizes or computes with integer weights."""
    if isinstance(module, FloatIsland | InMemoryOrder):
        return False
    return _torch.is_quantizer(module) or int8_weight(module) is not None


@entry
def inspect(model: nn.Module) -> Inspection:
    """List every site where values become quantized, with the qparams that are really used.

    Args:
        model: A prepared or converted model of any dialect, eager or FX. It is not changed.

    Returns:
        The sites in graph order.

    Raises:
        TraceError: An eager model can't be traced.
        DialectError: The model holds nothing that quantizes.
        NonFiniteError: An observer or fake-quant holds NaN or inf qparams.

    Example:
        >>> import torch
        >>> from torch import fx
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         return torch.quantize_per_tensor(x, 0.5, 3, torch.quint8).dequantize()
        >>> print(inspect(fx.symbolic_trace(Net())).site("x").used)
        scale=0.5 zp=3 [0,255] quint8
    """
    return read(model).inspection

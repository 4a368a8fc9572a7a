"""to_decomposed: from any dialect to quantized_decomposed ops with quant_min / quant_max."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxqfix import _pt2e, _torch, dialects, ops
from fxqfix._devices import device_of
from fxqfix._settings import entry
from fxqfix.dialects import Reading, decomposed, int8
from fxqfix.dialects._base import modules_of, scope
from fxqfix.dialects._code import keep_hooks
from fxqfix.dialects._dtypes import HALVES, check_floats
from fxqfix.dialects._finite import refuse_non_finite
from fxqfix.dialects.qconfig import qconfig_range
from fxqfix.errors import DialectError, RangeUnknownError
from fxqfix.flows.convert import convert_by_torch
from fxqfix.flows.freeze import freeze, freezing
from fxqfix.names import PinPlace, RangesFrom
from fxqfix.pairing import pair
from fxqfix.passes import DecomposeQuantize, Pass, PinRanges, chain

__all__ = ["declared_ranges", "to_decomposed"]

_MANY = 2**16  # codes, which are tried one by one


@entry
def to_decomposed(
    model: nn.Module, *, ranges_from: RangesFrom | None = None, pin_ranges: bool | PinPlace = True
) -> fx.GraphModule:
    """Rewrite a model of any dialect to decomposed ops, which carry quant_min and quant_max.

    From a prepared model the result equals ``freeze(prepared)`` on every output bit; PT2E's own
    conversion of the frozen model gives it, so that dynamic ops are taken too. A reference or int8
    model has lost the declared ranges; they come from `ranges_from`. What `to_int8` returned holds
    them itself.

    Args:
        model: Prepared (it is frozen on the way), reference, int8 or decomposed; eager or FX. It
            is not changed.
        ranges_from: For a reference or int8 model: the prepared model that it was converted from,
            or the QConfigMapping (or QConfig) that it was prepared with.
        pin_ranges: Put an explicit clamp before each quantize whose range is narrower than its
            dtype, so that the range survives ONNX export and Inductor. It changes no bit here.
            "codes" puts it behind the quantize, with which ONNX Runtime keeps its int8 kernels.

    Returns:
        A new GraphModule: floats in, floats out; integer weights in buffers.

    Raises:
        RangeUnknownError: A reference or int8 model without `ranges_from`, or a site that
            `ranges_from` knows nothing of.
        UncalibratedError: The prepared model never saw data.
        UnsupportedError: An op has no decomposed form (dynamic quantization, for one), or the model
            computes in floats that torch's conversion does not take.

    Example:
        >>> import torch
        >>> from torch.ao.quantization import get_default_qconfig_mapping
        >>> from torch.ao.quantization.quantize_fx import prepare_fx
        >>> x = torch.linspace(-1, 1, 8).reshape(1, 8)
        >>> mapping = get_default_qconfig_mapping("fbgemm")
        >>> prepared = prepare_fx(torch.nn.Sequential(torch.nn.Linear(8, 2)).eval(), mapping, (x,))
        >>> _ = prepared(x)
        >>> decomposed = to_decomposed(prepared)
        >>> [n.args[3:] for n in decomposed.graph.nodes if n.name == "input_1_quantize"]
        [(0, 127, torch.uint8)]
    """
    refuse_non_finite(model, "to_decomposed")
    reading = dialects.read(model, "to_decomposed")
    device_of(reading.graph_module, "to_decomposed")
    if reading.prepared:
        check_floats(reading, "to_decomposed")
    source, passes = reading.graph_module, list[Pass]()
    if reading.exported:
        source = _by_pt2e(source)
    elif reading.prepared:
        passes += [*freezing(source), DecomposeQuantize()]
    elif not reading.carries_ranges:
        passes.append(DecomposeQuantize(declared_ranges(reading, ranges_from)))
    where = pin_ranges if isinstance(pin_ranges, str) else "values"
    passes.append(PinRanges(where=where) if pin_ranges else DecomposeQuantize())
    # Tracing an eager model copies it, and torch's conversion is of a copy.
    owned = isinstance(model, nn.Module) and source is not dialects.unwrapped(model)
    result: fx.GraphModule = chain(source, *passes, owned=owned).graph_module
    keep_hooks(dialects.unwrapped(model), result)
    return result


def _by_pt2e(prepared: fx.GraphModule) -> fx.GraphModule:
    """Torch's own conversion of the frozen model, and the codes of embeddings as they should be.

    Where zero points are fractions, the decomposed quantize cuts codes off that it should round.
    """
    frozen = freeze(prepared)
    converted = dialects.trace(convert_by_torch(frozen))
    own = dict(frozen.named_buffers())
    for name, buffer in converted.named_buffers():  # folding constants, torch runs what writes them
        if name in own and own[name].shape == buffer.shape:
            buffer.detach().copy_(own[name])
    mine = {name: tap for tap in dialects.read(frozen).weights for name in tap.origins}
    for tap in dialects.read(converted).weights if mine else ():
        used, source = tap.site.used, tap.producer.all_input_nodes[0]
        weight = next((mine[name].weight for name in tap.origins if name in mine), None)
        if weight is None or source.op != "get_attr":
            continue
        view = weight()
        if used is not None and not all(float(z).is_integer() for z in used.zero_points):
            codes: Tensor = int8.fetch(converted, source)
            codes.copy_(view.codes)
        if view.values is not None and view.values.dtype in HALVES:  # torchao leaves it out there
            for node in (tap.producer, *(again for again, _ in tap.repeats)):
                node.kwargs = {"out_dtype": view.values.dtype, **node.kwargs}
    for node in list(filter(decomposed.is_dequantize, converted.graph.nodes)):
        _round_once(node)
    converted.recompile()
    return converted


def _round_once(node: fx.Node) -> None:
    """Let a dequantize compute in float32, where half precision does not hold its codes.

    With `out_dtype` the op subtracts the zero point in half precision, which 16-bit codes do not
    fit: fake-quant computes in float32, and rounds once.
    """
    given = decomposed.arguments(node)
    half = node.kwargs.get("out_dtype")
    if half not in HALVES or "axis" in given or not isinstance(given["scale"], float):
        return
    low, high = given["quant_min"], given["quant_max"]
    if high - low < _MANY:
        codes = torch.arange(low, high + 1).to(given["dtype"])
        op: Any = node.target
        own, wanted = op(codes, *node.args[1:], **node.kwargs), op(codes, *node.args[1:])
        if torch.equal(own, wanted.to(half)):
            return
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "out_dtype"}
    with node.graph.inserting_after(node):
        cast = node.graph.call_function(torch.ops.aten.to.dtype, (node, half))
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)


def declared_ranges(reading: Reading, ranges_from: RangesFrom | None) -> dict[str, tuple[int, int]]:
    """Site name -> (quant_min, quant_max) for every activation of a converted model."""
    if not reading.activations:  # weight-only, or all dynamic
        return {}
    if ranges_from is None and (known := int8.own_ranges(reading)):
        return _inherit(reading, known)
    if ranges_from is None:
        raise RangeUnknownError(
            "a converted model does not hold quant_min / quant_max any more",
            where="to_decomposed",
            found=f"a model of dialect {reading.dialect}",
            remedy="fxqfix.to_decomposed(model, ranges_from=prepared), with the prepared model (or "
            "the qconfig mapping) that it was converted from; or pass the prepared model itself",
        )
    if isinstance(ranges_from, nn.Module) or _pt2e.is_program(ranges_from):
        known = _from_prepared(reading, ranges_from)
    elif not (hasattr(ranges_from, "activation") or hasattr(ranges_from, "global_qconfig")):
        raise DialectError(
            "ranges_from declares no ranges",
            where="to_decomposed",
            found=type(ranges_from).__name__,
            expected="the prepared model, or the QConfigMapping (or QConfig) it was prepared with",
        )
    else:
        known = _from_qconfig(reading, ranges_from)
    return _inherit(reading, known)


def _from_prepared(reading: Reading, prepared: Any) -> dict[str, tuple[int, int]]:
    other = dialects.read(prepared, "ranges_from")
    holds = other.prepared or other.carries_ranges or int8.own_ranges(other)
    if not holds:
        raise RangeUnknownError(
            "the model in ranges_from does not hold quant_min / quant_max either",
            where="to_decomposed",
            found=f"a model of dialect {other.dialect}",
            expected="the prepared model (or the qconfig mapping) that it was converted from",
        )
    found: dict[str, tuple[int, int]] = {}
    modules = modules_of(reading.graph_module)
    for p in pair(other, reading).pairs:
        used, theirs = p.prepared.site.used, p.converted.site.used
        if used is None or p.prepared.site.kind != "activation":
            continue
        match = ops.match_node(p.converted.kernel, modules)
        fixed = match is not None and match.spec.output == "fixed"
        if fixed and theirs is not None and not theirs.same_grid(used):
            used = theirs  # the range is one of codes on a grid that the kernel doesn't know
        found[p.converted.site.name] = (used.quant_min, used.quant_max)
    return found


def _from_qconfig(reading: Reading, qconfig: Any) -> dict[str, tuple[int, int]]:
    modules = modules_of(reading.graph_module)
    found: dict[str, tuple[int, int]] = {}
    for tap in reading.activations:
        if tap.inherited:
            continue
        declaring = _observed_for(tap.producer, tap.node, modules)
        module = scope(declaring, reading.graph_module)
        limits = qconfig_range(qconfig, module, _spelled(declaring, modules))
        if limits is not None:
            found[tap.site.name] = limits
    return found


def _observed_for(producer: fx.Node, node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node:
    """The op whose qconfig made the observer, as prepare_fx does it.

    An op that torch can quantize has its output observed. Any other value (an input, an op that
    stays float, an embedding) is observed for the op that takes it.
    """
    found = ops.match_node(producer, modules)
    observed = found is not None and found.spec.output != "float"
    if producer is node or (observed and _spelled(producer, modules) & _torch.quantizable()):
        return producer
    behind = [user for user in node.users if _spelled(user, modules)]
    behind += [n for user in behind for n in user.users if user.target == "dequantize"]
    takers = [user for user in behind if user.target != "dequantize"]
    return takers[0] if takers else producer


def _spelled(node: fx.Node, modules: Mapping[str, nn.Module]) -> frozenset[Any]:
    """The float spellings of a node's op, of the node's own kind; methods by name."""
    found = ops.match_node(node, modules)
    if found is None:
        return frozenset()
    names = (*found.spec.spelled, *found.spec.spelled_relu)
    objects = {n.removeprefix(".") if n[0] == "." else _torch.resolve(n) for n in names}
    wants_class = node.op == "call_module"
    return frozenset(o for o in objects if isinstance(o, type) == wants_class)


def _inherit(reading: Reading, known: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """A value that keeps its input's qparams keeps its range too, where none is declared.

    A value whose qparams the op gives has its dtype's whole range.
    """
    taps = {tap.node: tap for tap in reading.activations}
    modules = modules_of(reading.graph_module)
    for tap in reading.activations:
        found = ops.match_node(tap.producer, modules)
        rule = found.spec.output if found is not None else ""
        if tap.site.name in known or not (tap.inherited or rule in ("shape", "input", "fixed")):
            continue
        if rule == "fixed" and tap.site.used is not None:
            known[tap.site.name] = tap.site.used.container
            continue
        for up in dialects.parents(tap.node.all_input_nodes, taps):
            if up.site.name in known:
                known[tap.site.name] = known[up.site.name]
                break
    return known

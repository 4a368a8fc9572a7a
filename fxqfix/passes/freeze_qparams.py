"""freeze-qparams: fix every fake-quant to the qparams that its forward really uses."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx, nn

from fxqfix import _pt2e, _torch, ops
from fxqfix.dialects._wrappers import held_graphs
from fxqfix.dialects.quantizer import QuantizerState, read_quantizer
from fxqfix.dialects.trace import trace
from fxqfix.dialects.weights import effective_weight, holder, weight_quantizer, weight_state
from fxqfix.errors import TraceError, UncalibratedError
from fxqfix.passes._base import Pass, Rewriter
from fxqfix.passes._frozen import FrozenFakeQuantize

__all__ = ["FreezeQParams"]


@dataclass(frozen=True)
class FreezeQParams(Pass):
    """Replace observers and fake-quants by fake-quants with fixed qparams.

    The qparams are those that the forward uses: a fused fake-quant's kernel is asked, on a copy.
    Observers of a calibrated (PTQ) model become fake-quants with the observer's qparams, and
    weights are set to their quantized values, so that the frozen model computes what is deployed.
    Dynamic and float16 placeholders stay.

    Eager in, eager out; FX in, FX out. Works on QAT and PTQ models.

    Attributes:
        uncalibrated: Whether to accept activations that never saw data, and fix them to what they
            hold; without it they are an error.

    Example:
        >>> from fxqfix.passes import FreezeQParams
        >>> str(FreezeQParams.name)
        'freeze-qparams'
    """

    name: ClassVar[str] = "freeze-qparams"
    uncalibrated: bool = False

    def rewrite(self, rewriter: Rewriter) -> None:
        """Replace quantizer by quantizer; shared ones stay shared."""
        self._weights(rewriter)
        frozen: dict[int, nn.Module] = {}
        states: dict[int, QuantizerState] = {}
        found = list(_quantizers(rewriter.module))
        # Those that derive their qparams from others (a bias's) come last, and ask the frozen ones.
        found.sort(key=lambda x: _pt2e.derived_from(x[1]) is not None)
        for path, module in found:
            if id(module) not in states:
                if (sources := _pt2e.derived_from(module)) is not None:
                    sources[:] = [frozen.get(id(m), m) for m in sources]
                states[id(module)] = self._state(path, module, rewriter.module)
            state = states[id(module)]
            if state.used is None or (isinstance(module, FrozenFakeQuantize) and state.quantizes):
                continue
            if not state.calibrated and not self.uncalibrated:
                continue
            if id(module) not in frozen:
                device = next((b.device for b in module.buffers()), None)
                frozen[id(module)] = FrozenFakeQuantize(state.used, device)
                frozen[id(module)].train(module.training)
            rewriter.set_module(path, frozen[id(module)], f"{state.source} -> {state.used}")

    def _state(self, path: str, module: nn.Module, model: nn.Module) -> QuantizerState:
        if self.uncalibrated and not path.endswith("weight_fake_quant"):
            return read_quantizer(module, f"freeze-qparams, {path}")
        return _state(path, module, model)

    def _weights(self, rewriter: Rewriter) -> None:
        """Fix the weights of PTQ modules, which conversion would observe anew."""
        for path, module in list(_ptq_modules(rewriter.module)):
            quantizer = weight_quantizer(module)
            if quantizer is None:
                continue
            _state(path, quantizer)  # raises where it never saw data
            state = weight_state(module, quantizer, path)
            if state.used is None:
                continue
            inner = holder(module)
            weight = effective_weight(module)
            frozen = FrozenFakeQuantize(state.used, weight.device)
            inner.weight.data = frozen(weight)
            for owner in {id(module): module, id(inner): inner}.values():
                qconfig: Any = getattr(owner, "qconfig", None)
                if qconfig is not None:
                    owner.qconfig = qconfig._replace(
                        weight=functools.partial(copy.deepcopy, frozen)
                    )
            rewriter.note(f"{path}.weight: {state.source} -> {state.used}")


def _state(path: str, module: nn.Module, model: nn.Module | None = None) -> QuantizerState:
    state = read_quantizer(module, f"freeze-qparams, {path}")
    if not state.calibrated and not (model is not None and _never_runs(module, model)):
        raise UncalibratedError(
            f"{type(module).__name__} never saw data",
            where=f"freeze-qparams, {path}",
            found="min=inf, max=-inf",
            expected="a range observed on data",
            remedy="run calibration data through the model (observers enabled) first",
        )
    return state


def _never_runs(module: nn.Module, model: nn.Module) -> bool:
    """Whether no forward of the model can reach a module: FloatFunctional's after mul_scalar."""
    kind = _torch.resolve("torch.ao.nn.quantized.FloatFunctional")
    paths = [p for p, m in model.named_modules(remove_duplicate=False) if m is module]
    owners = [model.get_submodule(p.rpartition(".")[0]) for p in paths]
    if kind is not None and any(isinstance(owner, kind) for owner in owners):
        return True  # also inside modules that are not opened: attention scales its queries so
    try:
        nodes = trace(model).graph.nodes
    except TraceError:
        return False
    called = {str(n.target) for n in nodes if n.op == "call_module"}
    return not any(p == c or p.startswith(f"{c}.") for p in paths for c in called)


def _quantizers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every quantizer by path, without the observers inside fake-quants."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules(remove_duplicate=False):
        if path.startswith(inside):
            continue
        if _torch.is_quantizer(module):
            yield path, module
            inside = (*inside, f"{path}.")


def _ptq_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose weight conversion would observe: by the graph in FX, by qconfig in eager."""
    if isinstance(model, fx.GraphModule) and (attrs := _torch.observed_attributes(model)):
        for node in model.graph.nodes:
            if node.op == "call_module" and node.name in attrs.observed_node_names:
                path = str(node.target)
                yield from _weighted(model.get_submodule(path), path)
        return
    held = held_graphs(model)
    inside = tuple(f"{path}." for path, _ in held)
    yield from (found for found in _weighted(model, "") if not found[0].startswith(inside))
    for outer, graph_module in held:
        yield from ((f"{outer}.{path}", m) for path, m in _ptq_modules(graph_module))


def _weighted(root: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """A module, or those inside it, whose weight no fake-quant of its own quantizes."""
    inside: tuple[str, ...] = ()
    for path, module in root.named_modules(prefix=prefix):
        found = ops.match(type(module))
        if path.startswith(inside) or hasattr(module, "weight_fake_quant") or found is None:
            continue
        if found.spec.family in ("weighted", "embedding"):
            yield path, module
            inside = (*inside, f"{path}.")

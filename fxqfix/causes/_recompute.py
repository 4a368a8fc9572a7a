"""Compute a site anew under a hypothesis: other weights, float64, rounding in between.

The region is interpreted, not compiled: FX keeps the source of every GraphModule that it ever
compiled, so compiling anew for every batch would make memory grow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxqfix import _torch
from fxqfix.dialects.weights import WeightView, holder
from fxqfix.passes import FrozenFakeQuantize
from fxqfix.passes._fold_exported import FOLDED_IN_TRAINING
from fxqfix.passes._region import Region, cut
from fxqfix.passes._shadow_modules import Local
from fxqfix.qparams import QParams, quantize

__all__ = ["Recompute"]


@dataclass(frozen=True)
class Recompute:
    """Computes a site anew from the folded and frozen prepared graph.

    Attributes:
        graph_module: The prepared graph, frozen, BatchNorm folded.
        end: The node whose value the site quantizes.
        starts: The site nodes that a region may start from.
        weights: Module path -> (prepared, converted) weight, for the pairs of weights.
        unfolded: The same graph before BatchNorm was folded.
        inner: Node name -> qparams of values that only the converted model quantizes, inside what
            is one float computation for the prepared model (a pool that eager mode observes not).
        floats: What only the prepared model quantizes, inside what is one float computation for the
            converted one: node name of a fake-quant -> (site, None), path of a module -> (site, its
            float weight).
        native: Whether those values are rounded by kernels, which add the zero point before they
            round (an odd one flips the parity of a tie), or by decomposed ops, which add it after.
    """

    graph_module: fx.GraphModule
    end: fx.Node
    starts: frozenset[fx.Node]
    weights: Mapping[str, tuple[WeightView, WeightView]]
    unfolded: fx.GraphModule
    inner: Mapping[str, QParams] = field(default_factory=dict)
    native: bool = True
    floats: Mapping[str, tuple[str, Tensor | None]] = field(default_factory=dict)

    @cached_property
    def _region(self) -> Region:
        return cut(self.graph_module, self.end, self.starts)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the nodes that the region starts from, in the shadow's order."""
        return tuple(node.name for node in self._region.inputs)

    @cached_property
    def _paths(self) -> tuple[str, ...]:
        """Paths of the modules that the region calls."""
        nodes = self._region.graph.nodes
        return tuple(str(n.target) for n in nodes if n.op == "call_module")

    @cached_property
    def own_weights(self) -> dict[str, tuple[WeightView, WeightView]]:
        """The weights that this site's own region uses."""
        return {path: self.weights[path] for path in self._paths if path in self.weights}

    @cached_property
    def own_inner(self) -> dict[str, QParams]:
        """Those of `inner` that lie in this site's region."""
        names = {n.name for n in self._region.graph.nodes if n.op != "placeholder"}
        return {name: q for name, q in self.inner.items() if name in names - {self.end.name}}

    @cached_property
    def own_floats(self) -> dict[str, tuple[str, Tensor | None]]:
        """Those of `floats` that lie in this site's region."""
        nodes = [n for n in self._region.graph.nodes if n.op != "placeholder"]
        names = {n.name for n in nodes} | set(self._paths)
        return {name: value for name, value in self.floats.items() if name in names}

    def trains(self, *kinds: type[nn.Module]) -> str:
        """Path of a module of these kinds in train mode that the region runs, "" without one.

        For a BatchNorm that an exported graph spells out, the name of its node.
        """
        if _torch.BATCH_NORM in kinds:
            for node in self._region.graph.nodes:
                if FOLDED_IN_TRAINING in node.meta:
                    return str(node.meta[FOLDED_IN_TRAINING])
        for path in self._paths:
            for name, module in self.unfolded.get_submodule(path).named_modules():
                if module.training and isinstance(module, kinds):
                    return f"{path}.{name}" if name else path
        return ""

    def folded(self, local: Local) -> Tensor:
        """The site's value in float32, with BatchNorm folded."""
        inputs = _torch.tree_map_tensors(Tensor.clone, local.inputs)
        result: Tensor = _Region(self.graph_module, self._region.graph, {}, {}, wide=False).run(
            *inputs
        )
        return result

    def exact(
        self,
        local: Local,
        weights: Mapping[str, WeightView],
        *,
        inner: bool = False,
        floats: bool = False,
    ) -> Tensor:
        """The site's value in float64 and eval mode, with the given weights.

        Args:
            local: The shadow's inputs.
            weights: Module path -> weight, in place of the region's own.
            inner: Whether to quantize in between where only the converted model does.
            floats: Whether to compute in float where only the prepared model quantizes.
        """
        loose = {n: v for n, (_, v) in self.own_floats.items()} if floats else {}
        modules = {
            path: _widened(
                self.graph_module.get_submodule(path), weights.get(path), loose.get(path)
            )
            for path in self._paths
        }
        for node in self._region.graph.nodes:
            if node.op == "call_module" and node.name in loose and loose[node.name] is None:
                modules[str(node.target)] = nn.Identity()
        inputs = [
            _wide(value) if pair is None else _dequantize_wide(*pair)
            for value, pair in zip(local.inputs, local.codes, strict=True)
        ]
        grids = {n: (q, self.native) for n, q in self.own_inner.items()} if inner else {}
        region = _Region(self.graph_module, self._region.graph, modules, grids, wide=True)
        result: Tensor = region.run(*inputs)
        return result


class _Region(fx.Interpreter):
    """Interprets a region with some modules swapped and some values rounded.

    Args:
        root: Where modules and attributes are found.
        graph: The region.
        modules: Path -> what to call there instead.
        grids: Node name -> grid to round its value to, and whether as a kernel does.
        wide: Whether it runs in float64.
    """

    def __init__(
        self,
        root: fx.GraphModule,
        graph: fx.Graph,
        modules: Mapping[str, Callable[..., Any]],
        grids: Mapping[str, tuple[QParams, bool]],
        *,
        wide: bool,
    ) -> None:
        super().__init__(root, graph=graph)
        self._swapped, self._grids, self._is_wide = modules, grids, wide

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; round its value where a grid is given."""
        value = super().run_node(n)
        return _rounded(value, *self._grids[n.name]) if n.name in self._grids else value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module, or the one that takes its place."""
        module = self._swapped.get(target)
        return (
            super().call_module(target, args, kwargs) if module is None else module(*args, **kwargs)
        )

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Read an attribute, in float64 in a region that runs in float64."""
        value = super().get_attr(target, args, kwargs)
        return _wide(value) if self._is_wide else value


def _widened(
    module: nn.Module, weight: WeightView | None, values: Tensor | None = None
) -> Callable[..., Any]:
    """A copy of a module that computes in float64 and eval mode, with a weight's exact values."""
    if isinstance(module, FrozenFakeQuantize):
        if weight is None:  # a fake-quant inside the region still quantizes float32 values
            return lambda x: module(x.float()).double()
        values = _dequantize_wide(weight.codes, weight.qparams)  # the weight of a functional op
        return lambda _: values
    copied: Any = copy.deepcopy(module)
    inner = holder(copied)
    own = getattr(copied, "weight_fake_quant", None)
    if weight is not None:
        values = _dequantize_wide(weight.codes, weight.qparams)
    elif values is None and isinstance(own, FrozenFakeQuantize):  # a weight without a partner
        values = _dequantize_wide(quantize(inner.weight, own.qparams), own.qparams)
    if values is not None:
        inner.weight = nn.Parameter(values, requires_grad=False)
        if hasattr(copied, "weight_fake_quant"):
            copied.weight_fake_quant = nn.Identity()
        if (
            weight is not None
            and weight.bias is not None
            and getattr(inner, "bias", None) is not None
        ):
            inner.bias = nn.Parameter(weight.bias.detach().clone(), requires_grad=False)
    widened: Callable[..., Any] = copied.double().eval()
    return widened


def _rounded(x: Tensor, qparams: QParams, native: bool) -> Tensor:
    scale, point = (t.double() for t in qparams.tensors(x))
    low, high = qparams.quant_min, qparams.quant_max
    codes = torch.round(x / scale + point) if native else torch.round(x / scale) + point
    return (codes.clamp(low, high) - point) * scale


def _wide(value: Any) -> Any:
    return _torch.tree_map_tensors(
        lambda t: t.double() if t.is_floating_point() else t.clone(), value
    )


def _dequantize_wide(codes: Tensor, qparams: QParams) -> Tensor:
    scale, point = qparams.tensors(codes)
    return (codes.double() - point.double()) * scale.double()

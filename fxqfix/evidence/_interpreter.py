"""Interprets a region, again and again, with some modules swapped and some values rounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from fxqfix import _torch
from fxqfix.dialects._modes import drops, in_eval
from fxqfix.evidence._shell import widened
from fxqfix.evidence._tail import Tail
from fxqfix.evidence.places import Places
from fxqfix.passes._draws import Replaying
from fxqfix.qparams import QParams, round_native

__all__ = ["AtPlaces", "Interpreter"]


class Interpreter(Replaying):
    """Interprets a region, again and again, with some modules swapped and some values rounded.

    What drew random numbers draws them again, in float32: in float64 they would be others.
    """

    _swapped: Mapping[str, Callable[..., Any]]
    _grids: Mapping[str, tuple[QParams, bool]]
    _biases: Mapping[str, Tensor | None]
    _is_wide: bool
    spared: frozenset[str] = frozenset()  # in-place ops that get copies to write on

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a node: in eval mode in float64, as copies where it shall not write."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if self._drew(n):
            if self._is_wide:
                narrowed: Any = _torch.tree_map_tensors(_narrow, (args, kwargs))
                args, kwargs = narrowed
        elif self._is_wide and drops(n):
            args, kwargs = in_eval(args, kwargs)
        if n.name not in self.spared:
            return args, kwargs
        copied: Any = _torch.tree_map_tensors(Tensor.clone, (args, kwargs))
        return copied[0], copied[1]

    def _drew(self, n: fx.Node) -> bool:
        return self.draws is not None and self.draws.drew(n.name)

    def compute(
        self,
        inputs: Sequence[Any],
        modules: Mapping[str, Callable[..., Any]],
        grids: Mapping[str, tuple[QParams, bool]],
        *,
        wide: bool,
        biases: Mapping[str, Tensor | None] = MappingProxyType({}),
    ) -> Tensor:
        """Run the region.

        Args:
            inputs: Values of its inputs, in order.
            modules: Path -> what to call there instead.
            grids: Node name -> grid to round its value to, and whether as a kernel does.
            wide: Whether it runs in float64.
            biases: Node name -> bias to read there; None for its own.
        """
        self._swapped, self._grids, self._is_wide = modules, grids, wide
        self._biases = biases
        try:
            result: Tensor = self.run(*inputs)
            return result
        finally:
            self.env, self.args_iter = {}, iter(())  # the batch's tensors

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, or take the bias in its place; round its value where a grid is given."""
        bias = self._biases.get(n.name)
        value = super().run_node(n) if bias is None else bias.detach().double()
        if self._is_wide:  # what the graph makes itself, or casts: a state of zeros, for one
            value = _torch.tree_map_tensors(_wide, value)
        if n.name not in self._grids:
            return value
        grid = self._grids[n.name]  # of each part, where the op gives several
        return _torch.tree_map_tensors(lambda t: _rounded(t, *grid), value)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module, or the one that takes its place."""
        module = self._swapped.get(target)
        return (
            super().call_module(target, args, kwargs) if module is None else module(*args, **kwargs)
        )

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Read an attribute, in float64 in a region that runs in float64."""
        value = super().get_attr(target, args, kwargs)
        return widened(value) if self._is_wide else value


class AtPlaces(Interpreter):
    """Computes what it can at some places alone; see `Tail`."""

    tail: Tail
    places: Places
    values: Mapping[fx.Node, Tensor]

    def prepare(self, tail: Tail, places: Places, values: Mapping[fx.Node, Tensor]) -> None:
        """Say what the next run is about.

        Args:
            tail: What is computed at the places alone.
            places: Where.
            values: The values there of products.
        """
        self.tail, self.places, self.values = tail, places, values
        self._taken: dict[fx.Node, Any] = {}

    def compute(self, *args: Any, **options: Any) -> Tensor:
        """Run the region; the values at the places are let go of."""
        try:
            return super().compute(*args, **options)
        finally:
            self.values, self._taken = {}, {}
            del self.places

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, or take its value at the places."""
        return self.values[n] if n in self.values else super().run_node(n)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a node; of one that is computed at the places, their values there."""
        if n not in self.tail.nodes:
            return super().fetch_args_kwargs_from_env(n)
        args: Any = fx.map_arg(n.args, self._at)
        kwargs: Any = fx.map_arg(n.kwargs, self._at)
        return args, kwargs

    def _at(self, node: fx.Node) -> Any:
        value = self.env[node]
        known = node in self.tail.nodes or node in self.values or node in self.tail.given
        if known or not isinstance(value, Tensor):
            return value
        if node not in self._taken:
            self._taken[node] = self.places.take(value)
        return self._taken[node]

    def output(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The end's values at the places."""
        value, self._taken = args[0], {}
        inside = value.dim() == 1 and value.shape[0] == len(self.places)
        return value if inside and self._ends_inside else self.places.take(value)

    @property
    def _ends_inside(self) -> bool:
        (end,) = next(n for n in self.graph.nodes if n.op == "output").all_input_nodes
        return end in self.tail.nodes or end in self.values or end in self.tail.given


def _rounded(x: Tensor, qparams: QParams, native: bool) -> Tensor:
    scale, point = (t.double() for t in qparams.tensors(x))
    low, high = qparams.quant_min, qparams.quant_max
    codes = round_native(x / scale, point) if native else torch.round(x / scale) + point
    return (codes.clamp(low, high) - point) * scale


def _narrow(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor

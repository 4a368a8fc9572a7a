"""A converted op computed anew in its engine's integers, on the converted model's own codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from fxqfix.engines import Call, Weighted
from fxqfix.errors import UnsupportedError
from fxqfix.evidence.structure import Op, computing
from fxqfix.passes._region import Cutter, Region, interprets
from fxqfix.passes._shadow_modules import Local

__all__ = ["Emulated"]


@dataclass(frozen=True)
class Emulated:
    """One site of the emulated model.

    Attributes:
        cutter: Of what `emulate-engine` made; ops that it refused stand in it as they were.
        end: The node that gives the site's codes.
        names: Emulated node of every site -> name of its node in the prepared graph.
        inputs: Nodes of the prepared graph that the site's shadow takes, in its order.
        call: The converted op.
        left: Why nodes of the emulated model stand in it as they were, by name.
        late: Why inputs of some sizes have no arithmetic, as they come.
        calls: The converted ops by the names of their nodes in the converted graph.
    """

    cutter: Cutter
    end: fx.Node
    names: Mapping[fx.Node, str]
    inputs: tuple[str, ...]
    call: Call
    left: Mapping[str, str] = field(default_factory=dict)
    late: list[str] = field(default_factory=list)
    calls: Mapping[str, Call] = field(default_factory=dict)

    @cached_property
    def _region(self) -> Region:
        return self.cutter.region(self.end, self.end)

    @cached_property
    def ops(self) -> tuple[Op, ...]:
        """The ops of the site's region."""
        return computing(self._region.graph, self.cutter.graph_module, self.calls)

    @cached_property
    def _order(self) -> list[int] | None:
        """Place of each input of the region among the shadow's; None where one is not there."""
        names = [self.names.get(node, node.name) for node in self._region.inputs]
        known = all(name in self.inputs for name in names)
        return [self.inputs.index(name) for name in names] if known else None

    @cached_property
    def _interpreter(self) -> fx.Interpreter:
        return interprets(fx.Interpreter, self.cutter.graph_module, self._region.graph)

    @cached_property
    def weighted(self) -> tuple[Weighted, ...]:
        """The modules with weights that compute this site."""
        nodes = (n for n in self._region.graph.nodes if n.op == "call_module")
        modules = (self.cutter.graph_module.get_submodule(str(n.target)) for n in nodes)
        return tuple(m for m in modules if isinstance(m, Weighted))

    def is_new(self, local: Local) -> bool:
        """Whether inputs of this size were not computed yet: some sizes have no arithmetic.

        Args:
            local: The shadow's inputs.
        """
        return _sizes(local) not in self._seen

    @cached_property
    def _seen(self) -> set[Any]:
        return set()

    def has(self, effect: str) -> bool:
        """Whether leaving out an effect can change a code.

        Args:
            effect: The name of its cause.
        """
        return any(m.has(effect) for m in self.weighted)

    @cached_property
    def _left_out(self) -> str:
        nodes = (n.name for n in self._region.graph.nodes)
        return next((self.left[name] for name in nodes if name in self.left), "")

    @property
    def refused(self) -> str:
        """Why the site has no arithmetic, for inputs of any size or for one; "" where it has."""
        return self._left_out or next(iter(self.late), "")

    def codes(self, local: Local, without: str = "") -> Tensor | None:
        """The codes that the engine gives; None where an op of the region can't be emulated.

        Args:
            local: The shadow's inputs.
            without: An effect of the kernel to leave out, by the name of its cause.
        """
        self._seen.add(_sizes(local))
        if self._order is None or self._left_out:
            return None
        given = [local.inputs[i] if local.raw[i] is None else local.raw[i] for i in self._order]
        try:
            with self._leaving_out(without):
                found: Any = self._interpreter.run(*given)
        except UnsupportedError as error:  # an input of this size
            self.late.append(error.what)
            return None
        finally:
            # The batch's tensors
            self._interpreter.env, self._interpreter.args_iter = {}, iter(())
        integers = isinstance(found, Tensor) and found.dtype in (torch.uint8, torch.int8)
        return found if integers else None

    @contextmanager
    def _leaving_out(self, effect: str) -> Iterator[None]:
        for module in self.weighted:
            module.without = effect
        try:
            yield
        finally:
            for module in self.weighted:
                module.without = ""


def _sizes(local: Local) -> tuple[Any, ...]:
    return tuple(v.shape for v in local.inputs if isinstance(v, Tensor))

"""Random numbers, drawn once: each op that draws sees the same ones in every branch of a twin.

The converted model draws as it does alone. What it drew at an op, the op's copies in the branches,
in the shadows and in recomputations draw again, from the same state and with their inputs laid out
in the same way, since kernels fill memory in its order. None of them moves the generators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn

from fxqfix import _rng, _torch

__all__ = ["Draws", "Mark", "Replayed", "Replaying", "called"]


class Draws:
    """Where each op of a batch found the generators.

    Args:
        names: Nodes of the prepared model that may draw.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self._theirs: dict[str, _rng.State] = {}
        self._mine: dict[str, _rng.State] = {}
        self._orders: dict[str, list[list[int]]] = {}
        self._drew: set[str] = set()
        self._own = _rng.rng_state()

    def start(self) -> None:
        """Begin a batch; ops that only the prepared model has draw from the present state on."""
        self._theirs, self._mine, self._orders, self._drew = {}, {}, {}, set()
        self._own = _rng.rng_state()

    def before(self, name: str, values: Any) -> None:
        """Note what the converted model's own op finds."""
        self._theirs[name], found = _rng.rng_state(), list[list[int]]()
        _torch.tree_map_tensors(lambda t: found.append(_order(t)), values)
        self._orders[name] = found

    def after(self, name: str) -> None:
        """Note whether that op has drawn anything."""
        if not _rng.same_state(self._theirs[name], _rng.rng_state()):
            self._drew.add(name)

    def drew(self, name: str) -> bool:
        """Whether the converted model has drawn at the op of that name, in this batch."""
        return name in self._drew

    @contextmanager
    def again(self, name: str) -> Iterator[None]:
        """Draw what was drawn at that op; the generators are put back."""
        now, known = _rng.rng_state(), self._mine.get(name)
        if self.drew(name):
            known = self._theirs[name]
        _rng.set_rng_state(self._own if known is None else known)
        try:
            yield
        finally:
            if known is None:  # an op of the prepared model alone, for the first time
                self._mine[name], self._own = self._own, _rng.rng_state()
            _rng.set_rng_state(now)

    def laid_out(self, name: str, values: Any) -> Any:
        """Tensors in the layout in which the converted op got them."""
        orders = iter(self._orders[name] if self.drew(name) else [])

        def lay(tensor: Tensor) -> Tensor:
            order = next(orders, None)
            if order is None or len(order) != tensor.dim() or _order(tensor) == order:
                return tensor
            back = [order.index(i) for i in range(tensor.dim())]
            return tensor.permute(order).contiguous().permute(back)

        return _torch.tree_map_tensors(lay, values)


def _order(tensor: Tensor) -> list[int]:
    """Axes by their strides, the widest first."""
    if tensor.is_contiguous():
        return list(range(tensor.dim()))
    strides = list(tensor.stride())
    return sorted(range(tensor.dim()), key=strides.__getitem__, reverse=True)


class Mark(nn.Module):
    """In the twin: the start of a batch, or one side of an op of the converted model."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self._draws = draws

    def forward(self, side: str, name: str = "", values: Any = ()) -> None:
        """Note it."""
        if side == "start":
            self._draws.start()
        elif side == "before":
            self._draws.before(name, values)
        else:
            self._draws.after(name)


class Replayed(nn.Module):
    """An op of a branch that draws again.

    Args:
        op: What to call; a module, a function, or a method as a function.
        name: Its node's name in the prepared model.
        draws: What was drawn.
        inplace: Whether it writes on its input, which then has to be its own.
    """

    def __init__(self, op: Callable[..., Any], name: str, draws: Draws, inplace: bool) -> None:
        super().__init__()
        self._op, self._name, self._draws, self._inplace = (op,), name, draws, inplace

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the op."""
        if not self._inplace:
            args, kwargs = self._draws.laid_out(self._name, (args, kwargs))
        with self._draws.again(self._name):
            return self._op[0](*args, **kwargs)


class Replaying(fx.Interpreter):
    """Runs a region whose ops draw again."""

    draws: Draws | None = None

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, on the state that its op found."""
        if self.draws is None or n.name not in self.draws.names or n.op == "placeholder":
            return super().run_node(n)
        with self.draws.again(n.name):
            return super().run_node(n)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a node, laid out as its op got them."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if self.draws is None or n.name not in self.draws.names:
            return args, kwargs
        laid: tuple[Any, Any] = self.draws.laid_out(n.name, (args, kwargs))
        return laid


def called(node: fx.Node, modules: Mapping[str, nn.Module]) -> Callable[..., Any]:
    """What a node calls, as a function of its arguments."""
    if node.op == "call_module":
        return modules[str(node.target)]
    if node.op == "call_method":
        name = str(node.target)
        return lambda value, *args, **kwargs: getattr(value, name)(*args, **kwargs)
    target: Any = node.target
    return target  # type: ignore[no-any-return]

"""Buffers that a model writes: put back behind every run, so that runs stay in step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["State", "held"]

_FEW = 5


class State:
    """The state that a model came with.

    Args:
        model: The model. Its tensors are copied once; those that its first run leaves alone are
            let go.

    Example:
        >>> model = nn.BatchNorm1d(2).train()
        >>> state = State(model)
        >>> with state.held():
        ...     _ = model(torch.ones(3, 2))
        >>> model.num_batches_tracked, state.written
        (tensor(0), ('running_mean', 'running_var', 'num_batches_tracked'))
    """

    def __init__(self, model: nn.Module) -> None:
        tensors = chain(model.named_parameters(), model.named_buffers())
        self._kept: dict[str, tuple[Tensor, Tensor]] = {
            name: (tensor, tensor.detach().clone())
            for name, tensor in tensors
            if tensor.layout == torch.strided and not tensor.is_quantized  # else: packed weights
        }
        self._ran = False

    @property
    def written(self) -> tuple[str, ...]:
        """Names of the tensors that the first run wrote."""
        return tuple(self._kept) if self._ran else ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader has to know of them."""
        few = ", ".join(self.written[:_FEW]) + (", ..." if len(self.written) > _FEW else "")
        note = f"the model writes {few}: every run starts from what was there at first"
        return (note,) if self.written else ()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a run start from that state, and put it back behind it."""
        try:
            yield
        finally:
            with torch.no_grad():
                self._put_back()

    def _put_back(self) -> None:
        if not self._ran:
            changed = {n for n, (now, kept) in self._kept.items() if not _same(now, kept)}
            self._kept = {n: both for n, both in self._kept.items() if n in changed}
            self._ran = True
        for now, kept in self._kept.values():
            now.copy_(kept)


def _same(now: Tensor, kept: Tensor) -> bool:
    return torch.equal(now, kept) or bool((now.isnan() & kept.isnan() | (now == kept)).all())


@contextmanager
def held(states: Iterable[Any]) -> Iterator[None]:
    """Let a run start from the state that several models came with.

    Args:
        states: States; anything else is passed over.
    """
    with ExitStack() as stack:
        for state in states:
            if isinstance(state, State):
                stack.enter_context(state.held())
        yield

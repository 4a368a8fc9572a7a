"""The random state, put back: what fxqfix runs may draw, the user's own draws stay the same."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor

__all__ = ["Rereadable", "State", "rng_state", "same_rng", "same_state", "set_rng_state"]

_OWNERS = ("sampler", "batch_sampler", "batch_sampler.sampler")  # of a DataLoader

State = tuple[Tensor, list[Tensor]]


def rng_state() -> State:
    """The random state of the CPU and of every CUDA device in use."""
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch's own
    cuda = torch.cuda.get_rng_state_all() if started else []
    return torch.get_rng_state(), cuda


def set_rng_state(state: State) -> None:
    """Restore what `rng_state` returned."""
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def same_state(a: State, b: State) -> bool:
    """Whether two states are one: nothing was drawn in between."""
    pairs = zip([a[0], *a[1]], [b[0], *b[1]], strict=False)
    return len(a[1]) == len(b[1]) and all(torch.equal(x, y) for x, y in pairs)


@contextmanager
def same_rng() -> Iterator[None]:
    """Put the random state back: modules draw numbers merely by being constructed."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


class Rereadable:
    """Data whose generators are as they were once it is read, so that it reads the same again.

    Args:
        data: A DataLoader, or what holds a `torch.Generator` as one does; `random` and NumPy, of
            which its dataset may draw, are put back too.
    """

    def __init__(self, data: Any) -> None:
        self._data = data

    @staticmethod
    def generators(data: Any) -> list[torch.Generator]:
        """Those of a DataLoader and of its samplers.

        Args:
            data: Anything.
        """
        owners = [data, *(reduce(_part, path.split("."), data) for path in _OWNERS)]
        found = [getattr(owner, "generator", None) for owner in owners]
        return [g for g in dict.fromkeys(found) if isinstance(g, torch.Generator)]

    def __len__(self) -> int:
        """Batches, where the data knows."""
        return len(self._data)

    def __iter__(self) -> Iterator[Any]:
        """Its batches."""
        states = [(g, g.get_state()) for g in self.generators(self._data)]
        own, numpy = random.getstate(), getattr(sys.modules.get("numpy"), "random", None)
        drawn = numpy.get_state() if numpy is not None else None
        try:
            yield from self._data
        finally:
            random.setstate(own)
            if numpy is not None:
                numpy.set_state(drawn)
            for generator, state in states:
                generator.set_state(state)


def _part(owner: Any, name: str) -> Any:
    return getattr(owner, name, None)

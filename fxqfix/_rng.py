"""The random state, put back: what fxqfix runs may draw, the user's own draws stay the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["State", "rng_state", "same_rng", "same_state", "set_rng_state"]

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

"""The random state, put back: what fxqfix runs may draw, the user's own draws stay the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["rng_state", "same_rng", "set_rng_state"]


def rng_state() -> tuple[Tensor, list[Tensor]]:
    """The random state of the CPU and of every CUDA device in use."""
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch's own
    cuda = torch.cuda.get_rng_state_all() if started else []
    return torch.get_rng_state(), cuda


def set_rng_state(state: tuple[Tensor, list[Tensor]]) -> None:
    """Restore what `rng_state` returned."""
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


@contextmanager
def same_rng() -> Iterator[None]:
    """Put the random state back: modules draw numbers merely by being constructed."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)

"""A kernel whose parameters are trained: built anew, by its own row, whenever they have moved."""

from __future__ import annotations

import torch
from torch import Tensor

from fxqfix.engines._base import Builder, Call, Exact

__all__ = ["Moving"]


class Moving(Exact):
    """What a row's builder makes of a call, with the parameters of the moment.

    Bounds of sums, what can saturate, and how sums are taken in parts follow the weight, since the
    builder decides all of that. Nothing is built where no code and no bias has changed.

    Args:
        build: The row's builder.
        call: The call; its `present` gives the parameters.
    """

    def __init__(self, build: Builder, call: Call) -> None:
        super().__init__()
        self.build, self.call = build, call
        self.kernel = build(call)  # refuses here what no row computes
        self._seen: list[Tensor | None] | None = None

    def forward(self, *inputs: Tensor) -> Tensor:
        """Codes in, codes out."""
        if self.call.present is not None:
            self._follow(self.call.present.of(self.call))
        found: Tensor = self.kernel(*inputs)
        return found

    def _follow(self, call: Call) -> None:
        given = _parameters(call)
        if self._seen is not None and all(map(_same, self._seen, given)):
            return
        device = next((t.device for t in given if t is not None), None)
        with torch.device(device or "cpu"):
            self.kernel = self.build(call).to(device)
        self._seen = [None if t is None else t.clone() for t in given]


def _parameters(call: Call) -> list[Tensor | None]:
    """What is trained of a call."""
    if call.weight is not None:
        return [call.weight.codes, call.weight.bias]
    values = call.arguments.values() if call.module is None else vars(call.module).values()
    return [v for v in values if isinstance(v, Tensor)]


def _same(before: Tensor | None, now: Tensor | None) -> bool:
    if before is None or now is None:
        return before is now
    return before.device == now.device and torch.equal(before, now)

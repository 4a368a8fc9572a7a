"""The quantized LSTM of the static flows: its cells' own ops, step by step.

torch's module is a loop over time in Python; a cell is made of quantized linear, add, sigmoid,
tanh and mul, which have rows of their own. The first step has its own modules, because its state
has another grid (scale 1 and zero point 0 where none is given) than the one the cell returns.
Where tensors of several grids are joined (directions, layers), all go to the first one's grid.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxqfix.engines._base import Call, Exact, kernel
from fxqfix.engines._inner import inner
from fxqfix.engines.elementwise import Cat, Stack
from fxqfix.qparams import QParams

__all__ = ["Lstm"]

_ALL = ("fbgemm", "onednn", "qnnpack")


class _Step(Exact):
    """A cell, called so that FX looks into it."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        return self.cell.forward(x, (h, c))


class _Direction(Exact):
    """One direction of one layer."""

    def __init__(self, cell: nn.Module, grids: tuple[QParams, ...], call: Call, place: str) -> None:
        super().__init__()
        self.first, self.state = inner(_Step(cell), grids, call, f"{place}.{{}}".format)
        now = (grids[0], *self.state)
        self.later, _ = inner(_Step(cell), now, call, f"{place}.{{}}".format)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = []
        for index in range(x.shape[0]):
            h, c = (self.later if index else self.first)(x[index], h, c)
            found.append(h)
        return torch.stack(found), h, c


class _Layer(Exact):
    """One layer: one or two directions."""

    def __init__(self, layer: Any, grids: tuple[QParams, ...], call: Call, place: str) -> None:
        super().__init__()
        names = ["layer_fw", "layer_bw"] if layer.bidirectional else ["layer_fw"]
        found = [
            _Direction(getattr(layer, name).cell, grids, call, f"{place}.{name}") for name in names
        ]
        self.directions = nn.ModuleList(found)
        self.state = found[0].state
        h, c = (tuple(d.state[i] for d in found) for i in (0, 1))
        self.join = Cat(_joining(call, h), h, 2)
        self.join_h, self.join_c = Stack(_joining(call, h), h, 0), Stack(_joining(call, c), c, 0)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`h` and `c` have a leading dimension of directions, as what is returned for them."""
        found = []
        for index, direction in enumerate(self.directions):
            y, *state = direction(x.flip(0) if index else x, h[index], c[index])
            found.append((y.flip(0) if index else y, *state))
        ys, hs, cs = zip(*found, strict=True)
        return self.join(*ys), self.join_h(*hs), self.join_c(*cs)


def _joining(call: Call, grids: tuple[QParams, ...]) -> Call:
    return replace(call, key="cat", qparams=grids, output=grids[0])


class Lstm(Exact):
    """torch.ao.nn.quantized.LSTM on codes.

    Args:
        call: The call of the module.
        grids: The grids of input, hidden state and cell state.
    """

    def __init__(self, call: Call, grids: tuple[QParams, ...]) -> None:
        super().__init__()
        module: Any = call.module
        self.batch_first, self.size = module.batch_first, module.hidden_size
        found: list[_Layer] = []
        for index, layer in enumerate(module.layers):
            source = found[-1].state[0] if found else grids[0]
            found.append(_Layer(layer, (source, *grids[1:]), call, f"layers.{index}"))
        self.layers, self.directions = nn.ModuleList(found), 1 + module.bidirectional
        h, c = (tuple(layer.state[i] for layer in found) for i in (0, 1))
        self.join_h, self.join_c = Stack(_joining(call, h), h, 0), Stack(_joining(call, c), c, 0)

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Codes in, codes out."""
        x = x.transpose(0, 1) if self.batch_first else x
        shape = (len(self.layers), self.directions, x.shape[1], self.size)
        zeros = x.new_zeros(shape)
        h, c = (s.reshape(shape) for s in state) if state else (zeros, zeros)
        found = []
        for index, layer in enumerate(self.layers):
            x, *last = layer(x, h[index], c[index])
            found.append(last)
        hs, cs = zip(*found, strict=True)
        x = x.transpose(0, 1) if self.batch_first else x
        return x, (self.join_h(*hs).flatten(0, 1), self.join_c(*cs).flatten(0, 1))


@kernel("lstm", engines=_ALL)
def _lstm(call: Call) -> nn.Module:
    hidden = call.arguments.get("hidden")
    if hidden is None:
        start = QParams(1.0, 0, *call.source.container, call.source.dtype)
        return Lstm(call, (call.source, start, start))
    parts = hidden if isinstance(hidden, tuple | list) else ()
    if [isinstance(p, fx.Node) for p in parts] != [True, True] or None in call.qparams:
        raise call.refuse("its state is not a pair of quantized tensors")
    return Lstm(call, (call.source, call.grid_of(1), call.grid_of(2)))

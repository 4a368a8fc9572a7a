"""Dynamic LSTM, GRU and cells: dynamic linear layers, and float arithmetic between them.

With ``i`` the input's and ``h`` the state's linear layer, gates in chunks:

* LSTM: ``c' = f(f(sigmoid(f) * c) + f(sigmoid(i) * tanh(g)))``, ``h' = f(sigmoid(o) * tanh(c'))``
* GRU: ``n = tanh(f(in + f(hn * r)))``, ``h' = f(f(f(h - n) * z) + n)``
* RNN: ``tanh(f(h + i))`` or relu

The input's layer runs once for the whole sequence, so all of its steps share one grid. Sigmoid and
tanh are torch's own float ops, which is why the chunks are not made contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxqfix.dialects.weights import packed_weight
from fxqfix.engines._base import Call, Exact, kernel
from fxqfix.engines.dispatch import cell_weights
from fxqfix.engines.dynamic import build_dynamic_linear

__all__ = ["DynamicCell", "DynamicRecurrent"]

_ALL = ("fbgemm", "onednn", "qnnpack")
State = tuple[Tensor, ...]


def _lstm(igates: Tensor, hgates: Tensor, state: State) -> State:
    i, f, g, o = (hgates + igates).chunk(4, 1)
    i, f, g, o = i.sigmoid_(), f.sigmoid_(), g.tanh_(), o.sigmoid_()
    c = (f * state[1]).add_(i * g)
    return o * c.tanh(), c


def _gru(igates: Tensor, hgates: Tensor, state: State) -> State:
    (ir, iz, new), (hr, hz, hn) = igates.chunk(3, 1), hgates.chunk(3, 1)
    r, z = hr.add_(ir).sigmoid_(), hz.add_(iz).sigmoid_()
    new = new.add(hn.mul_(r)).tanh_()
    return ((state[0] - new).mul_(z).add_(new),)


def _tanh(igates: Tensor, hgates: Tensor, state: State) -> State:
    return (torch.tanh(hgates.add_(igates)),)


def _relu(igates: Tensor, hgates: Tensor, state: State) -> State:
    return (torch.relu(hgates.add_(igates)),)


_STEPS: dict[str, Callable[[Tensor, Tensor, State], State]] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "tanh": _tanh,
    "relu": _relu,
}


def _linear(call: Call, packed: Any, *, reduce_range: bool) -> nn.Module:
    weight = packed_weight(packed) if hasattr(packed, "unpack") else None
    options = {"reduce_range": reduce_range}
    return build_dynamic_linear(
        replace(call, key="linear_dynamic", module=None, weight=weight, arguments=options)
    )


def _started(x: Tensor, state: tuple[Any, ...], shape: tuple[int, ...], count: int) -> State:
    """The state in parts; zeros where none is given."""
    whole = state[0] if len(state) == 1 and isinstance(state[0], tuple) else state
    return tuple(whole) or (x.new_zeros(shape),) * count


class DynamicCell(Exact):
    """One step of torch.ao.nn.quantized.dynamic's LSTMCell, GRUCell or RNNCell."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        module: Any = call.module
        self.size, kind = module.hidden_size, type(module).__name__.removesuffix("Cell")
        self.kind = module.nonlinearity if kind == "RNN" else kind
        self.inputs = _linear(call, module._packed_weight_ih, reduce_range=True)
        self.states = _linear(call, module._packed_weight_hh, reduce_range=True)

    def forward(self, x: Tensor, *state: Any) -> Any:
        """Floats in, floats out."""
        given = _started(x, state, (x.shape[0], self.size), 1 + (self.kind == "LSTM"))
        found = _STEPS[self.kind](self.inputs(x), self.states(given[0]), given)
        return found if self.kind == "LSTM" else found[0]


class DynamicRecurrent(Exact):
    """torch.ao.nn.quantized.dynamic's LSTM or GRU."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        module: Any = call.module
        self.kind, self.size = type(module).__name__, module.hidden_size
        self.batch_first, self.directions = module.batch_first, 1 + module.bidirectional
        self.inputs, self.states = nn.ModuleList(), nn.ModuleList()
        for holder in module._all_weight_values:
            packed, reduce_range = cell_weights(holder.param)
            for layers, one in zip((self.inputs, self.states), packed, strict=True):
                layers.append(_linear(call, one, reduce_range=reduce_range))

    def forward(self, x: Tensor, *state: Any) -> tuple[Tensor, Any]:
        """Floats in, floats out."""
        x = x.transpose(0, 1) if self.batch_first else x
        shape = (len(self.inputs), x.shape[1], self.size)
        given = _started(x, state, shape, 1 + (self.kind == "LSTM"))
        last: list[State] = []
        for layer in range(0, len(self.inputs), self.directions):
            found = []
            for index in range(layer, layer + self.directions):
                y, end = self._run(index, x, tuple(s[index] for s in given), index > layer)
                found.append(y)
                last.append(end)
            x = torch.cat(found, -1) if len(found) > 1 else found[0]
        ends = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        x = x.transpose(0, 1) if self.batch_first else x
        return x, ends if self.kind == "LSTM" else ends[0]

    def _run(self, index: int, x: Tensor, state: State, backwards: bool) -> tuple[Tensor, State]:
        """One direction of one layer."""
        steps = list(self.inputs[index](x).unbind(0))
        found = []
        for gates in reversed(steps) if backwards else steps:
            state = _STEPS[self.kind](gates, self.states[index](state[0]), state)
            found.append(state[0])
        return torch.stack(found[::-1] if backwards else found), state


@kernel("lstm_dynamic", "gru_dynamic", engines=_ALL)
def _recurrent(call: Call) -> nn.Module:
    return DynamicRecurrent(call)


@kernel("rnn_cell_dynamic", engines=_ALL)
def _cell(call: Call) -> nn.Module:
    return DynamicCell(call)

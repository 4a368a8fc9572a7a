"""Dynamic LSTM, GRU and cells against the kernels: equal floats, counted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic

from fxqfix._torch import quantized_engine, quiet
from fxqfix.errors import UnsupportedError
from fxqfix.flows.emulate import emulate
from tests.engines.harness import ENGINES, differing

RECURRENT = {nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell}


class Net(nn.Module):
    """A recurrent module, with a state or without; all that it returns, flat."""

    def __init__(self, inner: nn.Module, *, stateful: bool, flat: int) -> None:
        super().__init__()
        self.inner, self.stateful, self.flat = inner, stateful, flat

    def forward(self, x: Tensor, h: Tensor) -> Any:
        state: Any = (h, h) if "LSTM" in type(self.inner).__name__ else h
        found = self.inner(x, state) if self.stateful else self.inner(x)
        if self.flat == 1:
            return found
        return (found[0], found[1]) if self.flat == 2 else (found[0], found[1][0], found[1][1])


def dynamic(net: nn.Module, engine: str, dtype: torch.dtype = torch.qint8) -> nn.Module:
    with quantized_engine(engine), quiet():
        return quantize_dynamic(net.eval(), RECURRENT, dtype=dtype)


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("engine", ENGINES)
def test_sequences(engine: str, kind: Any, stateful: bool) -> None:
    bad = total = 0
    sizes = [(7, 19), (32, 64), (65, 33)]
    options = itertools.product(sizes, (1, 2), (False, True), (False, True))
    # Every third: each size, and each of the eight choices behind it, in a third of the time.
    options = itertools.islice(options, int(stateful), None, 3)
    for seed, ((inputs, size), layers, two, batch_first) in enumerate(options):
        torch.manual_seed(seed)
        inner = kind(inputs, size, layers, batch_first=batch_first, bidirectional=two)
        model = Net(inner, stateful=stateful, flat=3 if kind is nn.LSTM else 2)
        hot = torch.logspace(-1, 1, 41).unsqueeze(1)
        x, h = hot * torch.randn(11, 41, inputs), torch.randn(layers * (1 + two), 41, size)
        x = x.transpose(0, 1).contiguous() if batch_first else x
        wrong, count = differing(dynamic(model, engine), x, h, engine=engine)
        bad, total = bad + wrong, total + count
    assert total > 200_000
    assert bad == 0


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "tanh", "relu"])
@pytest.mark.parametrize("engine", ENGINES)
def test_cells(engine: str, kind: str) -> None:
    bad = total = 0
    options = itertools.product([(7, 19), (32, 64), (300, 257)], (False, True))
    for seed, ((inputs, size), stateful) in enumerate(options):
        torch.manual_seed(seed)
        if kind in ("LSTM", "GRU"):
            inner = getattr(nn, f"{kind}Cell")(inputs, size)
        else:
            inner = nn.RNNCell(inputs, size, nonlinearity=kind)
        model = Net(inner, stateful=stateful, flat=2 if kind == "LSTM" else 1)
        x, h = 3 * torch.randn(301, inputs), torch.randn(301, size)
        wrong, count = differing(dynamic(model, engine), x, h, engine=engine)
        bad, total = bad + wrong, total + count
    assert total > 200_000
    assert bad == 0


def test_a_state_handed_on_whole() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.LSTM(5, 6), nn.LSTM(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y, state = self.one(x)
            return self.two(y, state)[0]

    assert differing(dynamic(Two(), "qnnpack"), torch.randn(4, 3, 5), engine="qnnpack") == (0, 72)


def test_weights_of_another_engine_are_refused() -> None:
    model = dynamic(Net(nn.GRU(4, 4), stateful=False, flat=2), "qnnpack")
    with quantized_engine("qnnpack"), pytest.raises(UnsupportedError, match="packed for qnnpack"):
        emulate(torch.fx.symbolic_trace(model), engine="fbgemm")


def test_half_precision_is_refused() -> None:
    model = dynamic(Net(nn.LSTM(4, 4), stateful=False, flat=3), "fbgemm", torch.float16)
    with quantized_engine("fbgemm"), pytest.raises(UnsupportedError, match="not qint8"):
        emulate(model, engine="fbgemm")

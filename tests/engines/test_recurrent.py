"""The quantized LSTM against torch's: every code of output and state, counted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
from torch import Tensor, nn

from fxqfix._torch import quantized_engine, quiet
from fxqfix.errors import UnsupportedError
from fxqfix.flows.emulate import emulate
from tests.engines.harness import ENGINES, differing


class Net(nn.Module):
    """An LSTM between stubs; its output and state come out quantized."""

    def __init__(self, lstm: nn.Module, *, stateful: bool) -> None:
        super().__init__()
        self.quant, self.state = tq.QuantStub(), tq.QuantStub()
        self.lstm, self.stateful = lstm, stateful

    def forward(self, x: Tensor, h: Tensor) -> Any:
        if self.stateful:
            h = self.state(h)
            y, (hidden, cell) = self.lstm(self.quant(x), (h, h))
        else:
            y, (hidden, cell) = self.lstm(self.quant(x))
        return y, hidden, cell


def converted(lstm: nn.LSTM, engine: str, *inputs: Tensor, stateful: bool) -> nn.Module:
    """Calibrated on the inputs and converted by torch's eager flow."""
    model = Net(lstm, stateful=stateful).eval()
    observer = tq.MinMaxObserver.with_args(dtype=torch.quint8)  # much faster than histograms
    model.qconfig = tq.QConfig(observer, tq.get_default_qconfig(engine).weight)
    prepared = tq.prepare(model)
    prepared(*inputs)
    return tq.convert(prepared)


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_code(engine: str, bidirectional: bool, stateful: bool) -> None:
    bad = total = 0
    sizes = [(7, 19), (32, 64)]
    options = itertools.product(sizes, (1, 2), (False, True), (False, True))
    # Every third: all pairs of options come, in a third of the time.
    options = itertools.islice(options, int(stateful), None, 3)
    for seed, ((inputs, size), layers, batch_first, bias) in enumerate(options):
        torch.manual_seed(seed)
        lstm = nn.LSTM(
            inputs, size, layers, bias, batch_first=batch_first, bidirectional=bidirectional
        )
        x = torch.randn((27, 6, inputs) if batch_first else (6, 27, inputs))
        h = torch.randn(layers * (1 + bidirectional), 27, size) / 2
        with quantized_engine(engine), torch.no_grad(), quiet():
            model = converted(lstm, engine, x, h, stateful=stateful)
        hot = torch.tensor([0.1, 1.0, 4.0]).repeat(9).unsqueeze(1)
        x = x * (hot.unsqueeze(1) if batch_first else hot)
        wrong, count = differing(model, x, hot * h, engine=engine)
        bad, total = bad + wrong, total + count
    assert total > (60_000 if bidirectional else 30_000)
    assert bad == 0


def test_a_state_in_one_piece_is_refused() -> None:
    class Whole(Net):
        def forward(self, x: Tensor, h: Tensor) -> Any:
            y, state = self.lstm(self.quant(x))
            return self.lstm(y, state)[0]

    x = torch.randn(3, 2, 4)
    with quantized_engine("qnnpack"), torch.no_grad(), quiet():
        model = Whole(nn.LSTM(4, 4), stateful=False).eval()
        model.qconfig = tq.get_default_qconfig("qnnpack")
        prepared = tq.prepare(model)
        prepared(x, x)
        with pytest.raises(UnsupportedError, match="not a pair of quantized tensors"):
            emulate(tq.convert(prepared), engine="qnnpack")

"""The quantized multi-head attention against torch's: every code of output and weights, counted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
from torch import Tensor, nn

from fxqfix._torch import quantized_engine, quiet
from tests.engines.harness import ENGINES, differing


class Net(nn.Module):
    """An attention on quantized values; masks are given, or not."""

    def __init__(self, attention: nn.Module, masks: tuple[str, ...], *, average: bool) -> None:
        super().__init__()
        self.quant, self.other, self.attention = tq.QuantStub(), tq.QuantStub(), attention
        self.masks, self.average = masks, average

    def forward(self, x: Tensor, y: Tensor, *masks: Tensor) -> Any:
        q, k = self.quant(x), self.other(y)
        options = {name: masks[index] for index, name in enumerate(self.masks)}
        return self.attention(q, k, k, average_attn_weights=self.average, **options)


@pytest.mark.parametrize("masked", [(), ("attn_mask",), ("key_padding_mask", "attn_mask")])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_code(engine: str, masked: tuple[str, ...]) -> None:
    bad = total = 0
    options = itertools.product((False, True), repeat=4)
    for seed, (batch_first, bias, zeros, average) in enumerate(options):
        torch.manual_seed(seed)
        attention = nn.MultiheadAttention(
            32, 4, add_bias_kv=bias, add_zero_attn=zeros, batch_first=batch_first
        )
        x, y = torch.randn(24, 12, 32), 2 * torch.randn(18, 12, 32)
        if batch_first:
            x, y = x.transpose(0, 1).contiguous(), y.transpose(0, 1).contiguous()
        every = {
            "attn_mask": torch.randn(24, 18) if seed % 2 else torch.rand(24, 18) < 0.2,
            "key_padding_mask": torch.rand(12, 18) < 0.1,
        }
        inputs = (x, y, *(every[name] for name in masked))
        with quantized_engine(engine), torch.no_grad(), quiet():
            model = Net(attention, masked, average=average).eval()
            observer = tq.MinMaxObserver.with_args(dtype=torch.quint8)
            model.qconfig = tq.QConfig(observer, tq.get_default_qconfig(engine).weight)
            prepared = tq.prepare(model)
            prepared(*inputs)
            model = tq.convert(prepared)
        wrong, count = differing(model, *inputs, engine=engine)
        bad, total = bad + wrong, total + count
    assert total > 300_000
    assert bad == 0

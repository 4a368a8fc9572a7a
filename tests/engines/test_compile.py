"""torch.compile of emulated graphs: one graph, the same codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_fx

import fxqfix
from tests.test_to_int8 import prepared_net

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "engine", "isa"),
    [
        ("Residual", "onednn", "vnni"),
        ("Mobile", "fbgemm", "vnni"),
        ("Inception", "qnnpack", "vnni"),
        ("UNet", "x86", "vnni"),
        ("MLP", "fbgemm", "avx2"),
    ],
)
def test_no_branch_depends_on_data(name: str, engine: str, isa: str) -> None:
    prepared, x = prepared_net(name, qat=True)
    emulated = fxqfix.emulate(fxqfix.to_int8(prepared, engine=engine), engine=engine, isa=isa)
    compiled = torch.compile(emulated, backend="eager", fullgraph=True)
    assert torch.equal(compiled(3 * x), emulated(3 * x))
    assert torch.equal(compiled(-x), emulated(-x))


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        return self.fc((y + y).mean((2, 3)))


@pytest.mark.parametrize("engine", ["fbgemm", "onednn"])
def test_what_the_compiler_makes_gives_the_same_codes(engine: str) -> None:
    """Contracted products, other tails: none of its liberties moves a code."""
    torch.manual_seed(0)
    x = torch.randn(2, 2, 12, 12)
    prepared: Any = prepare_fx(_Small().eval(), get_default_qconfig_mapping(engine), (x,))
    prepared(x)
    emulated = fxqfix.emulate(fxqfix.to_int8(prepared, engine=engine), engine=engine)
    compiled = torch.compile(emulated, fullgraph=True)
    assert torch.equal(compiled(3 * x), emulated(3 * x))

"""An op that writes over what it reads: onednn's convolution with an addition."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.backend_config.onednn import get_onednn_backend_config
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import fxqfix
from fxqfix._torch import quantized_engine, quiet
from fxqfix.engines.calls import calls
from fxqfix.errors import UnsupportedError

pytestmark = pytest.mark.skipif(
    "onednn" not in torch.backends.quantized.supported_engines, reason="this torch has no onednn"
)


class Net(nn.Module):
    """Two convolutions, the second with an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))


class Plain(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(x) + self.a(x)


class ReadBefore(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return self.c(F.relu(self.a(y))) + y


class SizeAsked(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return (self.c(x) + y).view(y.shape)


class Own(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return self.c(y) + y


class OwnView(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return self.c(y.view(1, 4, 8, 300)) + y


class ReadAgain(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        z = F.relu(self.c(x) + y)
        return z + y


class ViewReadAgain(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        v = y.view(1, 4, 8, 300)
        z = F.relu(self.c(x) + y)
        return z + v


KEPT = (Plain, ReadBefore, SizeAsked)
WRONG = {Own: "c", OwnView: "c", ReadAgain: "add_1", ViewReadAgain: "add_1"}
X = 2 * torch.randn(1, 4, 8, 300, generator=torch.Generator().manual_seed(0))


@functools.cache
def flow(net: type[Net]) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Frozen, converted; shared by the tests, which leave them as they are."""
    torch.manual_seed(0)
    fused = get_onednn_backend_config()
    with quantized_engine("onednn"), quiet():
        mapping = get_default_qconfig_mapping("onednn")
        prepared = prepare_fx(net().eval(), mapping, (X,), backend_config=fused)
        prepared(X)
        frozen = fxqfix.freeze(prepared)
        return frozen, convert_fx(copy.deepcopy(frozen), backend_config=fused)


@pytest.mark.parametrize("net", [*KEPT, *WRONG])
def test_calls_tell_who_reads_what_was_written_over(net: type[Net]) -> None:
    found = [c for c in calls(flow(net)[1], "onednn").values() if c.key == "conv2d_add"]
    assert len(found) == 1
    assert bool(found[0].rereads) is (net in WRONG)


@pytest.mark.parametrize("net", KEPT)
def test_what_nobody_reads_again_is_emulated(net: type[Net]) -> None:
    _, converted = flow(net)
    emulated = fxqfix.emulate(converted, engine="onednn")
    with quantized_engine("onednn"):
        assert torch.equal(emulated(X), converted(X))


@pytest.mark.parametrize("net", WRONG)
def test_what_is_read_again_is_refused_and_named(net: type[Net]) -> None:
    frozen, converted = flow(net)
    with pytest.raises(UnsupportedError, match="add-writes-over"):
        fxqfix.emulate(converted, engine="onednn")
    report = fxqfix.compare(frozen, converted, [X], engine="onednn")
    named = {row.name for row in report.rows if "kernel-defect" in row.causes}
    assert WRONG[net] in named
    row = next(row for row in report.rows if row.name == WRONG[net])
    assert row.causes["kernel-defect"] > 500
    assert row.evidence["kernel-defect"].startswith("add-writes-over")
    assert named <= {WRONG[net], "view"}
    assert report.unexplained == 0
    assert not any(row.problems for row in report.rows)


class Constant(nn.Module):
    """What is added belongs to the model."""

    def __init__(self, packed: Any) -> None:
        super().__init__()
        self.packed = packed
        added = torch.ones(1, 4, 8, 300).contiguous(memory_format=torch.channels_last)
        self.register_buffer("added", torch.quantize_per_tensor(added, 0.1, 3, torch.quint8))

    def forward(self, x: Tensor) -> Tensor:
        q = torch.quantize_per_tensor(x, 0.1, 3, torch.quint8)
        return torch.ops.quantized.conv2d_add(q, self.added, self.packed, 0.2, 5)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # torch's own copy
def test_a_constant_is_read_again_by_the_next_forward() -> None:
    weight = torch.quantize_per_tensor(torch.ones(4, 4, 1, 1), 0.1, 0, torch.qint8)
    with quantized_engine("onednn"):
        packed = torch.ops.quantized.conv2d_prepack(weight, None, [1, 1], [0, 0], [1, 1], 1)
        model = Constant(packed)
        assert not torch.equal(model(X[:1]).int_repr(), model(X[:1]).int_repr())
        with pytest.raises(UnsupportedError, match="add-writes-over"):
            fxqfix.emulate(model, engine="onednn")  # a copy packs the weight anew

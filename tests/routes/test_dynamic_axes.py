"""Axes of any size: bounds that the model's own export has, and axes other than the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchao", reason="PT2E needs torchao")

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

import fxqfix
from fxqfix.errors import OptionError, RouteError
from tests.dialects import pt2e_nets


class Two(nn.Module):
    """A convolution over a sequence of any length, and one number per sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean(2)) * gain


def _sequence(batch: int, length: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(batch * length)
    return torch.randn(batch, 3, length, generator=made), torch.rand(batch, 1, generator=made)


def _prepared(net: nn.Module, inputs: tuple[Tensor, ...], shapes: Any) -> fx.GraphModule:
    torch.manual_seed(0)
    with pt2e_nets.quiet(), torch.no_grad():
        program = torch.export.export(net.eval(), inputs, dynamic_shapes=shapes)
        quantizer = pt2e_nets.Tiny(pt2e_nets.weight_spec(), pt2e_nets.activation_spec())
        model: fx.GraphModule = pt2e_nets.prepare_pt2e(program.module(), quantizer)
        model(*inputs)
    return model


@pytest.mark.parametrize(
    "dim",
    [Dim("b", min=2, max=64), Dim("b", max=5), Dim("b", min=2), Dim("b")],
    ids=["min-max", "max", "min", "none"],
)
def test_bounds_of_the_models_own_export(dim: Any, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    four, five = torch.randn(4, 8), torch.randn(5, 8)
    model = _prepared(net, (four,), ({0: dim},))
    found = fxqfix.certify(model, "export", [four, five], dynamic_batch=True)
    assert found.exact, str(found)
    assert not any("deployed anew" in note for note in found.notes)
    done = fxqfix.migrate(model, [four, five], tmp_path / "model.pt2", dynamic_batch=True)
    assert done.ok
    assert done.dynamic_batch


def test_a_size_that_the_export_fixed_is_refused_with_its_reason() -> None:
    net = nn.Sequential(nn.Linear(8, 2))
    model = _prepared(net, (torch.randn(4, 8),), None)
    with pytest.raises(RouteError, match="batch"):
        fxqfix.certify(model, "export", [torch.randn(4, 8)], dynamic_batch=True)


@pytest.mark.parametrize("by_name", [False, True])
def test_axes_other_than_the_batch(by_name: bool, tmp_path: Path) -> None:
    batch, length = Dim("batch", max=64), Dim("length", min=4, max=100)
    shapes: Any = ({0: batch, 2: length}, {0: batch})
    model = _prepared(Two(), _sequence(3, 16), shapes)
    if by_name:
        shapes = dict(zip(("x", "gain"), shapes, strict=True))
    data = [_sequence(3, 16), _sequence(5, 9), _sequence(2, 40)]
    found = fxqfix.certify(model, "export", data, dynamic_shapes=shapes)
    assert found.exact, str(found)
    assert found.sites
    assert not found.unchecked
    assert not any("deployed anew" in note for note in found.notes)
    path = tmp_path / "model.pt2"
    assert fxqfix.migrate(model, data, path, dynamic_shapes=shapes).ok
    loaded = torch.export.load(path).module()
    assert loaded(*_sequence(7, 33)).shape == (7, 2)


def test_axes_that_fit_no_input_are_refused() -> None:
    net = nn.Sequential(nn.Linear(8, 2))
    model = _prepared(net, (torch.randn(4, 8),), None)
    strange: tuple[Any, ...] = ({"nobody": {0: Dim("b")}}, (None, None, {0: Dim("b")}), ())
    for shapes in strange:
        with pytest.raises(OptionError, match="dynamic_shapes does not fit"):
            fxqfix.certify(model, "export", [torch.randn(4, 8)], dynamic_shapes=shapes)

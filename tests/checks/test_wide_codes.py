"""Findings about 8-bit grids are none for 16-bit ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxqfix
from fxqfix._torch import quiet

pytest.importorskip("torchao")

from tests.dialects.pt2e_nets import prepare_pt2e, pt2e, tq  # behind importorskip

X = torch.linspace(-1.5, 1.5, 16 * 32).reshape(16, 32)


class LinearsOf(tq.Quantizer):  # type: ignore[misc]  # torchao has no types
    """Linears with activations of one dtype and int8 weights."""

    def __init__(self, dtype: torch.dtype, low: int, high: int, eps: float) -> None:
        super().__init__()
        observer = pt2e.MinMaxObserver.with_args(eps=eps)
        scheme = torch.per_tensor_affine
        self.values = tq.QuantizationSpec(dtype, observer, low, high, scheme)
        per_channel = pt2e.PerChannelMinMaxObserver
        scheme = torch.per_channel_symmetric
        self.weights = tq.QuantizationSpec(torch.int8, per_channel, -128, 127, scheme, ch_axis=0)

    def annotate(self, model: Any) -> Any:
        for node in model.graph.nodes:
            if "linear" in node.name:
                inputs = {node.args[0]: self.values, node.args[1]: self.weights}
                node.meta["quantization_annotation"] = tq.QuantizationAnnotation(
                    inputs, self.values, _annotated=True
                )
        return model

    def validate(self, model: Any) -> None:
        """Takes anything."""


def found(dtype: torch.dtype, low: int, high: int, amplitude: float = 1.0) -> set[str]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 4)).eval()
    with quiet():
        program = torch.export.export(net, (X,)).module()
        prepared = prepare_pt2e(program, LinearsOf(dtype, low, high, 2.0**-23))
        prepared(amplitude * X)
    frozen = fxqfix.freeze(prepared)
    return {f.code for f in fxqfix.lint(frozen, engine="fbgemm").findings}


@pytest.mark.parametrize(("low", "high"), [(-(2**15), 2**15 - 1), (0, 2**15 - 1)])
def test_small_scales_of_many_codes_are_healthy(low: int, high: int) -> None:
    assert found(torch.int16, low, high) <= {"range-lost"}


def test_the_same_in_8_bits_saturates() -> None:
    assert "int16-saturation" in found(torch.uint8, 0, 255)


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(torch.int16, -(2**15), 2**15 - 1), (torch.uint8, 0, 255)]
)
def test_a_constant_is_found_in_any_width(dtype: torch.dtype, low: int, high: int) -> None:
    assert "degenerate-scale" in found(dtype, low, high, 0.0)

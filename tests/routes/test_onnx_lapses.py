"""What ONNX Runtime computes otherwise, by name: any spelling of a convolution, float weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxqfix
from fxqfix._torch import quiet

pytest.importorskip("torchao")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from tests.dialects.pt2e_nets import prepare_pt2e, pt2e, tq  # behind importorskip


class _Own(tq.Quantizer):  # type: ignore[misc]  # torchao has no types
    """Convolutions and linears; their weights too, or not."""

    def __init__(self, weights: str) -> None:
        super().__init__()
        scheme = torch.per_tensor_affine
        self.values = tq.QuantizationSpec(torch.int8, pt2e.MinMaxObserver, -128, 127, scheme)
        self.weights: dict[str, Any] = {}
        if weights == "per tensor":
            scheme = torch.per_tensor_symmetric
            self.weights["spec"] = tq.QuantizationSpec(
                torch.int8, pt2e.MinMaxObserver, -127, 127, scheme
            )
        if weights.startswith("per channel"):
            self.weights["spec"] = tq.QuantizationSpec(
                torch.int8,
                pt2e.PerChannelMinMaxObserver,
                -127,
                127,
                torch.per_channel_symmetric,
                ch_axis=int(weights[-1]),
            )

    def annotate(self, model: Any) -> Any:
        for node in model.graph.nodes:
            if node.op == "call_function" and ("conv" in node.name or "linear" in node.name):
                inputs = {node.args[0]: self.values}
                if self.weights:
                    inputs[node.args[1]] = self.weights["spec"]
                node.meta["quantization_annotation"] = tq.QuantizationAnnotation(
                    inputs, self.values, _annotated=True
                )
        return model

    def validate(self, model: Any) -> None:
        """Takes anything."""


def certified(net: nn.Module, shape: tuple[int, ...], weights: str, level: str = "") -> Any:
    """A certificate over batches in which a rounded bias moves some code."""
    generator = torch.Generator().manual_seed(0)
    batches: list[Tensor] = [torch.randn(shape, generator=generator) for _ in range(8)]
    with quiet():
        program = torch.export.export(net.eval(), (batches[0],)).module()
        prepared = prepare_pt2e(program, _Own(weights))
        for batch in batches:
            prepared(batch)
        return fxqfix.certify(prepared, f"onnxruntime{level}", batches)


@pytest.mark.parametrize(
    ("make", "shape", "weights"),
    [
        (lambda: nn.Conv2d(3, 8, 3, padding="same"), (4, 3, 12, 12), "per tensor"),
        (lambda: nn.Conv1d(3, 8, 4, padding="same", dilation=2), (8, 3, 40), "per channel 0"),
        (lambda: nn.Conv2d(3, 8, 3, padding="valid"), (4, 3, 12, 12), "per tensor"),
        (lambda: nn.ConvTranspose2d(3, 8, 3, stride=2), (2, 3, 8, 8), "per tensor"),
        (lambda: nn.ConvTranspose2d(4, 8, 3, groups=2), (2, 4, 8, 8), "per tensor"),
        (lambda: nn.ConvTranspose1d(3, 8, 3), (4, 3, 40), "per channel 1"),
    ],
)
def test_a_rounded_bias_is_named_in_any_spelling(
    make: Any, shape: tuple[int, ...], weights: str
) -> None:
    torch.manual_seed(0)
    net = make()
    with torch.no_grad():
        net.weight.mul_(20)  # large steps of the accumulator
    found = certified(net, shape, weights)
    assert found.unexplained == 0
    assert found.causes["bias-int32"] > 0
    assert found.ok


@pytest.mark.parametrize("level", ["", ":basic"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(3, 8, 3), (4, 3, 12, 12)),
        (lambda: nn.ConvTranspose2d(3, 8, 3), (2, 3, 8, 8)),
        (lambda: nn.Linear(16, 8), (16, 16)),
        (lambda: nn.Conv2d(4, 8, 3, groups=2, bias=False), (4, 4, 8, 8)),
    ],
)
def test_weights_that_the_runtime_quantizes_itself(
    make: Any, shape: tuple[int, ...], level: str
) -> None:
    torch.manual_seed(0)
    found = certified(make(), shape, "", level)
    assert found.unexplained == 0
    assert found.causes["weight-int8"] > 10
    assert not found.ok  # these are not the graph's weights

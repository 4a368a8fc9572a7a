"""One op, in the form that int8 and decomposed models share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxqfix.dialects.weights import WeightView
from fxqfix.qparams import QParams

__all__ = ["Program", "Step"]

_LAYOUTS = {"linear": "OI", "conv1d": "OIW", "conv2d": "OIHW", "conv3d": "OIDHW"}


@dataclass(frozen=True)
class Step:
    """One op.

    Attributes:
        name: The op's name.
        op: Its key in the op table, with "_relu" where one is fused.
        module: Path of the module that it belongs to.
        value: The node whose output is the result.
        inputs: Names of the steps, or of the model's inputs, that feed it.
        options: Stride, padding and the like.
        input_qparams: The grid of each input, None where it is a float.
        output: The grid of the result, None where it is a float.
        limits: Lowest and highest code that the model itself lets the result have; None for floats.
        weight: The integer weight, with the float bias.
        weighted: Whether the op sums products of the weight's codes.
        tensors: Other float tensors by name.
    """

    name: str
    op: str
    module: str
    value: fx.Node
    inputs: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    input_qparams: tuple[QParams | None, ...] = ()
    output: QParams | None = None
    limits: tuple[int, int] | None = None
    weight: WeightView | None = None
    weighted: bool = False
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def layout(self) -> str:
        """The axes of the weight, "" without one."""
        if self.weight is None:
            return ""
        key = self.op.removesuffix("_relu")
        if key.startswith("conv_transpose"):
            return {3: "IOW", 4: "IOHW", 5: "IODHW"}[self.weight.codes.dim()]
        return _LAYOUTS.get(key, "NE" if key.startswith("embedding") else "")

    @property
    def channel_scales(self) -> Tensor | None:
        """The weight's scales, one or one per output channel; None where they are no such thing.

        torchao's XNNPACK quantizer gives transposed convolutions in QAT a scale per input channel.
        """
        if self.weight is None:
            return None
        grid, layout = self.weight.qparams, self.layout
        scales = torch.tensor(grid.scales)
        if grid.axis is None:
            return scales
        axis = grid.axis % self.weight.codes.dim()
        if axis != (layout.index("O") if "O" in layout else 0):
            return None
        # Each group of a transposed convolution has the channels of axis 1.
        return scales.repeat(int(self.options.get("groups", 1))) if axis else scales


@dataclass(frozen=True)
class Program:
    """All steps of a graph.

    Attributes:
        graph_module: The graph.
        steps: In graph order.
        inputs: Names of the model's inputs.
        outputs: Names of the steps whose results the model returns.
    """

    graph_module: fx.GraphModule
    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

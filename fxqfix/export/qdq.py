"""Parameters as an ONNX model with QuantizeLinear and DequantizeLinear around float ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxqfix._extras import require
from fxqfix.errors import DataError, UnsupportedError
from fxqfix.export.forms import key_of
from fxqfix.export.parameters import OpParameters, Parameters
from fxqfix.qparams import QParams

__all__ = ["qdq_grids", "qdq_model"]

_OPSET = 17  # averages and ranges as the ops below need them
_ACTIVATIONS = {
    "relu": ("Relu", {}),
    "sigmoid": ("Sigmoid", {}),
    "tanh": ("Tanh", {}),
    "hardswish": ("HardSwish", {}),
    "hardsigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
}


def qdq_model(parameters: Parameters, shapes: dict[str, tuple[int, ...]]) -> Any:
    """Write the ops as an ONNX model: floats between quantized grids, weights as integers.

    A declared range narrower than its dtype is held by a Clip in front of the quantize.

    Args:
        parameters: What `extract_parameters` gave.
        shapes: Name of each of the model's inputs -> its shape.

    Returns:
        An `onnx.ModelProto`; `onnx.save` writes it.

    Raises:
        MissingDependencyError: onnx or numpy is not installed.
        DataError: An input's shape is missing.
        UnsupportedError: An op has no form here.

    Example:
        >>> import fxqfix
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         q = torch.quantize_per_tensor(x, 0.5, 3, torch.quint8)
        ...         return torch.ops.quantized.add(q, q, 1.0, 3).dequantize()
        >>> parameters = fxqfix.extract_parameters(Net(), engine="qnnpack", isa="vnni")
        >>> model = qdq_model(parameters, {"x": (1, 4)})
        >>> [node.op_type for node in model.graph.node].count("QuantizeLinear")
        2
    """
    lacking = [name for name in parameters.inputs if name not in shapes]
    if lacking:
        raise DataError(
            "the shape of an input is missing", where="qdq_model", found=", ".join(lacking)
        )
    onnx = require("onnx", "onnx", "qdq_model")
    writer = _Writer(onnx)
    for op in parameters:
        writer.add(op)
    make, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        writer.nodes,
        "fxqfix",
        [make(name, kind, list(shapes[name])) for name in parameters.inputs],
        [make(writer.names.get(name, name), kind, None) for name in parameters.outputs],
        writer.constants,
    )
    opset = [onnx.helper.make_opsetid("", _OPSET)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    model = onnx.shape_inference.infer_shapes(model)  # outputs get their shapes
    onnx.checker.check_model(model)
    return model


def qdq_grids(model: Any) -> dict[str, QParams]:
    """Read the grids back: name of an op -> its result's grid, of a model that `qdq_model` wrote.

    Args:
        model: An `onnx.ModelProto`, whoever saved it since.

    Raises:
        MissingDependencyError: onnx or numpy is not installed.

    Example:
        >>> import fxqfix
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         q = torch.quantize_per_tensor(x, 0.5, 3, torch.quint8)
        ...         return torch.ops.quantized.add(q, q, 1.0, 3).dequantize()
        >>> parameters = fxqfix.extract_parameters(Net(), engine="qnnpack", isa="vnni")
        >>> grids = qdq_grids(qdq_model(parameters, {"x": (1, 4)}))
        >>> grids["add"].scale, grids["add"].zero_point
        (1.0, 3)
    """
    onnx = require("onnx", "onnx", "qdq_grids")
    held = {c.name: onnx.numpy_helper.to_array(c) for c in model.graph.initializer}
    bounds = {n.output[0]: n.input[1:] for n in model.graph.node if n.op_type == "Clip"}
    found = {}
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear":
            continue
        scale, point = (held[name] for name in node.input[1:3])
        dtype = torch.uint8 if point.dtype.name == "uint8" else torch.int8
        info = torch.iinfo(dtype)
        low, high = info.min, info.max
        if node.input[0] in bounds:
            values = [held[name] for name in bounds[node.input[0]]]
            low, high = (round(float(v) / float(scale)) + int(point) for v in values)
        name = node.output[0].removesuffix("_codes")
        found[name] = QParams(float(scale), int(point), int(low), int(high), dtype)
    return found


class _Writer:
    """Nodes and constants as they are made."""

    def __init__(self, onnx: Any) -> None:
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.names: dict[str, str] = {}  # op -> the float value that its readers take

    def node(self, kind: str, inputs: list[str], output: str, **options: Any) -> str:
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [output], output, **options))
        return output

    def constant(self, name: str, value: Tensor) -> str:
        array = value.detach().cpu().contiguous().numpy()
        self.constants.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def add(self, op: OpParameters) -> None:
        """One op, and the quantize behind it."""
        inputs = [self.names.get(name, name) for name in op.inputs]
        key, relu = key_of(op.op)
        found = self.computed(key, op, inputs)
        found = self.node("Relu", [found], f"{op.name}_relu") if relu else found
        if op.output is None:
            self.names[op.name] = found
        else:
            self.names[op.name] = self.quantized(op.name, found, op.output, op.limits)

    def grid(self, name: str, grid: QParams) -> list[str]:
        scale, point = (torch.tensor(v) for v in (grid.scales, grid.zero_points))
        if grid.axis is None:
            scale, point = scale[0], point[0]
        parts = scale.float(), point.to(grid.storage)
        return [
            self.constant(f"{name}_{n}", v) for n, v in zip(("scale", "point"), parts, strict=True)
        ]

    def quantized(
        self, name: str, value: str, grid: QParams, limits: tuple[int, int] | None
    ) -> str:
        low, high = limits or grid.container
        if (low, high) != grid.container:
            scale, point = grid.scales[0], int(grid.zero_points[0])
            ends = [
                self.constant(f"{name}_{n}", torch.tensor((v - point) * scale))
                for n, v in (("low", low), ("high", high))
            ]
            value = self.node("Clip", [value, *ends], f"{name}_held")
        both = self.grid(name, grid)
        codes = self.node("QuantizeLinear", [value, *both], f"{name}_codes")
        return self.node("DequantizeLinear", [codes, *both], f"{name}_value")

    def computed(self, key: str, op: OpParameters, inputs: list[str]) -> str:
        name, o = f"{op.name}_float", op.options
        if key in ("quantize", "dequantize", "dropout", "identity", "contiguous"):
            return self.node("Identity", inputs, name)
        if op.weight is not None and op.weight_qparams is not None:
            return self.weighted(key, op, inputs, name)
        if key in _ACTIVATIONS:
            kind, options = _ACTIVATIONS[key]
            return self.node(kind, inputs, name, **options)
        if key in ("add", "mul") and len(inputs) == 2:
            return self.node(key.title(), inputs, name)
        if key == "cat":
            return self.node("Concat", inputs, name, axis=o.get("dim", 0))
        if key == "leaky_relu":
            return self.node("LeakyRelu", inputs, name, alpha=o.get("negative_slope", 0.01))
        if key == "flatten" and o.get("start_dim", 0) == 1 and o.get("end_dim", -1) == -1:
            return self.node("Flatten", inputs, name, axis=1)
        if key in ("max_pool2d", "avg_pool2d") and not o.get("divisor_override"):
            return self.pool(key, op, inputs, name)
        if key == "adaptive_avg_pool2d" and o.get("output_size") in (1, (1, 1)):
            return self.node("GlobalAveragePool", inputs, name)
        if key == "mean" and o.get("dim") is not None:
            dims = [o["dim"]] if isinstance(o["dim"], int) else list(o["dim"])
            keep = int(o.get("keepdim", False))
            return self.node("ReduceMean", inputs, name, axes=dims, keepdims=keep)
        raise UnsupportedError("there is no ONNX form of this op here", where=op.name, found=op.op)

    def pool(self, key: str, op: OpParameters, inputs: list[str], name: str) -> str:
        o = op.options
        options = {
            "kernel_shape": list(o["kernel_size"]),
            "strides": list(o["stride"]),
            "pads": [*o["padding"], *o["padding"]],
            "ceil_mode": int(o.get("ceil_mode", False)),
        }
        if key == "max_pool2d":
            return self.node("MaxPool", inputs, name, dilations=list(o["dilation"]), **options)
        counted = int(o.get("count_include_pad", True))
        return self.node("AveragePool", inputs, name, count_include_pad=counted, **options)

    def weighted(self, key: str, op: OpParameters, inputs: list[str], name: str) -> str:
        grid, o = op.weight_qparams, op.options
        assert op.weight is not None
        assert grid is not None
        codes = self.constant(f"{op.name}_weight", op.weight)
        options = {} if grid.axis is None else {"axis": grid.axis}
        both = self.grid(f"{op.name}_weight", grid)
        weight = self.node("DequantizeLinear", [codes, *both], f"{op.name}_w", **options)
        bias = [] if op.bias is None else [self.constant(f"{op.name}_bias", op.bias.float())]
        if key == "linear":
            turned = self.node("Transpose", [weight], f"{op.name}_t", perm=[1, 0])
            product = self.node("MatMul", [*inputs[:1], turned], f"{op.name}_product")
            return self.node("Add", [product, *bias], name) if bias else product
        if key not in ("conv1d", "conv2d", "conv3d") or o.get("padding_mode", "zeros") != "zeros":
            raise UnsupportedError(
                "there is no ONNX form of this op here", where=op.name, found=op.op
            )
        padding = o["padding"]
        return self.node(
            "Conv",
            [*inputs[:1], weight, *bias],
            name,
            kernel_shape=list(o["kernel_size"]),
            strides=list(o["stride"]),
            dilations=list(o["dilation"]),
            pads=[*padding, *padding],
            group=o.get("groups", 1),
        )

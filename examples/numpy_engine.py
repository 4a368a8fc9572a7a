"""Re-run a quantized CNN from its files in numpy alone, and compare every code."""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from fxqfix import extract_parameters, golden_vectors

# --- torch: train, calibrate, convert, save ------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)
        self.flatten, self.head = nn.Flatten(), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv1(x)))
        return self.head(self.flatten(self.relu(self.conv2(x))))


def train() -> tuple[nn.Module, Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    classes = torch.tensor(labels)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(6):
        for part in torch.randperm(1347).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(pixels[part]), classes[part]).backward()
            optimizer.step()
    return net.eval(), pixels, classes


def convert(net: nn.Module, pixels: Tensor) -> nn.Module:
    torch.backends.quantized.engine = "qnnpack"
    prepared = prepare_fx(copy.deepcopy(net), get_default_qconfig_mapping("qnnpack"), (pixels,))
    prepared(pixels)  # calibration
    return convert_fx(prepared)


# --- numpy alone: the engine ---------------------------------------------------------------------

Array = np.ndarray[Any, Any]
Op = dict[str, Any]
Requantize = Callable[[Array, Op], Array]


def load(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """The JSON header and the arrays."""
    with np.load(path) as file:
        return json.loads(str(file["header"])), {name: file[name] for name in file.files}


def ops_of(header: dict[str, Any], arrays: dict[str, Array]) -> list[Op]:
    """One dict per op: its part of the header and its arrays."""
    ops = []
    for op in header["ops"]:
        start = f"{op['name']}/"
        own = {n.removeprefix(start): a for n, a in arrays.items() if n.startswith(start)}
        ops.append({**op, **own})
    return ops


def by_float(sums: Array, op: Op) -> Array:
    """qnnpack: rne(f(f(sum) * m)), where m = f(f(ws * xs) * f(1 / os))."""
    step = op["weight_scale"].astype(np.float32) * np.float32(op["input_qparams"][0]["scale"])
    m = step * (np.float32(1) / np.float32(op["output"]["scale"]))
    return np.rint(sums.astype(np.float32) * m).astype(np.int64)


def by_integer(sums: Array, op: Op) -> Array:
    """Integers only: (sum * multiplier) >> shift, halves rounded up."""
    shift = op["fixed_shift"].astype(np.int64)
    return (sums * op["fixed_multiplier"] + (np.int64(1) << (shift - 1))) >> shift


def finish(sums: Array, op: Op, requantize: Requantize) -> Array:
    """Sums (..., outputs) to codes: bias, multiplier, zero point, clamp."""
    point = op["output"]["zero_point"]
    codes = requantize(sums + op.get("bias_int32", 0), op) + point
    return codes.clip(point if op["op"].endswith("_relu") else 0, 255).astype(np.uint8)


def centered(codes: Array, op: Op) -> Array:
    return codes.astype(np.int64) - op["input_qparams"][0]["zero_point"]


def weight(op: Op) -> Array:
    points = op["weight_zero_point"].astype(np.int64)
    return op["weight"] - points.reshape(-1, *[1] * (op["weight"].ndim - 1))


def windows(x: Array, kernel: list[int], stride: list[int]) -> Array:
    found = np.lib.stride_tricks.sliding_window_view(x, kernel, (2, 3))
    return found[:, :, :: stride[0], :: stride[1]]


def conv2d(op: Op, x: Array, requantize: Requantize) -> Array:
    (up, left), options = op["options"]["padding"], op["options"]
    x = np.pad(centered(x, op), ((0, 0), (0, 0), (up, up), (left, left)))
    seen = windows(x, options["kernel_size"], options["stride"])
    sums = np.einsum("nchwij,ocij->nhwo", seen, weight(op))
    return finish(sums, op, requantize).transpose(0, 3, 1, 2)


def linear(op: Op, x: Array, requantize: Requantize) -> Array:
    return finish(centered(x, op) @ weight(op).T, op, requantize)


def max_pool2d(op: Op, x: Array, requantize: Requantize) -> Array:
    return windows(x, op["options"]["kernel_size"], op["options"]["stride"]).max((4, 5))


def quantize(op: Op, x: Array, requantize: Requantize) -> Array:
    """Floats in: rne(fma(x, f(1 / s), zp)); the product is exact in float64."""
    inverse = np.float64(np.float32(1) / np.float32(op["output"]["scale"]))
    values = (x.astype(np.float64) * inverse + op["output"]["zero_point"]).astype(np.float32)
    return np.rint(values).clip(0, 255).astype(np.uint8)


def dequantize(op: Op, x: Array, requantize: Requantize) -> Array:
    return centered(x, op).astype(np.float32) * np.float32(op["input_qparams"][0]["scale"])


def flatten(op: Op, x: Array, requantize: Requantize) -> Array:
    return x.reshape(len(x), math.prod(x.shape[1:]))


OPS = {f.__name__: f for f in (conv2d, linear, max_pool2d, quantize, dequantize, flatten)}


def run(ops: list[Op], inputs: dict[str, Array], requantize: Requantize) -> dict[str, Array]:
    """The whole network: every op reads what the ops before it gave."""
    values = dict(inputs)
    for op in ops:
        compute = OPS[op["op"].removesuffix("_relu")]
        values[op["name"]] = compute(op, *(values[name] for name in op["inputs"]), requantize)
    return values


def compare(parameters: Path, golden: Path) -> dict[str, tuple[int, int]]:
    """Codes that differ from the golden ones per op, with either multiplier."""
    header, arrays = load(golden)
    ops, inputs = ops_of(*load(parameters)), {n: arrays[f"value/{n}"] for n in header["inputs"]}
    runs = run(ops, inputs, by_float), run(ops, inputs, by_integer)
    found = {}
    print("\ncodes that differ      float32 multiplier  integer multiplier       of")
    for name in (op["name"] for op in ops if f"value/{op['name']}" in arrays):
        wanted = arrays[f"value/{name}"]
        first, second = (int((values[name] != wanted).sum()) for values in runs)
        found[name] = first, second
        print(f"{name:22} {first:18} {second:19} {wanted.size:8}")
    total = [sum(column) for column in zip(*found.values(), strict=True)]
    print(f"{'all':22} {total[0]:18} {total[1]:19}")
    return found


def main() -> dict[str, tuple[int, int]]:
    torch.manual_seed(0)
    net, pixels, labels = train()
    converted, held_out = convert(net, pixels[:256]), pixels[1347:]
    accuracy = (converted(held_out).argmax(1) == labels[1347:]).float().mean()
    print(f"accuracy of the int8 model: {accuracy:.1%}\n")

    parameters = extract_parameters(converted)
    print(parameters)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "parameters.npz"), Path(folder, "golden.npz")
        parameters.save(files[0])
        golden_vectors(converted, held_out).save(files[1])
        return compare(*files)


if __name__ == "__main__":
    main()

"""Cost of judge, over one emulated forward; recall and precision of what it names.

python benchmarks/judge.py [--planted]
"""

from __future__ import annotations

import copy
import functools
import sys
import warnings
from pathlib import Path

import _common
import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from fxqfix import Parameters, QParams, emulate, extract_parameters, golden_vectors, judge
from fxqfix.export import Reference

ENGINE = "qnnpack"


def mobilenet(blocks: int = 16) -> nn.Module:
    """About 100 int8 ops: MobileNetV2's kinds of blocks, with residuals."""
    net = _common.Inverted
    layers: list[nn.Module] = [*_common._conv_bn(3, 16, 3, stride=2), nn.ReLU6()]
    channels = 16
    for index in range(blocks):
        layers.append(net(channels))
        if index in (3, 9):
            layers += [*_common._conv_bn(channels, 2 * channels, 1, stride=2), nn.ReLU6()]
            channels *= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def deviating(parameters: Parameters, x: Tensor) -> dict[str, Tensor]:
    """A device that cuts off fractions in every op with a weight, and rounds before it adds."""
    have: dict[str, Tensor] = {parameters.inputs[0]: x}
    for op in parameters:
        reference = Reference(op, parameters.arithmetic)
        found = reference.run(*(have[name] for name in op.inputs))
        kernel = reference.kernel
        if op.weight is not None and op.output is not None:
            codes = have[op.inputs[0]]
            value = kernel.scaled(kernel.accumulate(codes).double()).double()
            whole = torch.trunc(value) + int(op.output.zero_points[0])
            low, high = kernel.grid.container
            floor = int(op.output.zero_points[0]) if kernel.relu else low
            found = torch.empty_like(found).copy_(whole.clamp(max(low, floor), high))
        elif op.op == "add":  # each input rounded to the result's grid first
            low, high = op.output.container
            parts = [
                _steps(have[n], q, op.output)
                for n, q in zip(op.inputs, op.input_qparams, strict=True)
            ]
            whole = parts[0] + parts[1] + int(op.output.zero_points[0])
            found = torch.empty_like(found).copy_(whole.clamp(low, high))
        have[op.name] = found
    return have


def _steps(codes: Tensor, source: QParams, target: QParams) -> Tensor:
    centered = (codes.int() - int(source.zero_points[0])).double()
    return torch.round(centered * (source.scales[0] / target.scales[0]))


def main() -> None:
    _common.settle()
    warnings.filterwarnings("ignore")
    torch.backends.quantized.engine = ENGINE
    x = torch.rand(1, 3, 224, 224)
    net = mobilenet().eval()
    prepared = prepare_fx(copy.deepcopy(net), get_default_qconfig_mapping(ENGINE), (x,))
    prepared(x)
    converted = convert_fx(prepared)
    parameters, golden = extract_parameters(converted), golden_vectors(converted, x)
    wrong = deviating(parameters, x)
    emulated = emulate(converted)
    exact, apart = judge(parameters, golden), judge(parameters, wrong)
    assert exact.exact
    differing = [op for op in apart.ops if not op.equal]
    due = {("truncation",), ("inputs-rounded-first",)}
    named = sum(any(e.deviations in due for e in op.named) for op in differing)
    print(f"{len(parameters)} ops, {len(differing)} with a deviation, {named} of them named")
    found = _common.medians(
        {
            "emulate": functools.partial(_forward, emulated, x),
            "exact": functools.partial(judge, parameters, golden),
        },
        7,
    )
    slow = _common.medians({"apart": functools.partial(judge, parameters, wrong)}, 1)
    print(f"judge where it is exact: {found['exact'] / found['emulate']:.1f}x an emulated forward")
    print(f"with a deviation in every op: {slow['apart'] / found['emulate']:.1f}x")
    print(f"  an emulated forward takes {1000 * found['emulate']:.0f} ms")


def _forward(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


if __name__ == "__main__":
    if "--planted" in sys.argv:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        from tests.deviations.planted import main as planted

        sys.exit(planted())
    main()

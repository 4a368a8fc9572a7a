"""Find the one layer of a converted network that is wrong, and see why."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

from fxqfix import Report, compare, freeze


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.conv(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(8) for _ in range(5)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def broken() -> tuple[nn.Module, nn.Module, Tensor]:
    """A converted model in which somebody's script dropped the bias of one convolution."""
    x = torch.rand(4, 8, 12, 12)
    prepared = prepare_qat_fx(Net().train(), get_default_qat_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    prepared = freeze(prepared.eval())
    converted = convert_fx(copy.deepcopy(prepared))
    conv = converted.get_submodule("blocks.2.conv")
    conv.set_weight_bias(conv.weight(), None)
    return prepared, converted, x


def main() -> Report:
    torch.manual_seed(0)
    torch.backends.quantized.engine = "fbgemm"
    prepared, converted, x = broken()
    report = compare(prepared, converted, [x])

    print("what each op adds, and the accumulated difference:")
    for row in report.rows:
        if row.kind == "activation":
            shares = f"local {row.local_share:4.0%}  cumulative {row.cumulative_share:4.0%}"
            print(f"  {row.name:14} {shares}")
    path = report.origin(report.rows[-1].name)
    print("the error of the output, from its birth:", " -> ".join(row.name for row in path))

    bad = path[0]
    weight = report.row(f"{bad.name}.weight")
    print(f"{bad.name}: prepared {bad.prepared}, converted {bad.converted}")
    print(f"{bad.name}: {bad.local}")
    print(f"{bad.name}: causes {bad.causes}")
    for cause, evidence in bad.evidence.items():
        print(f"  {cause}: {evidence}")
    print(f"its weight: exact is {weight.exact}; what is left of a convolution is its bias:")
    for name, model in (("prepared", prepared), ("converted", converted)):
        bias = model.get_submodule(bad.module).bias
        value = bias() if callable(bias) else bias
        print(f"  {name}: {None if value is None else [round(v, 4) for v in value.tolist()]}")
    return report


if __name__ == "__main__":
    main()

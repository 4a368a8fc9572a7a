"""Eager mode: prepare_qat, convert and QuantStub; compare, freeze, and what can't be traced."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    DeQuantStub,
    QuantStub,
    convert,
    fuse_modules_qat,
    get_default_qat_qconfig,
    prepare_qat,
)

from fxqfix import Report, compare, freeze, inspect, to_decomposed
from fxqfix.errors import TraceError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(self.quant(x))))
        return self.dequant(self.fc(x.flatten(1)))


class DataDependent(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def prepare(net: nn.Module, x: Tensor) -> nn.Module:
    net.train().qconfig = get_default_qat_qconfig("fbgemm")
    fuse_modules_qat(net, [["conv", "bn", "relu"]], inplace=True)
    prepared = prepare_qat(net)
    for _ in range(3):
        prepared(x)  # QAT
    return prepared.eval()


def main() -> dict[str, Report]:
    torch.manual_seed(0)
    torch.backends.quantized.engine = "fbgemm"
    x = torch.rand(8, 3, 8, 8)
    prepared = prepare(Net(), x)
    print(inspect(prepared))

    frozen = freeze(prepared)  # eager in, eager out: torch's own convert takes it
    print("frozen is a", type(frozen).__name__)
    reports = {
        "convert(prepared)": compare(prepared, convert(copy.deepcopy(prepared)), [x]),
        "convert(freeze(prepared))": compare(frozen, convert(copy.deepcopy(frozen)), [x]),
        "to_decomposed(prepared)": compare(frozen, to_decomposed(prepared), [1.5 * x]),
    }
    for name, report in reports.items():
        print(f"{name:26} exact: {report.exact!s:6} causes: {report.causes}")

    # The model is traced on the way. Control flow that depends on data can't be:
    try:
        compare(prepare(DataDependent(), x), None, [x])
    except TraceError as error:
        print(error)
    return reports


if __name__ == "__main__":
    main()

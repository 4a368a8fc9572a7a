"""Compare a prepared model with its conversion, and read the table."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

from fxqfix import Report, compare, freeze, to_decomposed


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(288, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.relu(self.conv(x)).flatten(1))


def main() -> dict[str, Report]:
    torch.manual_seed(0)
    torch.backends.quantized.engine = "fbgemm"
    x = torch.rand(32, 1, 8, 8)
    prepared = prepare_qat_fx(Net().train(), get_default_qat_qconfig_mapping("fbgemm"), (x,))
    prepared(x)  # your QAT training
    prepared.eval()

    brighter = [x, 1.03 * x]  # any iterable of batches
    frozen = freeze(prepared)
    reports = {
        "convert_fx(prepared)": compare(prepared, convert_fx(copy.deepcopy(prepared)), brighter),
        "convert_fx(freeze(prepared))": compare(
            frozen, convert_fx(copy.deepcopy(frozen)), brighter
        ),
        "to_decomposed(prepared)": compare(frozen, to_decomposed(prepared), brighter),
    }
    print(reports["convert_fx(prepared)"])
    print()
    for name, report in reports.items():
        print(f"{name:30} exact: {report.exact!s:6} causes: {report.causes}")
    return reports


if __name__ == "__main__":
    main()

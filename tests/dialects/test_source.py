from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx

from fxqfix import Report, compare


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x))  # the line that rows name


def test_rows_name_the_line_and_hold_the_codes() -> None:
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    prepared = prepare_qat_fx(Net().train(), get_default_qat_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    report = compare(prepared.eval(), None, [x, 2 * x], engine="fbgemm")
    row = report.row("fc")
    # torch 2.6 records no lines
    assert row.source == "" or "test_source.py:" in row.source
    assert row.source == "" or "torch.relu(self.fc(x))" in row.source
    assert row.histogram is not None
    for counts in (row.histogram.prepared, row.histogram.converted):
        assert sum(counts) == row.cumulative.elements == 8
    weight = report.row("fc.weight").histogram
    assert weight is not None
    assert sum(weight.converted) == 8
    assert Report.from_json(report.to_json()) == report
    both = report.merge(report).row("fc").histogram
    assert both is not None
    assert sum(both.prepared) == 16

"""What a comparison says of the kernels: engine, largest sum, pairs that can saturate."""

from __future__ import annotations

import pytest
import torch
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_fx

import fxqfix
from fxqfix._torch import cpu_level, quantized_engine, quiet
from fxqfix.report import Report
from tests.engines.nets import NETS


def _report(engine: str) -> Report:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    with quantized_engine(engine), quiet(), torch.no_grad():
        prepared = prepare_fx(NETS["Residual"]().eval(), get_default_qconfig_mapping(engine), (x,))
        prepared(x)
        return fxqfix.compare(fxqfix.freeze(prepared), None, [1.5 * x], engine=engine)


@pytest.mark.parametrize("engine", ["fbgemm", "x86", "onednn", "qnnpack"])
def test_every_kernel_is_named(engine: str) -> None:
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this torch has no engine {engine}")
    report = _report(engine)
    rows = {row.name: row for row in report.rows if row.kind == "activation"}
    conv = "onednn" if cpu_level() == "vnni" else "fbgemm"
    conv = engine if engine != "x86" else conv
    assert rows["stem_0"].engine == conv
    assert rows["head"].engine == (engine if engine != "x86" else "fbgemm")
    for name, row in rows.items():
        weighted = row.op.startswith(("conv", "linear"))
        assert (row.accumulator is not None) == (row.saturation is not None) == weighted, name
    assert report.unexplained == 0
    assert Report.from_json(report.to_json()) == report


def test_the_bound_holds_every_sum() -> None:
    """8 inputs of at most 255 steps times weights of at most 128."""
    report = _report("qnnpack")
    row = report.row("head")
    assert row.accumulator is not None
    assert 0 < row.accumulator < 255 * 128 * 8 + 1
    assert row.saturation == 0  # qnnpack never saturates


def test_saturation_is_told_before_it_happens() -> None:
    row = _report("fbgemm").row("stem_0")
    assert row.saturation is not None
    assert row.saturation > 0
    assert "int16 saturation is possible on CPUs without VNNI: stem_0" in str(_report("fbgemm"))

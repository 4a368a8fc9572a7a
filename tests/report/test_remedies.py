"""The code to paste runs, and does what it says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

from fxqfix import compare
from fxqfix.causes import registry
from fxqfix.report.headline import headline, percent
from fxqfix.report.remedies import advice, code
from tests.report import samples


def models() -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).train()
    prepared = prepare_qat_fx(net, get_default_qat_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    converted = convert_fx(copy.deepcopy(prepared).eval())
    return {"prepared": prepared.eval(), "converted": converted, "data": [2 * x]}


@pytest.mark.parametrize("cause", [cause.name for cause in registry()])
def test_code_of_every_cause_runs(cause: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = code([cause], "fbgemm")
    given = models()
    exec(text, given)
    if "int8 =" in text:
        assert "fxqfix repair" in capsys.readouterr().out
        report = compare(given["prepared"], given["int8"], given["data"], engine="fbgemm")
        assert cause not in report.causes
    known = next(row for row in registry() if row.name == cause)
    assert bool(text) or not known.repair
    assert advice(cause) == known.advice


def test_an_unknown_cause_has_none() -> None:
    assert (code(["nonsense"]), advice("nonsense")) == ("", "")


def test_headlines() -> None:
    assert headline(samples.exact_sample()) == (
        "Every code and every output bit that was compared is equal."
    )
    assert headline(samples.many(3)).startswith("0.4% of the codes of features_2_0 differ")
    assert [percent(share) for share in (0.0, 1e-9, 0.5, 1 - 1e-9, 1.0)] == [
        "0%", "1e-07%", "50%", "99.9%", "100%",
    ]  # fmt: skip

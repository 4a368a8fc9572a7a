"""Functions for the command line; nothing is unpickled, the models come from your code.

fxqfix compare examples.cli_entry:models
fxqfix compare examples.cli_entry:models --sort local --limit 3 --output report.html
fxqfix compare examples.cli_entry:frozen --fail-on-difference
fxqfix inspect examples.cli_entry:prepared
fxqfix migrate examples.cli_entry:models --dynamic-batch --output model.pt2
fxqfix certify examples.cli_entry:models --route export
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx

from fxqfix import freeze, to_decomposed


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(8, 3, 10, 10, generator=generator) for _ in range(2)]


def prepared() -> fx.GraphModule:
    """What your training script saved, loaded by your own code."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    x = batches()[0]
    model = prepare_qat_fx(net.train(), get_default_qat_qconfig_mapping("fbgemm"), (x,))
    model(x)
    return model.eval()


def models() -> tuple[nn.Module, None, list[Tensor]]:
    """(prepared, converted or None for torch's own conversion, batches)."""
    return prepared(), None, batches()


def frozen() -> dict[str, Any]:
    """The same as a dict; here the decomposed model against the frozen one."""
    model = prepared()
    return {
        "prepared": freeze(model),
        "converted": to_decomposed(model),
        "data": batches(),
        "engine": "fbgemm",
    }

"""Cost of the emulation: the engine's integers in plain tensor ops, over the fp32 forward.

python benchmarks/emulation.py
"""

from __future__ import annotations

import copy
import functools

import _common
import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from fxqfix import emulate


def forward(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def main() -> None:
    _common.settle()
    x = torch.rand(8, 3, 32, 32)
    for engine in ("fbgemm", "onednn", "qnnpack"):
        torch.backends.quantized.engine = engine
        for network, make in _common.NETWORKS.items():
            net = make().eval()
            prepared = prepare_fx(copy.deepcopy(net), get_default_qconfig_mapping(engine), (x,))
            prepared(x)
            converted = convert_fx(prepared)
            forms = {"fp32": net, "int8": converted, "emulated": emulate(converted)}
            found = _common.medians(
                {name: functools.partial(forward, model, x) for name, model in forms.items()}, 21
            )
            print(f"{engine}, {network}: emulated / fp32 {found['emulated'] / found['fp32']:.2f}x")
            for name, seconds in found.items():
                print(f"  {name:8} {1000 * seconds:6.1f} ms")


if __name__ == "__main__":
    main()

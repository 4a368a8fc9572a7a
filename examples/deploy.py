"""One QAT model deployed as a .pt2 file, by Inductor and by ONNX Runtime: what each computes."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx

from fxqfix import Certificate, certify, to_decomposed

warnings.simplefilter("ignore")  # torch's deprecation notices

# Where each wants its clamps: Inductor keeps int8 kernels behind values, ONNX Runtime around codes.
ROUTES = {"export": True, "inductor": True, "onnxruntime": "codes"}


def main() -> dict[str, Certificate]:
    torch.manual_seed(0)
    x = torch.rand(8, 3, 12, 12)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU())
    prepared = prepare_qat_fx(net.train(), get_default_qat_qconfig_mapping("fbgemm"), (x,))
    prepared(x)  # QAT
    prepared.eval()
    # The input's range is that of the sensor, three times what was seen.
    prepared.activation_post_process_0.activation_post_process.max_val.fill_(3)
    prepared(x)
    data = [gain * x for gain in (1, 1.5, 3)]
    found: dict[str, Certificate] = {}
    for route, pins in ROUTES.items():
        for name, pin in {"plain": False, "pinned": pins}.items():
            certificate = certify(to_decomposed(prepared, pin_ranges=pin), route, data)
            kernels = certificate.integer_kernels
            lost = certificate.causes.get("range-lost", 0)
            print(
                f"{route:12} {name:7} ok: {certificate.ok!s:6} {kernels} int8 kernels, {lost} lost"
            )
            found[f"{route} {name}"] = certificate
    print(found["onnxruntime pinned"])
    return found


if __name__ == "__main__":
    main()

"""Train with the integers that will be deployed, and judge a data set with them on any device.

A network with a full 8-bit range, for CPUs without VNNI: there pairs of products saturate at 16
bits, and training knows nothing of it. Images: scikit-learn's digits where it is installed, else
noisy stripes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from qat_training_script import Net, images, train
from torch import Tensor, nn
from torch.ao.quantization import (
    FusedMovingAvgObsFakeQuantize,
    QConfig,
    QConfigMapping,
    default_weight_fake_quant,
)
from torch.ao.quantization.quantize_fx import prepare_qat_fx

from fxqfix import as_deployed, emulate, to_int8, validate

ENGINE, LEVEL = "fbgemm", "avx2"  # what is deployed on, whatever this machine is
WHOLE = FusedMovingAvgObsFakeQuantize.with_args(quant_min=0, quant_max=255, dtype=torch.quint8)


def tune(model: nn.Module, pixels: Tensor, label: Tensor, steps: int = 50) -> None:
    """As any training loop; the optimizer is made of the new model's parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for index in torch.randint(len(pixels), (steps, 64)):
        optimizer.zero_grad()
        F.cross_entropy(model(pixels[index]), label[index]).backward()
        optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pixels, label = images()
    held_out = [(pixels[i : i + 100], label[i : i + 100]) for i in range(1000, len(pixels), 100)]
    pixels, label = pixels[:1000], label[:1000]

    mapping = QConfigMapping().set_global(QConfig(WHOLE, default_weight_fake_quant))
    prepared = prepare_qat_fx(Net().train(), mapping, (pixels[:1],))
    for _ in range(3):
        train(prepared, pixels, label, 1e-2)
    prepared.eval()
    print("prepared:           ", validate(prepared, held_out, "accuracy"))

    emulated = emulate(to_int8(prepared, engine=ENGINE), engine=ENGINE, isa=LEVEL, threads=1)
    print("deployed:           ", validate(emulated.to(device), held_out, "accuracy"))

    model = as_deployed(prepared, engine=ENGINE, isa=LEVEL, threads=1).to(device)
    before = validate(model, held_out, "accuracy").value
    tune(model, pixels.to(device), label.to(device))
    print("trained as deployed:", validate(model, held_out, "accuracy"))

    emulated = emulate(to_int8(model, engine=ENGINE), engine=ENGINE, isa=LEVEL, threads=1)
    found, wanted = model(pixels.to(device)), emulated.to(device)(pixels.to(device))
    print("outputs that differ from to_int8's:", int((found != wanted).sum()))
    print("moved:", before, "->", validate(model, held_out, "accuracy").value)


if __name__ == "__main__":
    main()

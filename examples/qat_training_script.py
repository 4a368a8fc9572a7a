"""A QAT training script that logs a report per epoch and freezes before it converts.

Trains on scikit-learn's digits where it is installed, else on noisy stripes. With a folder as
argument it writes TensorBoard logs there (needs tensorboard).
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn.intrinsic.qat import freeze_bn_stats
from torch.ao.quantization import disable_observer, get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

from fxqfix import Report, compare, freeze

EPOCHS, SETTLED = 4, 1  # in the last epoch observers and BatchNorm's statistics stand still


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(self.conv1(x)).flatten(1))


def images() -> tuple[Tensor, Tensor]:
    """8x8 images in [0, 1] and their labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        label = torch.randint(4, (1200,))
        i, j = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
        patterns = torch.stack([i % 2, j % 2, (i + j) % 2, (i // 2 + j // 2) % 2]).float()
        return (0.6 * patterns[label] + 0.4 * torch.rand(1200, 8, 8))[:, None], label
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    return pixels[order], torch.tensor(digits.target)[order]


def train(model: nn.Module, pixels: Tensor, label: Tensor, rate: float) -> None:
    """One epoch."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for index in torch.randperm(len(pixels)).split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(pixels[index]), label[index]).backward()
        optimizer.step()


def accuracy(model: nn.Module, pixels: Tensor, label: Tensor) -> float:
    with torch.no_grad():
        return (model(pixels).argmax(1) == label).float().mean().item()


def writer_for(folder: str | None) -> Any:
    if folder is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder)


def main(folder: str | None = None) -> list[Report]:
    torch.manual_seed(0)
    torch.backends.quantized.engine = "fbgemm"
    pixels, label = images()
    held_out, pixels = pixels[:300], pixels[300:]
    answers, label = label[:300], label[300:]
    writer = writer_for(folder)

    net = Net()
    train(net, pixels, label, 1e-2)
    mapping = get_default_qat_qconfig_mapping("fbgemm")
    prepared = prepare_qat_fx(net.train(), mapping, (pixels[:1],))
    reports = []
    for epoch in range(EPOCHS):
        if epoch == EPOCHS - SETTLED:
            prepared.apply(disable_observer).apply(freeze_bn_stats)
        train(prepared, pixels, label, 1e-3)
        prepared.eval()
        # None: torch's own conversion of a copy. Two batches are enough to see which layers differ.
        report = compare(prepared, None, held_out.split(64)[:2], progress=False)
        if writer is not None:
            report.log(writer, epoch)
        print(f"epoch {epoch}: accuracy {accuracy(prepared, held_out, answers):.3f}", report.causes)
        reports.append(report)

    frozen = freeze(prepared)
    deployed = convert_fx(copy.deepcopy(frozen))
    report = compare(frozen, deployed, held_out.split(64), progress=False)
    print(f"deployed: accuracy {accuracy(deployed, held_out, answers):.3f}", report.causes)
    if writer is not None:
        report.log(writer, EPOCHS)
        writer.close()
    return [*reports, report]


if __name__ == "__main__":
    main(*sys.argv[1:2])

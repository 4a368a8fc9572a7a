"""Cost of a Monitor: a look beside the training steps between two looks.

python benchmarks/monitor.py
"""

from __future__ import annotations

import _common
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx

from fxqfix import Monitor
from fxqfix.demos.digits import Digits

EVERY = 100
# Network, images of a training batch, samples of a look, and the share of the time it may take.
CASES = {
    "resnet18-like": (32, 3, 64, 1, 0.02),
    "digits": (64, 1, 8, 4, 0.15),
}


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        down = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.down = nn.Sequential(*down) if stride == 2 else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.down(x) + self.body(x))


def resnet18() -> nn.Module:
    """The widths and depth of a resnet18: 11 million weights."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    for inputs, outputs in ((64, 64), (64, 128), (128, 256), (256, 512)):
        layers += [Block(inputs, outputs), Block(outputs, outputs)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def main() -> None:
    for name, (batch, channels, size, samples, limit) in CASES.items():
        net = resnet18() if name == "resnet18-like" else Digits()
        x, label = torch.rand(batch, channels, size, size), torch.randint(10, (batch,))
        mapping = get_default_qat_qconfig_mapping(_common.ENGINE)
        prepared = prepare_qat_fx(net.train(), mapping, (x,))
        optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-3)
        monitor = Monitor(prepared, x[:samples], every=EVERY)

        def step(
            prepared: nn.Module = prepared,
            optimizer: torch.optim.Optimizer = optimizer,
            x: Tensor = x,
            label: Tensor = label,
        ) -> None:
            optimizer.zero_grad()
            F.cross_entropy(prepared(x), label).backward()
            optimizer.step()

        found = _common.medians({"step": step, "look": monitor.check}, repeats=5)
        share = found["look"] / (EVERY * found["step"] + found["look"])
        print(
            f"{name}: a step {1000 * found['step']:.1f} ms, a look {1000 * found['look']:.1f} ms; "
            f"at every={EVERY} {100 * share:.1f}% of the time (at most {100 * limit:.0f}%)"
        )


if __name__ == "__main__":
    _common.settle()
    main()

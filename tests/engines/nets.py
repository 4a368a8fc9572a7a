"""Small architectures, and what makes each hard: residuals, depthwise, cat, shuffle."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["NETS", "SHAPES"]


def _conv(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class PlainCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(3, 8), nn.MaxPool2d(2), _conv(8, 12, 5), nn.MaxPool2d(2))
        self.head = nn.Linear(12 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = _conv(3, 8), _conv(8, 8)
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.relu, self.pool = nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.relu(self.two(self.one(x)) + x)
        return self.head(self.pool(x).flatten(1))


class Mobile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Hardswish())
        self.expand = nn.Sequential(nn.Conv2d(16, 24, 1), nn.Hardswish())
        self.depth, self.project = _conv(24, 24, 3, 1, 24), nn.Conv2d(24, 16, 1)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1)
        )
        self.gate, self.head = nn.Hardsigmoid(), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.depth(self.expand(x)))
        x = x * self.gate(self.squeeze(x))
        return self.head(x.mean([2, 3]))


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 9)
        self.one, self.three, self.five = _conv(9, 7, 1), _conv(9, 8, 3), _conv(9, 5, 5)
        self.pool = nn.AvgPool2d(3, 1, 1)
        self.last, self.head = _conv(29, 8, 1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)
        return self.head(self.last(x).mean((2, 3)))


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 16)
        self.branch = nn.Sequential(
            _conv(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), _conv(8, 8, 1)
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, 1)
        x = torch.cat([left, self.branch(right)], 1)
        batch, channels, height, width = x.shape
        x = x.reshape(batch, 2, channels // 2, height, width).transpose(1, 2)
        return self.head(x.reshape(batch, channels, height, width).mean([2, 3]))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom = _conv(3, 6), _conv(6, 6)
        self.pool, self.up = nn.MaxPool2d(2), nn.ConvTranspose2d(6, 6, 2, 2)
        self.join, self.out = _conv(12, 6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        x = self.up(self.bottom(self.pool(skip)))
        return self.out(self.join(torch.cat([skip, x], 1)))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(48, 33), nn.Linear(33, 17), nn.Linear(17, 5)
        self.relu, self.tanh, self.leak = nn.ReLU(), nn.Tanh(), nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.leak(self.two(self.tanh(self.relu(self.one(x))))))


class VGGWide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(3, 32), _conv(32, 64), nn.AvgPool2d(2), _conv(64, 16, 3, 2))
        self.norm, self.head = nn.ELU(), nn.Linear(16 * 16, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.norm(self.body(x)), 1)).sigmoid()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start, self.lstm = nn.Linear(12, 17), nn.LSTM(12, 17, 2, bidirectional=True)
        self.mix, self.relu, self.head = nn.Linear(34, 16), nn.ReLU(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = self.start(x[:4])  # torch's FX flow wants one
        return self.head(self.relu(self.mix(self.lstm(x, (state, state))[0])))


NETS = {
    c.__name__: c
    for c in (PlainCNN, Residual, Mobile, Inception, Shuffle, UNet, MLP, VGGWide, Recurrent)
}
# Of the input; (4, 3, 16, 16) for all others.
SHAPES = {"MLP": (4, 48), "Recurrent": (7, 5, 12)}

"""The picture of the README: the page of a report in a headless Chromium.

python docs/picture.py    (needs chromium and chromedriver)
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from fxqfix import compare  # noqa: E402  # of this checkout
from tests.report.browser import browser  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "report.png"


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down = nn.Conv2d(inputs, outputs, 1, stride) if stride == 2 else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.down(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.layer1 = nn.Sequential(Block(8, 8), Block(8, 16))
        self.layer2 = nn.Sequential(Block(16, 16), Block(16, 32))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(x)))
        return self.fc(self.pool(x).flatten(1))


def main() -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.backends.quantized.engine = "fbgemm"
    x = torch.randn(8, 3, 32, 32)
    prepared = prepare_qat_fx(Net().train(), get_default_qat_qconfig_mapping("fbgemm"), (x,))
    for _ in range(3):
        prepared(torch.randn(8, 3, 32, 32))
    report = compare(prepared.eval(), convert_fx(copy.deepcopy(prepared)), [x, 1.5 * x])
    with tempfile.TemporaryDirectory() as folder, browser() as window:
        page = Path(folder) / "report.html"
        report.to_html(page)
        window.open(page, 1400, 900)
        index = [row.name for row in report.rows].index("stem_0")
        window.click(f"#row-{index} button")
        window.run("window.scrollTo(0, 0)")
        window.screenshot(PICTURE)
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main()

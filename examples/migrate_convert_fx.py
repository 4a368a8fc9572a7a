"""From convert_fx to the decomposed flow, and to a .pt2 file, in steps that can be checked."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

from fxqfix import Report, compare, freeze, migrate, to_decomposed
from fxqfix.errors import RangeUnknownError


class Legacy(nn.Module):
    """A small convolutional network with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.body(x))
        return self.head(x.mean([2, 3]))


def main() -> dict[str, Report]:
    torch.manual_seed(0)
    torch.backends.quantized.engine = "fbgemm"
    x = torch.rand(8, 3, 10, 10)
    mapping = get_default_qat_qconfig_mapping("fbgemm")
    prepared = prepare_qat_fx(Legacy().train(), mapping, (x,))
    prepared(x)  # QAT
    prepared.eval()
    deployed = convert_fx(copy.deepcopy(prepared))  # what runs today
    data = [x, 1.03 * x]  # the second batch leaves the range that was trained
    reports = {"convert_fx": compare(prepared, deployed, data)}

    # 1. The int8 model alone: it does not know quant_min / quant_max any more.
    try:
        to_decomposed(deployed)
    except RangeUnknownError as error:
        print(error)

    # 2. The ranges from the qconfig mapping (or from the prepared model). Scales stay as baked.
    ranged = to_decomposed(deployed, ranges_from=mapping)
    same = to_decomposed(deployed, ranges_from=prepared)
    print("both sources of ranges agree:", torch.equal(ranged(data[1]), same(data[1])))
    reports["int8, with its ranges"] = compare(prepared, ranged, data)

    # 3. From the prepared model: its own scales too. Every output bit equals the frozen model's.
    decomposed = to_decomposed(prepared)
    print("equal to freeze(prepared):", torch.equal(decomposed(data[1]), freeze(prepared)(data[1])))
    reports["to_decomposed"] = compare(prepared, decomposed, data)

    for name, report in reports.items():
        print(f"{name:22} {report.causes}")
    for node in decomposed.graph.nodes:
        if node.name in ("x_quantize", "x_clamp"):
            print(node.format_node())

    # 4. The file to deploy, for any batch size; what is certified is what was loaded back from it.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        done = migrate(prepared, data, path, converted=deployed, dynamic_batch=True)
        print(str(done).replace(f"{folder}/", ""))
        program = torch.export.load(path)  # needs quantize_fx imported, and no fxqfix
    three = data[1][:3]
    print("the file, every bit:", torch.equal(program.module()(three), freeze(prepared)(three)))
    return reports


if __name__ == "__main__":
    main()

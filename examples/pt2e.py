"""QAT in the PT2E flow (torchao): what convert_pt2e changes, why, and how to convert exactly."""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor, nn

from fxqfix import Report, compare, freeze, inspect, lint, to_decomposed

logging.disable(logging.WARNING)  # torchao names every extension that this machine can't load

from torchao.quantization import pt2e  # noqa: E402
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e  # noqa: E402
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86  # noqa: E402


class Net(nn.Module):
    """Two convolutions, a residual, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.body(x) + x)
        return self.head(x.mean([2, 3]))


def main() -> dict[str, Report]:
    torch.manual_seed(0)
    x = torch.rand(8, 3, 10, 10)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(
        x86.get_default_x86_inductor_quantization_config(is_qat=True, reduce_range=True)
    )
    prepared = prepare_qat_pt2e(torch.export.export(Net().train(), (x,)).module(), quantizer)
    prepared(x)  # QAT
    pt2e.move_exported_model_to_eval(prepared)
    prepared.apply(pt2e.disable_observer)
    print(inspect(prepared).total)
    print("lint:", sorted({finding.code for finding in lint(prepared).of("error")}))

    # What is deployed today, and what it has in common with what was trained.
    data = [x, 1.5 * x]  # the second batch leaves the range that was trained
    deployed = convert_pt2e(copy.deepcopy(prepared))
    reports = {"convert_pt2e(prepared)": compare(prepared, deployed, data)}

    # The same conversion of the frozen model, and fxqfix's, whose ranges survive what comes next.
    frozen = freeze(prepared)
    converted, decomposed = convert_pt2e(copy.deepcopy(frozen)), to_decomposed(prepared)
    reports["convert_pt2e(freeze(prepared))"] = compare(prepared, converted, data)
    reports["to_decomposed(prepared)"] = compare(prepared, decomposed, data)
    for name, report in reports.items():
        print(f"{name:31} exact: {report.exact!s:5} {report.causes}")
    with torch.no_grad():
        same = all(torch.equal(model(1.5 * x), prepared(1.5 * x)) for model in (frozen, converted))
    print("every output bit equal to the trained model's:", same)
    clamps = sum(node.target is torch.clamp for node in decomposed.graph.nodes)
    print("clamps that hold the range:", clamps)
    return reports


if __name__ == "__main__":
    main()

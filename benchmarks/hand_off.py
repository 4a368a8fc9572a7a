"""Does the declared range survive what comes after? Decomposed graphs, with and without the clamps.

Each graph is handed to torch.export (saved and loaded), to Inductor with freezing on, to torchao's
lowering to x86's int8 kernels, and to ONNX Runtime at every optimization level. Their outputs are
compared with those of the graph itself, at 1, 1.5 and 3 times the calibrated amplitude.

python benchmarks/hand_off.py
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["TORCHINDUCTOR_FREEZING"] = "1"  # read when Inductor is imported

import _common
import torch
from torch import Tensor, fx, nn

from fxqfix import inspect, to_decomposed
from fxqfix.qparams import QParams, dequantize, quantize

GAINS = (1.0, 1.5, 3.0)
Forward = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """Convolutions with a residual, in whose last value each route can be read off."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.mid(torch.relu(self.stem(x))))
        return torch.relu(self.last(torch.relu(self.body(x)) + x))


def fx_model(x: Tensor) -> fx.GraphModule:
    return _common.prepare(Net(), x)


def pt2e_model(x: Tensor) -> fx.GraphModule:
    from torchao.quantization import pt2e
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    config = x86.get_default_x86_inductor_quantization_config
    quantizer.set_global(config(is_qat=True, reduce_range=True))
    prepared = prepare_qat_pt2e(torch.export.export(Net().train(), (x,)).module(), quantizer)
    with torch.no_grad():
        for _ in range(2):
            prepared(x)
    return prepared.apply(pt2e.disable_observer)


def exported(model: fx.GraphModule, x: Tensor, folder: Path) -> Forward:
    path = folder / "model.pt2"
    torch.export.save(torch.export.export(model, (x,)), path)
    return torch.export.load(path).module()


def inductor(model: fx.GraphModule, x: Tensor, folder: Path) -> Forward:
    return torch.compile(torch.export.export(model, (x,)).module())


def lowered(model: fx.GraphModule, x: Tensor, folder: Path) -> Forward:
    from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86

    found = lower_pt2e_quantized_to_x86(model, (x,))
    kernels = sum("qconv" in str(node.target) for node in found.graph.nodes)
    assert kernels == 4, f"{kernels} int8 kernels"
    return found


def onnx_runtime(level: str) -> Callable[[fx.GraphModule, Tensor, Path], Forward]:
    def make(model: fx.GraphModule, x: Tensor, folder: Path) -> Forward:
        import onnxruntime

        path = str(folder / "model.onnx")
        torch.onnx.export(model, (x,), path, dynamo=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda value: torch.from_numpy(session.run(None, {name: value.numpy()})[0])

    return make


LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
ROUTES = {
    "torch.export, .pt2": exported,
    "Inductor, freezing": inductor,
    "torchao's lowering to x86": lowered,
    **{f"ONNX Runtime, {level[4:].lower()}": onnx_runtime(level) for level in LEVELS},
}


def grid_of_output(model: fx.GraphModule) -> QParams:
    """The last site's grid; a float output is judged by it too."""
    sites = [site for site in inspect(model) if site.kind == "activation"]
    assert sites[-1].used is not None
    return sites[-1].used


def judge(wanted: Tensor, found: Tensor, grid: QParams, ends_quantized: bool) -> str:
    """Codes of the last site that differ, by how much, and those outside of its range.

    A float output (PT2E leaves a last convolution float) is measured in steps of that grid.
    """
    steps = (found.double() - wanted.double()).abs() / grid.scales[0]
    # reason: a float output differs in its last bits by the order of sums alone
    least = 0.5 if ends_quantized else 0.05
    text = f"{100 * float((steps > least).double().mean()):7.3f}% {float(steps.max()):7.2f} steps"
    if not ends_quantized:
        return f"{text}         -"
    wide = grid.with_range(*grid.container)
    codes = quantize(found, wide)
    assert torch.equal(dequantize(codes, wide), found)
    outside = (codes < grid.quant_min) | (codes > grid.quant_max)
    return f"{text} {100 * float(outside.double().mean()):7.3f}%"


@contextlib.contextmanager
def silently() -> Iterator[None]:
    """Exporters print their progress."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def main() -> None:
    _common.settle()
    logging.disable(logging.WARNING)
    x = torch.rand(4, 3, 16, 16)
    for flow, make in {"FX QAT": fx_model, "PT2E QAT": pt2e_model}.items():
        torch.manual_seed(0)
        prepared = make(x)
        print(f"\n{flow}{'':40} differing, at most, out of range, per amplitude")
        for pin in (False, True):
            model = to_decomposed(prepared, pin_ranges=pin)
            grid, ends = grid_of_output(model), flow == "FX QAT"
            for route, build in ROUTES.items():
                # A folder per route, and forgotten only after the route has run.
                with tempfile.TemporaryDirectory() as folder, torch.no_grad(), silently():
                    forward = build(model, x, Path(folder))
                    batches = [gain * x for gain in GAINS]
                    cells = [judge(model(b), forward(b), grid, ends) for b in batches]
                print(f"{'pinned' if pin else 'plain':7}{route:34}{'   |'.join(cells)}", flush=True)


if __name__ == "__main__":
    main()

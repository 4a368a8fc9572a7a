"""A C engine for a quantized CNN, from its parameters: judged, then with three mistakes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from fxqfix import GoldenVectors, Judgement, Parameters, extract_parameters, golden_vectors, judge
from fxqfix.export import c_header, c_names

HERE = Path(__file__).resolve().parent
MISTAKES = {
    "MISTAKE_TRUNCATION": "truncation",
    "MISTAKE_PADDING": "padding-with-zero",
    "MISTAKE_ZERO_POINT": "input-zero-point-missing",
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, 2, 1)
        self.pool, self.relu = nn.MaxPool2d(2), nn.ReLU()
        self.flatten, self.head = nn.Flatten(), nn.Linear(16 * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv1(x)))
        return self.head(self.flatten(self.conv2(x)))  # no relu: zero points that are not 0


def quantized(x: Tensor) -> tuple[Parameters, GoldenVectors]:
    torch.backends.quantized.engine = "qnnpack"
    mapping = get_default_qconfig_mapping("qnnpack")
    mapping.set_object_type(nn.Flatten, mapping.global_qconfig)
    prepared = prepare_fx(Net().eval(), mapping, (x,))
    prepared(x)
    converted = convert_fx(prepared)
    return extract_parameters(converted), golden_vectors(converted, x)


# --- from parameters to C ------------------------------------------------------------------------


def net_h(parameters: Parameters, x: Tensor) -> str:
    """The layers in order, as C calls."""
    names, lines, held = c_names([op.name for op in parameters]), [], {}
    channels, height, width = x.shape[1:]
    for op in parameters:
        p, kind, name = f"fxq_{names[op.name]}", op.op.removesuffix("_relu"), f"v_{names[op.name]}"
        m, source = p.upper(), held.get(op.inputs[0])
        held[op.name] = name
        if kind == "quantize" and source is None:
            call = f"quantize(values, {channels}, {height}, {width}, {m}_SCALE, {m}_ZERO_POINT)"
        elif kind in ("conv2d", "linear"):
            lines.append(f"    layer_t {name}_layer = {layer(op, p)};")
            call = f"{kind}(&{name}_layer, &{source})"
        elif kind == "max_pool2d":
            sizes = ", ".join(f"{m}_{o}_{i}" for o in ("KERNEL_SIZE", "STRIDE") for i in (0, 1))
            call = f"max_pool2d(&{source}, {sizes})"
        elif kind == "flatten":
            call = f"flatten(&{source})"
        elif op.name in parameters.outputs:
            grid = f"{m}_INPUT_SCALE, {m}_INPUT_ZERO_POINT"
            lines.append(f'    dequantize(folder, "{op.name}", &{source}, {grid});')
            held[op.name] = str(source)
            continue
        else:  # floats in between, and the same codes again
            held[op.name] = str(source)
            continue
        lines.append(f"    image_t {name} = {call};")
        if op.output is not None:
            lines.append(f'    dump(folder, "{op.name}", &{name});')
    lines += [f"    free({name}.codes);" for name in dict.fromkeys(held.values())]
    first = "#define POINT_FIRST\n" if parameters.arithmetic.point_first else ""
    body = "\n".join(lines)
    size = channels * height * width
    return (
        f"#define NET_INPUTS {size}\n{first}\n"
        f"static void run(const float *values, const char *folder) {{\n{body}\n}}\n"
    )


def layer(op: object, p: str) -> str:
    m, conv = p.upper(), "conv" in op.op
    numbers = [f"{m}_WEIGHT_0", f"{m}_WEIGHT_1"]
    for option, plain in (("KERNEL_SIZE", 1), ("STRIDE", 1), ("PADDING", 0)):
        numbers += [f"{m}_{option}_{i}" if conv else str(plain) for i in (0, 1)]
    numbers += [f"{m}_GROUPS" if conv else "1"]
    numbers += [f"{m}_{n}" for n in ("INPUT_ZERO_POINT", "ZERO_POINT", "MIN", "MAX")]
    per_channel = int(op.weight_qparams.axis is not None)
    arrays = f"{p}_weight, {p}_bias, {p}_multiplier, {per_channel}"
    return f"{{{arrays}, {', '.join(numbers)}}}"


# --- build, run, judge ---------------------------------------------------------------------------


def run(folder: Path, parameters: Parameters, golden: GoldenVectors, mistake: str = "") -> Path:
    """Compile the engine, run it on the golden inputs, and leave its dump."""
    x, dump = golden.values["x"], folder / (mistake or "right")
    dump.mkdir()
    flags = ["-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    program = str(folder / "engine")
    defined = [f"-D{mistake}"] if mistake else []
    source = [str(HERE / "c_engine.c"), f"-I{folder}", "-o", program, "-lm"]
    subprocess.run(["cc", *flags, *defined, *source], check=True)
    (folder / "input.bin").write_bytes(x.numpy().tobytes())
    arguments = [str(folder / "input.bin"), str(len(x)), str(dump)]
    subprocess.run([program, *arguments], check=True)
    tensors = [entry(f, golden.values[f.stem]) for f in sorted(dump.glob("*.bin"))]
    (dump / "manifest.json").write_text(json.dumps({"tensors": tensors}))
    return dump


def entry(file: Path, like: Tensor) -> dict[str, object]:
    dtype = str(like.dtype).removeprefix("torch.")
    return {"name": file.stem, "file": file.name, "dtype": dtype, "shape": list(like.shape)}


def main() -> dict[str, Judgement]:
    torch.manual_seed(0)
    if shutil.which("cc") is None:
        print("there is no C compiler here")
        return {}
    x = torch.randn(8, 3, 32, 32)
    parameters, golden = quantized(x)
    with tempfile.TemporaryDirectory() as made:
        folder, found = Path(made), {}
        (folder / "parameters.h").write_text(c_header(parameters))
        (folder / "net.h").write_text(net_h(parameters, x))
        for mistake in ("", *MISTAKES):
            dump = run(folder, parameters, golden, mistake)
            found[mistake] = judge(parameters, dump, golden=golden)
            codes = sum(op.local.elements for op in found[mistake].ops)
            apart = sum(op.local.differing for op in found[mistake].ops)
            print(f"\n--- {mistake or 'the engine as it is'}: {apart:,} of {codes:,} codes differ")
            for op in found[mistake].ops:
                for line in op.sentences():
                    print(f"{op.name}: {line}")
    return found


if __name__ == "__main__":
    sys.exit(0 if main() is not None else 1)

"""A route of one's own: linear ops run in a C program, and `certify` watches it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_fx

from fxqfix import Certificate, certify

SOURCE = """
void linear(const float *x, const float *w, const float *b, float *y, int rows, int in, int out) {
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < out; o++) {
            double sum = b[o];
            for (int i = 0; i < in; i++) sum += (double)x[r * in + i] * w[o * in + i];
            y[r * out + o] = (float)sum;
        }
}
"""


class InC:
    """All that a route needs: a name, a sentence, and `deploy`."""

    name, summary = "in-c", "linear ops in C, summed in double; all else by torch"

    def __init__(self, library: str) -> None:
        self.linear = ctypes.CDLL(library).linear

    def deploy(
        self, graph_module: fx.GraphModule, batch: tuple[Any, ...]
    ) -> Callable[..., Sequence[Tensor]]:
        interpreter = Interpreter(graph_module, self.linear)
        return lambda *inputs: _listed(interpreter.run(*inputs))


class Interpreter(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule, linear: Any) -> None:
        super().__init__(graph_module)
        self.linear = linear

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is not nn.functional.linear:
            return super().call_function(target, args, kwargs)
        x, w, b = (t.detach().contiguous() for t in (*args, *kwargs.values()))
        y = torch.empty(*x.shape[:-1], len(w))
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, w, b, y)]
        self.linear(*pointers, x.numel() // x.shape[-1], x.shape[-1], len(w))
        return y


def _listed(outputs: Any) -> Sequence[Tensor]:
    return outputs if isinstance(outputs, list | tuple) else [outputs]


def main() -> Certificate | None:
    if shutil.which("cc") is None:
        print("there is no C compiler here")
        return None
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10)).eval()
    x = torch.randn(64, 32)
    prepared = prepare_fx(net, get_default_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "linear.c"), str(Path(folder, "linear.so"))
        source.write_text(SOURCE)
        flags = ["-shared", "-fPIC", "-O2", "-Wall", "-Werror"]
        subprocess.run(["cc", *flags, str(source), "-o", library], check=True)
        found = certify(prepared, InC(library), [x])
    print(found)
    return found


if __name__ == "__main__":
    main()

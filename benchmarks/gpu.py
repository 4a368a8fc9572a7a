"""What needs a GPU: flows on larger nets there, and emulation under every precision switch.

    python benchmarks/gpu.py [--json FILE]

Each flow's result has to say that it is right (exact, ok, unexplained 0); emulated codes have to be
those of the CPU's int8 kernels. Prints a table and JSON with GPU, driver and torch; exit code 1
where anything differs. Needs torch only, with CUDA; `make gpu` runs it behind the tests.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import _common
import torch
from torch import Tensor, fx

import fxqfix
from fxqfix._torch import quantized_engine, quiet
from fxqfix.engines import isa_of

ENGINE = _common.ENGINE


def _tf32() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True


def _lowest() -> None:
    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True


def _benchmark() -> None:
    torch.backends.cudnn.benchmark = True


def _deterministic() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)


def _new_switches() -> None:
    """Those of torch 2.9 and newer."""
    for place in (torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv", None)):
        if hasattr(place, "fp32_precision"):
            place.fp32_precision = "tf32"


SWITCHES: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "tf32": _tf32,
    "medium, half sums": _lowest,
    "cudnn.benchmark": _benchmark,
    "deterministic": _deterministic,
    "fp32_precision": _new_switches,
}


@contextmanager
def put_back() -> Iterator[None]:
    """Put the switches back."""
    cudnn = torch.backends.cudnn
    tf32, benchmark = cudnn.allow_tf32, cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
        for place in (torch.backends.cuda.matmul, getattr(cudnn, "conv", None)):
            if hasattr(place, "fp32_precision"):
                place.fp32_precision = "ieee"
        if hasattr(getattr(cudnn, "conv", None), "fp32_precision"):
            cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "tf32" if tf32 else "ieee"
        else:
            cudnn.allow_tf32 = tf32
        cudnn.benchmark = benchmark


def flows(
    prepared: fx.GraphModule, converted: fx.GraphModule, x: Tensor
) -> dict[str, Callable[[], tuple[bool, str]]]:
    """Each flow: whether its result is right, and what it says.

    Args:
        prepared: On the GPU.
        converted: The int8 model, on the CPU.
        x: A batch, on the GPU.
    """
    frozen = fxqfix.freeze(prepared)

    def there(model: torch.nn.Module) -> bool:
        return all(t.device == x.device for t in (*model.parameters(), *model.buffers()))

    def compared(other: torch.nn.Module | None, culprits: int = 0) -> tuple[bool, str]:
        report = fxqfix.compare(prepared, other, [x], culprits=culprits)
        return report.unexplained == 0, f"{report.unexplained} unexplained; {dict(report.causes)}"

    def decomposed() -> tuple[bool, str]:
        made = fxqfix.to_decomposed(prepared)
        equal = torch.equal(made(x), frozen(x))
        return equal and there(made), f"equals freeze: {equal}; on {x.device}: {there(made)}"

    def repaired() -> tuple[bool, str]:
        found = fxqfix.repair(prepared, converted, data=[x])
        assert found.after is not None
        return found.after.unexplained == 0, f"{len(found.applied)} repairs"

    def certified(route: str) -> tuple[bool, str]:
        found = fxqfix.certify(prepared, route, [x])
        return found.ok, str(found).partition("\n")[0]

    def int8() -> tuple[bool, str]:
        found = fxqfix.certificate_of(fxqfix.to_int8(prepared))
        return found.ok and bool(found.notes), str(found).partition("\n")[0]

    return {
        "inspect": lambda: (bool(fxqfix.inspect(prepared).sites), "sites read"),
        "lint": lambda: (True, f"{len(fxqfix.lint(prepared).findings)} findings"),
        "freeze": lambda: (there(frozen), f"on {x.device}: {there(frozen)}"),
        "to_decomposed": decomposed,
        "to_int8": int8,
        "compare int8": lambda: compared(converted),
        "compare, converted=None, culprits": lambda: compared(None, 2),
        "compare decomposed": lambda: compared(fxqfix.to_decomposed(prepared)),
        "repair": repaired,
        "certify int8:fbgemm": lambda: certified("int8:fbgemm"),
        "certify float64": lambda: certified("float64"),
        "golden_vectors": lambda: (bool(fxqfix.golden_vectors(prepared, x).values), "kept"),
    }


class Record(fx.Interpreter):
    """Keeps the codes of every node that carries some."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.codes: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n.op != "get_attr" and isinstance(found, Tensor) and not found.is_floating_point():
            codes = found.int_repr() if found.is_quantized else found
            self.codes[n.name.removeprefix("emulated_")] = codes.clone()
        return found


def emulation(converted: fx.GraphModule, x: Tensor, device: str) -> Iterator[dict[str, Any]]:
    """The emulated model's codes against the int8 kernels', under each switch and autocast."""
    wanted, emulated = Record(converted), fxqfix.emulate(converted).to(device)
    wanted.run(x)
    for name, switch in SWITCHES.items():
        for cast in (None, torch.float16, torch.bfloat16):
            with put_back():
                switch()
                with torch.autocast("cuda", cast, enabled=cast is not None):
                    found = Record(emulated)
                    found.run(x.to(device))
            total = sum(t.numel() for t in wanted.codes.values())
            pairs = [(a, found.codes[n].cpu()) for n, a in wanted.codes.items()]
            differing = sum(int((a != b).sum()) for a, b in pairs)
            autocast = "" if cast is None else f", autocast {str(cast).removeprefix('torch.')}"
            yield {
                "what": f"emulate, {name}{autocast}",
                "right": not differing,
                "says": f"{differing} of {total} codes differ from the CPU's kernels",
            }


def measure(name: str, device: str, batch: int) -> Iterator[dict[str, Any]]:
    """All rows of one net.

    Args:
        name: Of `_common.NETWORKS`.
        device: The GPU.
        batch: Images.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 32, 32, generator=generator)
    with torch.enable_grad():  # as one prepares
        prepared = _common.prepare(_common.NETWORKS[name](), x)
    converted = _common.convert(prepared)
    there = copy.deepcopy(prepared).to(device)
    for what, flow in flows(there, converted, x.to(device)).items():
        start = time.perf_counter()
        right, says = flow()
        yield {"what": what, "right": right, "says": says, "seconds": _since(start)}
    yield from emulation(converted, x, device)


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 2)


def machine(device: str) -> dict[str, str]:
    """GPU, driver and torch."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": driver,
        "cuda": str(torch.version.cuda),
        "torch": str(torch.__version__),
        "isa": str(isa_of(None)),
    }


def main() -> int:
    """Measure all nets; 1 where anything is not right."""
    parser = argparse.ArgumentParser(description="Flows and emulation on a GPU.")
    parser.add_argument("--json", type=Path, help="write the results there, too")
    parser.add_argument("--batch", type=int, default=8)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no GPU; the tests of tests/test_devices.py run on a pretended one")
        return 2
    device, rows, start = "cuda:0", list[dict[str, Any]](), time.perf_counter()
    _common.settle()
    with quantized_engine(ENGINE), quiet(), torch.no_grad():
        for name in _common.NETWORKS:
            for row in measure(name, device, given.batch):
                rows.append({"net": name, **row})
                print(
                    f"{'ok ' if row['right'] else 'NOT'} {name:14} {row['what']:44} {row['says']}"
                )
    wrong = sum(not row["right"] for row in rows)
    about = machine(device)
    result = {**about, "seconds": _since(start), "wrong": wrong, "rows": rows}
    print(f"{len(rows) - wrong} of {len(rows)} right; {about}")
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}))
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

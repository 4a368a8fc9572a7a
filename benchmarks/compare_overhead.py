"""Cost of compare: CPU time over one prepared + one converted forward, beside torch's own tools.

python benchmarks/compare_overhead.py                  all networks; prints tables
python benchmarks/compare_overhead.py resnet18 ...     these only
python benchmarks/compare_overhead.py --write COLUMN   also put the figures into
                                                       compare_overhead.json, and the tables into
                                                       docs/benchmarks.md, of "now" beside
                                                       "today" (an older version, so named)
python benchmarks/compare_overhead.py --quick          one round and two batches

Everything of a network is timed in one run, in turns (A B C A B C ...), on one thread, in CPU time
of the process, so that other work on the machine hardly matters; ratios are of medians. The first
batch also has the noise floor, and builds what later batches find built.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import inspect
import io
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _common
import overhead_page
import torch
from torch import Tensor, nn
from torch.ao.ns import _numeric_suite_fx as suite

from fxqfix import _torch, compare, freeze

QUICK = "--quick" in sys.argv
BATCHES, ROUNDS = (2, 1) if QUICK else (3, 3)


@dataclass(frozen=True)
class Case:
    """A network and its batches.

    Attributes:
        make: Makes the network.
        shape: Of a batch.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def batches(self, count: int = BATCHES) -> Iterator[Tensor]:
        """Random batches, made when they are asked for."""
        for seed in range(count):
            yield torch.rand(self.shape, generator=torch.Generator().manual_seed(seed))


CASES = {
    "resnet18": Case(_common.resnet18, (8, 3, 224, 224)),
    "mobilenet_v2": Case(_common.mobilenet_v2, (8, 3, 224, 224)),
    "resnet-like": Case(_common.resnet_like, (8, 3, 32, 32)),
    "mobilenet-like": Case(_common.mobilenet_like, (8, 3, 32, 32)),
    "linear 4096": Case(lambda: nn.Sequential(nn.Linear(4096, 4096)), (2, 4096)),
}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "with causes": {},
    "causes of one batch": {"attribute": 1},
    "local + cumulative": {"attribute": False},
    "cumulative only": {"local": False, "attribute": False},
}


@dataclass
class Seconds:
    """CPU seconds of one thing, a list per round.

    Attributes:
        start: Until the first batch was asked for.
        first: Of the first batch.
        later: Of each later one.
    """

    start: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)

    def add(self, marks: list[float]) -> None:
        """Take the times at which something began, and asked for one batch after the other."""
        start, first, *later = (b - a for a, b in itertools.pairwise(marks))
        self.start.append(start)
        self.first.append(first)
        self.later += later

    def over(self, forward: float) -> dict[str, float]:
        """Medians; those of batches over a forward."""
        found = statistics.median(self.start), statistics.median(self.first)
        return {
            "start, s": found[0],
            "first batch": found[1] / forward,
            "batch": statistics.median(self.later) / forward,
        }


def marked(case: Case, run: Callable[[Iterator[Tensor]], object]) -> list[float]:
    """When a run began, and when it asked for each batch; the last asks in vain."""
    marks = [time.process_time()]

    def batches() -> Iterator[Tensor]:
        for x in case.batches():
            marks.append(time.process_time())
            yield x
        marks.append(time.process_time())

    run(batches())
    return marks


def forwards(prepared: Any, converted: Any) -> Callable[[Iterator[Tensor]], object]:
    """Both models, as they are."""

    def run(batches: Iterator[Tensor]) -> None:
        with torch.no_grad():
            for x in batches:
                prepared(x)
                converted(x)

    return run


def compares(prepared: Any, converted: Any, **options: Any) -> Callable[..., object]:
    """A comparison."""
    return lambda batches: compare(prepared, converted, batches, progress=False, **options)


def accepted(options: Mapping[str, Any]) -> bool:
    """Whether this fxqfix takes them: the same script measures older ones."""
    known = inspect.signature(compare).parameters
    return options.keys() <= known.keys() and (
        "local" in known or isinstance(options.get("attribute", True), bool)
    )


def peers(prepared: Any, converted: Any) -> dict[str, Callable[[Iterator[Tensor]], object]]:
    """torch's own tools on the same two models: (name, what runs them)."""
    copies = [copy.deepcopy(prepared), copy.deepcopy(converted)]
    given = ("prepared", copies[0], "converted", copies[1], suite.OutputLogger)
    logged = suite.add_loggers(*given)
    with _torch.quiet(), contextlib.redirect_stdout(io.StringIO()):
        shadowed = suite.add_shadow_loggers(*copied(given))

    def loggers(batches: Iterator[Tensor]) -> None:
        with torch.no_grad():
            for x in batches:
                logged[0](x)
                logged[1](x)

    def shadows(batches: Iterator[Tensor]) -> None:
        with torch.no_grad():
            for x in batches:
                shadowed(x)

    return {"torch.ao.ns loggers": loggers, "torch.ao.ns shadows": shadows}


def copied(given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(copy.deepcopy(v) if isinstance(v, nn.Module) else v for v in given)


def coverage(prepared: Any, converted: Any) -> dict[str, str]:
    """How many layers each tool looks at."""
    with _torch.quiet(), contextlib.redirect_stdout(io.StringIO()):
        args = ("prepared", copy.deepcopy(prepared), "converted", copy.deepcopy(converted))
        logged = suite.add_loggers(*args, suite.OutputLogger)
        found = suite.extract_logger_info(*logged, suite.OutputLogger, "converted")
        alone = suite.add_shadow_loggers(*args, suite.OutputLogger)
        local = suite.extract_shadow_logger_info(alone, suite.OutputLogger, "converted")
    return {
        "torch.ao.ns loggers": f"{len(found)} layers, cumulative",
        "torch.ao.ns shadows": f"{len(local)} layers, local",
    }


def debugger(case: Case) -> tuple[Callable[..., object], Callable[..., object]] | None:
    """torchao's numeric debugger on the PT2E flow of the same network, and its two forwards."""
    with _torch.quiet(), contextlib.redirect_stderr(io.StringIO()):
        try:
            from torchao.quantization import pt2e
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
            from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
        except ImportError:
            return None
        x = next(case.batches(1))
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        program = torch.export.export(case.make().eval(), (x,), strict=True)
        pt2e.generate_numeric_debug_handle(program)
        prepared = prepare_pt2e(program.module(), quantizer)
        prepared(x)
        watched = [pt2e.prepare_for_propagation_comparison(copy.deepcopy(prepared))]
        converted = convert_pt2e(copy.deepcopy(prepared))
        watched.append(pt2e.prepare_for_propagation_comparison(copy.deepcopy(converted)))
    return forwards(prepared, converted), forwards(*watched)


def measure(name: str) -> dict[str, Any]:
    """All figures of one network."""
    case = CASES[name]
    x = next(case.batches(1))
    trained = _common.prepare(case.make(), x)
    converting = time.process_time()
    converted = _common.convert(trained)
    converting = time.process_time() - converting
    frozen = freeze(trained)
    pairs = {"as trained": (trained, converted), "frozen": (frozen, _common.convert(frozen))}
    runs: dict[str, Callable[..., object]] = {}
    for state, pair in pairs.items():
        runs[f"forwards, {state}"] = forwards(*pair)
        for variant, options in VARIANTS.items():
            if accepted(options) and (state == "as trained" or not options):
                runs[f"{variant}, {state}"] = compares(*pair, **options)
    watched = debugger(case) if len(case.shape) == 4 else None
    if watched is not None:
        runs["forwards, PT2E"], runs["torchao numeric debugger, PT2E"] = watched
    found = {key: Seconds() for key in runs}
    for round_ in range(QUICK, ROUNDS + 1):
        more = peers(*pairs["as trained"])  # their loggers keep all that they see
        for key, run in runs.items():
            marks = marked(case, run)
            if round_:  # one round that doesn't count
                found[key].add(marks)
        for key, run in more.items():
            marks = marked(case, run)
            if round_:
                found.setdefault(f"{key}, as trained", Seconds()).add(marks)
        gc.collect()
    result: dict[str, Any] = {"convert_fx, s": converting}
    for key, seconds in found.items():
        state = key.rpartition(", ")[2]
        forward = statistics.median(found[f"forwards, {state}"].later)
        result[key] = {"s": forward} if key.startswith("forwards") else seconds.over(forward)
    result["coverage"] = coverage(*pairs["as trained"])
    return result


# --- memory: a process for each figure ------------------------------------------------------------

MEMORY = {"forwards": None, **VARIANTS}


def peak(name: str, what: str) -> float:
    """MiB that something takes above what both models hold, of a process of its own."""
    command = [sys.executable, __file__, "--peak", name, what, *(["--quick"] if QUICK else [])]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(output.splitlines()[-1]) / 1024


def above(name: str, what: str) -> int:
    """KiB above what both models hold (Linux)."""
    case = CASES[name]
    prepared = _common.prepare(case.make(), next(case.batches(1)))
    converted = _common.convert(prepared)
    options = MEMORY[what]
    if options is None:
        run = forwards(prepared, converted)
    elif accepted(options):
        run = compares(prepared, converted, **options)
    else:
        return 0
    if not QUICK:
        run(case.batches(1))  # code that is imported, kernels that are made
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high water mark, anew
    before = _status("VmRSS")
    run(case.batches())
    return _status("VmHWM") - before


def _status(key: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{key}:")[2].split()[0])


# --- the result -----------------------------------------------------------------------------------


def lines(results: Mapping[str, Any]) -> Iterator[str]:
    """What is printed, a line per figure."""
    for name, found in results.items():
        yield f"\n{name}: convert_fx {found['convert_fx, s']:.2f} s"
        for key, value in found.items():
            if isinstance(value, Mapping) and "batch" in value:
                said = (f"{k} {v:.2f}" for k, v in value.items())
                yield f"  {key:38} {', '.join(said)}"
            elif isinstance(value, Mapping):
                yield f"  {key:38} {value}"


def main(arguments: list[str]) -> None:
    writes = arguments[arguments.index("--write") + 1] if "--write" in arguments else ""
    names = [a for a in arguments if a in CASES] or list(CASES)
    for name in names:
        found = measure(name)
        if len(CASES[name].shape) == 4:
            peaks = {what: peak(name, what) for what in MEMORY}
            found["peak, MiB"] = {k: round(v) for k, v in peaks.items() if v}
        print("\n".join(lines({name: found})), flush=True)
        if writes:
            write(writes, name, found)


def write(column: str, name: str, found: Mapping[str, Any]) -> None:
    """Put the figures of a network into the JSON."""
    known = (
        json.loads(overhead_page.COUNTS.read_text(encoding="utf-8"))
        if overhead_page.COUNTS.exists()
        else {}
    )
    own = known.setdefault(column, {})
    own.setdefault("networks", {})[name] = {**_common.machine(), **_rounded(found)}
    overhead_page.COUNTS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    if "now" in known:
        overhead_page.put()


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    if not isinstance(value, float) or not value:
        return value
    return round(value, 2 - math.floor(math.log10(abs(value))))


if __name__ == "__main__":
    _common.settle()
    if sys.argv[1:2] == ["--peak"]:
        print(above(*sys.argv[2:4]))
    else:
        main(sys.argv[1:])

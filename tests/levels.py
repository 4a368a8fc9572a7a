"""tests/engines under every level of the int8 kernels that this CPU offers: `make levels`.

A cap takes oneDNN, fbgemm or ATen down to a lower instruction set. Each cap has a process of its
own, two at a time; some kernels abort, so the tests run in a worker of pytest-xdist, which counts a
crash as a failure of the test that it met.

python tests/levels.py             the caps that give other levels than this process has
python tests/levels.py --native    also without a cap
python tests/levels.py -- -k conv  arguments for pytest
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from fxqfix.engines.isa import PARTS, isa_of

ROOT = Path(__file__).resolve().parents[1]
CAPS = {
    "ONEDNN_MAX_CPU_ISA": (
        "AVX2",
        "AVX2_VNNI",
        "AVX512_CORE",
        "AVX512_CORE_VNNI",
        "AVX512_CORE_AMX",
    ),
    "FBGEMM_ENABLE_INSTRUCTIONS": ("AVX2", "AVX512", "AVX512_E1"),
    "ATEN_CPU_CAPABILITY": ("default", "avx2", "avx512"),
}
# The levels that a process can have: fbgemm computes with AVX512 what it computes with AVX2.
_KNOWN = {part: PARTS[part] for part in ("onednn", "fbgemm", "aten")}
_KNOWN["fbgemm"] = ("avx2", "vnni")
_PROBE = "from tests.levels import own; print(own())"


def own() -> str:
    """The levels of onednn, fbgemm and ATen in this process."""
    isa = isa_of(None)
    return f"{isa.onednn} {isa.fbgemm} {isa.aten}"


def environment(cap: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process' environment with no cap but the given one."""
    kept = {k: v for k, v in os.environ.items() if k not in CAPS}
    return {**kept, **(cap or {}), "OMP_NUM_THREADS": "1"}


def level(cap: Mapping[str, str]) -> str:
    """`own` of a process under a cap."""
    command = [sys.executable, "-W", "ignore", "-c", _PROBE]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(cap), check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.strip()


def offered() -> tuple[str, dict[str, dict[str, str]]]:
    """(the CPU's own levels, other levels -> the first cap that gives them)."""
    caps = [{name: value} for name, values in CAPS.items() for value in values]
    with ThreadPoolExecutor(2) as pool:
        native, *found = pool.map(level, [{}, *caps])
    others = dict(zip(reversed(found), reversed(caps), strict=True))
    others.pop(native, None)
    return native, dict(reversed(others.items()))


@dataclass(frozen=True)
class Outcome:
    """What the tests did under a cap."""

    counts: Mapping[str, int]
    failed: Sequence[str]
    skipped: Mapping[str, int]
    output: str

    @property
    def ok(self) -> bool:
        return self.counts["passed"] > 0 and not self.failed


def run(cap: Mapping[str, str], arguments: Sequence[str] = ()) -> Outcome:
    """Run tests/engines under a cap."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "junit.xml"
        options = f"-q -n 1 --max-worker-restart=100 -p no:cacheprovider --junitxml={path}".split()
        # Inductor would take code from its cache that it wrote under another cap.
        own_cache = {"TORCHINDUCTOR_CACHE_DIR": folder}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, "tests/engines", *arguments],
            cwd=ROOT,
            env={**environment(cap), **own_cache},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if not path.exists():  # pytest itself ended early
            return Outcome(Counter(), ["pytest"], {}, done.stdout)
        return read(path, done.stdout)


def read(path: Path, output: str) -> Outcome:
    """An outcome from a JUnit file."""
    counts, skipped, failed = Counter[str](), Counter[str](), []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}".lstrip(":")
        reasons = {part.tag: part.get("message", "") for part in case}
        if reasons.keys() & {"failure", "error"}:
            failed.append(name)
            counts["failed"] += 1
        elif "skipped" in reasons:
            skipped[reasons["skipped"]] += 1
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    return Outcome(counts, failed, skipped, output)


def _named(cap: Mapping[str, str], levels: str) -> str:
    parts = zip(("onednn", "fbgemm", "ATen"), levels.split(), strict=True)
    cap_text = " ".join(f"{k}={v}" for k, v in cap.items()) or "no cap"
    return f"{cap_text} ({', '.join(f'{part} {value}' for part, value in parts)})"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts.get(k, 0):,} {k}" for k in ("passed", "failed", "skipped"))


def missing(*levels: str) -> str:
    """The levels that no process had, of onednn, fbgemm and ATen."""
    columns = zip(*(found.split() for found in levels), strict=True)
    left = {
        part: [name for name in known if name not in seen]
        for (part, known), seen in zip(_KNOWN.items(), columns, strict=True)
    }
    return "; ".join(f"{part} {', '.join(names)}" for part, names in left.items() if names)


def main(arguments: Sequence[str]) -> int:
    native, caps = offered()
    if "--native" in arguments:
        caps = {native: {}, **caps}
    rest = [a for a in arguments if a not in ("--native", "--")]
    print(f"native: {_named({}, native)}; {len(caps)} to run", flush=True)
    begin, total, skipped = time.monotonic(), Counter[str](), Counter[str]()
    with ThreadPoolExecutor(2) as pool:
        outcomes = pool.map(lambda cap: run(cap, rest), caps.values())
        for (levels, cap), outcome in zip(caps.items(), outcomes, strict=True):
            if not outcome.ok:
                print(outcome.output)
            print(f"{_named(cap, levels)}: {_counted(outcome.counts)}")
            print("".join(f"  FAILED {name}\n" for name in outcome.failed), end="", flush=True)
            total.update(outcome.counts)
            total["failed"] += "pytest" in outcome.failed
            skipped.update(outcome.skipped)
    print(f"not run on this CPU: {missing(native, *caps) or 'none'}")
    print("".join(f"  skipped {count}: {why}\n" for why, count in skipped.most_common()), end="")
    print(f"{_counted(total)}; {len(caps)} levels in {time.monotonic() - begin:.0f} s")
    return int(total["failed"] > 0 or (bool(caps) and not total["passed"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

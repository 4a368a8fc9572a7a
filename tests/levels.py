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
_PROBE = "from fxqfix.engines import isa_of; i = isa_of(None); print(i.onednn, i.fbgemm, i.aten)"


def environment(cap: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process' environment with no cap but the given one."""
    kept = {k: v for k, v in os.environ.items() if k not in CAPS}
    return {**kept, **(cap or {}), "OMP_NUM_THREADS": "1"}


def level(cap: Mapping[str, str]) -> str:
    """What a process under a cap has: the levels of onednn, fbgemm and ATen."""
    command = [sys.executable, "-W", "ignore", "-c", _PROBE]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(cap), check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.strip()


def offered() -> tuple[str, dict[str, dict[str, str]]]:
    """(the CPU's own levels, other levels -> the first cap that gives them)."""
    caps = [{name: value} for name, values in CAPS.items() for value in values]
    with ThreadPoolExecutor(2) as pool:
        own, *found = pool.map(level, [{}, *caps])
    others = dict(zip(reversed(found), reversed(caps), strict=True))
    others.pop(own, None)
    return own, dict(reversed(others.items()))


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
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n", "1", "--max-worker-restart=100"]
            + ["-p", "no:cacheprovider", f"--junitxml={path}", "tests/engines", *arguments],
            cwd=ROOT,
            env=environment(cap),
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


def _not_run(own: str, levels: Sequence[str]) -> list[str]:
    """Levels of which this CPU has no process, by part."""
    from fxqfix.engines.isa import PARTS

    found = [set(column) for column in zip(*(x.split() for x in (own, *levels)), strict=True)]
    lines = []
    for part, seen in zip(("onednn", "fbgemm", "aten"), found, strict=True):
        if missing := [known for known in PARTS[part] if known not in seen]:
            lines.append(f"{part}: {', '.join(missing)}")
    return lines


def main(arguments: Sequence[str]) -> int:
    own, caps = offered()
    if "--native" in arguments:
        caps = {own: {}, **caps}
    rest = [a for a in arguments if a not in ("--native", "--")]
    print(f"native: {_named({}, own)}; {len(caps)} to run", flush=True)
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
    print("not run on this CPU: " + ("; ".join(_not_run(own, list(caps))) or "none"))
    print("".join(f"  skipped {count}: {why}\n" for why, count in skipped.most_common()), end="")
    print(f"{_counted(total)}; {len(caps)} levels in {time.monotonic() - begin:.0f} s")
    return int(total["failed"] > 0 or (bool(caps) and not total["passed"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

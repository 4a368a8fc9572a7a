"""Look for specs for which a property doesn't hold: `make fuzz`, or python -m tests.fuzz.

python -m tests.fuzz --seconds 600 --seed 7   random specs, for ten minutes
python -m tests.fuzz --ledger FILE            counts the models of earlier runs too, and adds its
                                              own
python -m tests.fuzz --replay FILE            one spec again, with all it prints

Specs run in a child process: where it ends, that is a finding too. Findings are made smaller, and
written to fuzz-findings/ as JSON with the command that replays them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from tests.fuzz.properties import JUDGED, Outcome, outcome_of
from tests.fuzz.specs import Spec, drawn

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "fuzz-findings"
LIMIT = 180  # seconds for one spec
SHRINKING = 20  # seconds in which a finding is made smaller


def serve() -> None:
    """The child: a spec a line in, an outcome a line out."""
    import torch

    torch.set_num_threads(1)
    gc.set_threshold(200_000, 50, 100)  # FX makes many small objects: a tenth of the time
    out, sys.stdout = sys.stdout, sys.stderr  # kernels and torch print what they like
    for line in sys.stdin:
        print(json.dumps(outcome_of(Spec.from_json(line)).asdict()), file=out, flush=True)


class Child:
    """A process that runs specs; another one takes its place when it ends."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, spec: Spec) -> Outcome:
        process = self._process or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it ended before
            print(spec.to_json(), file=process.stdin, flush=True)
        timer = threading.Timer(LIMIT, process.kill)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if line:
            return Outcome(**json.loads(line))
        self.stop()
        return Outcome(findings={"process": f"ended with status {process.returncode}"})

    def _started(self) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--serve"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return self._process

    def stop(self) -> None:
        """End the process: it reads no more lines."""
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.communicate()
            self._process = None


def clusters(outcome: Outcome) -> Iterator[str]:
    """What is wrong, without the figures: one for each kind of finding."""
    for name, text in outcome.findings.items():
        yield f"{name}: {re.sub(r'[0-9]+', 'N', text)[:160]}"


@dataclass
class Tally:
    """What a run has seen."""

    keys: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    found: dict[str, list[Spec]] = field(default_factory=dict)
    ledger: Path | None = None

    def __post_init__(self) -> None:
        """Take over what earlier runs saw."""
        if self.ledger is None or not self.ledger.exists():
            return
        for line in self.ledger.read_text(encoding="utf-8").splitlines():
            key, flow, outcome = line.split("\t")
            self.keys.add(key)
            self.counts.update((flow, outcome))

    def _note(self, spec: Spec, key: str, outcome: str) -> None:
        self.keys.add(key)
        self.counts.update((spec.flow, outcome))
        if self.ledger is not None:
            with self.ledger.open("a", encoding="utf-8") as file:
                print(key, spec.flow, outcome, sep="\t", file=file)

    def add(self, spec: Spec, outcome: Outcome) -> list[str]:
        """Count an outcome; the kinds of findings that are new."""
        self.counts["specs"] += 1
        self.counts["torch fails"] += not outcome.key and not outcome.findings
        if outcome.key and outcome.key not in self.keys:
            refused = set(JUDGED) <= outcome.refused.keys()
            clean = "refused" if refused else "passed"
            self._note(spec, outcome.key, "found" if outcome.findings else clean)
        self.refused.update(re.sub(r"[0-9]+", "N", t)[:100] for t in outcome.refused.values())
        new = [kind for kind in clusters(outcome) if kind not in self.found]
        for kind in clusters(outcome):
            self.found.setdefault(kind, []).append(spec)
        return new

    def lines(self) -> Iterator[str]:
        flows = ", ".join(f"{self.counts[f]} {f}" for f in ("fx", "eager", "pt2e"))
        yield f"{len(self.keys)} distinct models ({flows}), {self.counts['passed']} passed; "
        yield f"{self.counts['refused']} that fxqfix refuses by name; "
        yield f"{self.counts['specs']} specs, torch itself fails on {self.counts['torch fails']}"
        for text, times in self.refused.most_common(15):
            yield f"  refused {times}: {text}"
        for kind, found in self.found.items():
            yield f"  FOUND {len(found)}: {kind}"


def shrink(spec: Spec, kind: str, child: Child) -> Spec:
    """The smallest spec found that shows the same kind of finding."""
    candidates, end = spec.smaller(), time.monotonic() + SHRINKING
    while time.monotonic() < end and (smaller := next(candidates, None)):
        if kind in clusters(child.run(smaller)):
            spec, candidates = smaller, smaller.smaller()
    return spec


def save(spec: Spec, kind: str, folder: Path) -> Path:
    """Write a finding: its spec, and how to see it again."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{len(list(folder.iterdir())):03}.json"
    found = {"kind": kind, "spec": json.loads(spec.to_json())}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return path


def search(seconds: float, seed: int, folder: Path = FOLDER, ledger: Path | None = None) -> Tally:
    """Run specs of a seed until the time is over."""
    tally, child, end = Tally(ledger=ledger), Child(), time.monotonic() + seconds
    for spec in (spec for i in count() for spec in drawn(seed + i)):
        if time.monotonic() > end:
            break
        if new := tally.add(spec, child.run(spec)):
            smallest, kinds = shrink(spec, new[0], child), "\n".join(new)
            path = save(smallest, kinds, folder)
            print(f"FOUND {kinds}\n  {smallest}", flush=True)
            print(f"  python -m tests.fuzz --replay {path}", flush=True)
    child.stop()
    return tally


def replay(path: Path) -> int:
    """One spec in this process."""
    given: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    spec = Spec.from_json(json.dumps(given.get("spec", given)))
    print(spec)
    outcome = outcome_of(spec)
    print(json.dumps(outcome.asdict(), indent=1))
    return int(bool(outcome.findings))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6) * 1000)
    parser.add_argument("--replay", type=Path, metavar="FILE")
    parser.add_argument("--ledger", type=Path, metavar="FILE")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve()
        return 0
    if given.replay:
        return replay(given.replay)
    print(f"seed {given.seed}, {given.seconds:g} s", flush=True)
    tally = search(given.seconds, given.seed, ledger=given.ledger)
    print("\n".join(tally.lines()))
    return int(bool(tally.found))


if __name__ == "__main__":
    sys.exit(main())

"""How many codes of each (engine, op) the emulation was compared on, and how many differed.

Runs the tests of the engines in this process, counts what their harness compares, and prints a row
per op: outputs and differing codes per engine. Inputs are those of the tests: random, ties, near
ties and extremes, in every layout. Takes a few minutes.

python benchmarks/exactness.py           count, at the levels that this process has
python benchmarks/exactness.py --write   also put the counts into exactness.json, and the table of
                                         all levels into docs/benchmarks.md
ONEDNN_MAX_CPU_ISA=AVX2 FBGEMM_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 python ...
                                         the same at lower levels of this CPU
"""

from __future__ import annotations

import datetime
import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tabulate import tabulate

import fxqfix
from fxqfix._torch import quantized_engine, quiet
from fxqfix.engines import ENGINES, calls, isa_of
from tests.engines import harness

_BOUNDARY = {"quantize", "dequantize"}
COUNTS = Path(__file__).with_suffix(".json")
PAGE = COUNTS.parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- exactness: written by benchmarks/exactness.py -->\n", "<!-- exactness: end -->\n"


class Count:
    """A pytest plugin that stands between the tests and the harness."""

    def __init__(self) -> None:
        self.compared: Counter[tuple[str, str]] = Counter()
        self.wrong: Counter[tuple[str, str]] = Counter()
        self._differing = harness.differing
        harness.differing = self.differing  # before any test imports it

    def differing(self, model: Any, *inputs: Any, **options: Any) -> tuple[int, int]:
        bad, total = self._differing(model, *inputs, **options)
        engine = options["engine"]
        with quantized_engine(engine), quiet(), torch.no_grad():
            found = calls(fxqfix.trace(model), engine).values()
        keys = {call.key + "_relu" * call.relu for call in found if call.key not in _BOUNDARY}
        for key in keys or {call.key for call in found}:
            self.compared[engine, key] += total
            self.wrong[engine, key] += bad
        return bad, total

    def asdict(self) -> dict[str, Any]:
        """When, on what, and op -> engine -> [differing, compared]."""
        ops: dict[str, dict[str, list[int]]] = {}
        for engine, key in sorted(
            self.compared, key=lambda pair: (pair[1], ENGINES.index(pair[0]))
        ):
            ops.setdefault(key, {})[engine] = [self.wrong[engine, key], self.compared[engine, key]]
        date = datetime.date.today().isoformat()
        return {"date": date, "torch": torch.__version__, "ops": ops}


def by_engine(counts: Mapping[str, Any]) -> str:
    """A row per op, a column per engine."""
    rows = [[op, *(_cell(found.get(e)) for e in ENGINES)] for op, found in counts["ops"].items()]
    sums = [_cell(_sum(counts, engine=engine)) for engine in ENGINES]
    return _table(["op", *ENGINES], [*rows, ["all", *sums]])


def by_level(levels: Mapping[str, Mapping[str, Any]]) -> str:
    """A row per op and one per engine, a column per level."""
    ops = sorted({op for counts in levels.values() for op in counts["ops"]})
    rows = [[op, *(_cell(_sum(c, op=op)) for c in levels.values())] for op in ops]
    rows += [[f"all, {e}", *(_cell(_sum(c, engine=e)) for c in levels.values())] for e in ENGINES]
    return _table(["op", *levels], rows)


def _table(headers: list[str], rows: list[list[str]]) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _sum(counts: Mapping[str, Any], op: str = "", engine: str = "") -> list[int]:
    found = [
        pair
        for key, engines in counts["ops"].items()
        for name, pair in engines.items()
        if op in ("", key) and engine in ("", name)
    ]
    return [sum(wrong for wrong, _ in found), sum(total for _, total in found)]


def _cell(pair: list[int] | None) -> str:
    return f"{pair[0]:,} of {pair[1]:,}" if pair and pair[1] else ""


def page(levels: Mapping[str, Mapping[str, Any]]) -> str:
    """What stands in docs/benchmarks.md."""
    said = [f"{level}: torch {c['torch']}, {c['date']}" for level, c in levels.items()]
    return f"{by_level(levels)}\n\nMeasured at {'; '.join(said)}.\n"


def write(level: str, counts: Mapping[str, Any]) -> None:
    """Put the counts of a level into the JSON and into the page."""
    levels = json.loads(COUNTS.read_text(encoding="utf-8")) | {level: counts}
    COUNTS.write_text(json.dumps(levels, indent=1) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{page(levels)}\n{END}{after}", encoding="utf-8")


def main() -> int:
    arguments = sys.argv[1:]
    rest = [a for a in arguments if a != "--write"]
    count, isa = Count(), isa_of(None)
    code = pytest.main(["-q", "tests/engines", *rest], plugins=[count])
    counts = count.asdict()
    print(f"onednn {isa.onednn}, fbgemm {isa.fbgemm}, ATen {isa.aten}, CPU {isa.cpu}")
    print(by_engine(counts))
    if "--write" in arguments:
        write(str(isa), counts)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())

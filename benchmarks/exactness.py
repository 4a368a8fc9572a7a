"""How many codes of each (engine, op) the emulation was compared on, and how many differed.

Runs the tests of the engines in this process, counts what their harness compares, and prints a row
per op: outputs and differing codes per engine. Inputs are those of the tests: random, ties, near
ties and extremes, in every layout. Takes a few minutes.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from tabulate import tabulate

import fxqfix
from fxqfix._torch import quantized_engine, quiet
from fxqfix.engines import ENGINES, calls
from tests.engines import harness

_BOUNDARY = {"quantize", "dequantize"}


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

    def table(self) -> str:
        """A row per op; differing of compared, per engine."""
        keys = sorted({key for _, key in self.compared})
        rows = [[key, *(self._cell(engine, key) for engine in ENGINES)] for key in keys]
        return tabulate(rows, headers=["op", *ENGINES], tablefmt="github", disable_numparse=True)

    def _cell(self, engine: str, key: str) -> str:
        total = self.compared[engine, key]
        return f"{self.wrong[engine, key]:,} of {total:,}" if total else ""


def main() -> int:
    count = Count()
    code = pytest.main(["-q", "tests/engines", *sys.argv[1:]], plugins=[count])
    print(count.table())
    for engine in ENGINES:
        total = sum(n for (e, _), n in count.compared.items() if e == engine)
        wrong = sum(n for (e, _), n in count.wrong.items() if e == engine)
        print(f"{engine}: {wrong:,} of {total:,}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())

"""Report.merge: in any order and grouping the same counts."""

from __future__ import annotations

import functools
import itertools
import json
import random
from dataclasses import replace
from typing import Any

from fxqfix.measure import Culprit, Histogram
from fxqfix.report import Coverage, Report, Row, Uncovered
from tests.report import samples

# Sums of squares, and what is computed from them.
FLOATS = {"signal", "noise", "energy", "product", "sqnr_db", "cosine"}


def shard(seed: int) -> Report:
    """What a rank could say of its own data."""
    draw = random.Random(seed)
    causes = ("range-lost", "rounding", "upstream", "scale-formula")

    def numbers(row: Row) -> Row:
        if row.kind == "weight":
            return row
        some = samples.apart(1000, draw.randrange(500), draw.randrange(1, 9), draw.randrange(5))
        some = replace(some, noise=draw.random(), signal=100 * draw.random())
        named = draw.sample(causes, 2)
        return replace(
            row,
            local=some,
            cumulative=some,
            causes={name: draw.randrange(1, 9) for name in named},
            evidence={name: f"{name} of shard {seed}" for name in named},
            problems=(f"problem {seed}",) * draw.randrange(2),
            histogram=Histogram(0, (draw.randrange(9), 1), (1, draw.randrange(9))),
            either=draw.randrange(100),
        )

    report = samples.sample()
    gone = tuple(Uncovered("late", "prepared", "no value") for _ in range(draw.randrange(2)))
    names = draw.sample([row.name for row in report.rows], 3)
    one = samples.apart(10, 4)
    return replace(
        report,
        rows=tuple(map(numbers, report.rows)),
        batches=draw.randrange(1, 5),
        notes=("observers were held still", f"note of {seed % 2}"),
        coverage=replace(report.coverage, unsupported=gone),
        isa=draw.choice(("vnni", "avx2")),
        threads=draw.choice((1, 2)),
        corrected=tuple(Culprit(name, one, replace(one, noise=draw.random())) for name in names),
    )


def said(report: Report) -> Any:
    """All that a report says, without float sums and without the order of mappings."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k not in FLOATS}
        return [plain(v) for v in value] if isinstance(value, list) else value

    return plain(json.loads(report.to_json()))


def test_any_order_and_any_grouping_say_the_same() -> None:
    for seed in range(20):
        parts = [shard(4 * seed + i) for i in range(4)]
        whole = functools.reduce(Report.merge, parts)
        for order in itertools.permutations(parts):
            a, b, c, d = order
            for other in (a.merge(b).merge(c).merge(d), a.merge(b).merge(c.merge(d))):
                assert said(other) == said(whole)
        a, b = parts[:2]
        assert a.merge(b) == b.merge(a)  # sums of two floats don't depend on their order either


def test_what_one_left_out_was_left_out() -> None:
    report = samples.sample()
    gone = Uncovered("late", "prepared", "no value")
    other = replace(report, coverage=replace(report.coverage, unpaired=(gone,)))
    both = report.merge(other).coverage
    assert set(both.unpaired) == {*report.coverage.unpaired, gone}
    empty = replace(report, coverage=Coverage())
    assert report.merge(empty).coverage.paired == ()
    assert report.merge(report).coverage == report.coverage

"""Bounds of what reports count, name and refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fxqfix.errors import UnknownNameError
from fxqfix.measure.discrepancy import Discrepancy
from fxqfix.report import Coverage, JudgedOp, Judgement, Report, Row, Uncovered, findings, text
from fxqfix.report.findings import counted
from fxqfix.report.judgement import Explanation
from tests.report import samples
from tests.report.samples import NARROW, WIDE, apart

ROW = samples.sample().rows[2]
EXACT = samples.exact_sample()


def test_grids_of_a_row() -> None:
    assert ROW.grids == (NARROW, WIDE)
    for lost in ("prepared", "converted"):
        with pytest.raises(UnknownNameError, match="a float output has no qparams"):
            _ = replace(ROW, **{lost: None}).grids  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prepared", "converted", "shift"),
    [
        (NARROW, replace(NARROW, zero_point=5), 2),
        (NARROW, replace(NARROW, zero_point=1), -2),
        (NARROW, NARROW, 0),
        (NARROW, None, 0),
        (None, NARROW, 0),
        (NARROW, replace(NARROW, dtype=torch.qint8, zero_point=5), 0),
    ],
)
def test_how_far_codes_are_shifted(prepared: object, converted: object, shift: int) -> None:
    row = replace(ROW, prepared=prepared, converted=converted)  # type: ignore[arg-type]
    assert row.shift == shift


def test_of_channels_the_largest_shift() -> None:
    grid = replace(samples.CHANNELS, zero_point=(0, 0, 0))
    moved = replace(grid, zero_point=(1, -3, 2))
    assert replace(ROW, prepared=grid, converted=moved).shift == -3


@pytest.mark.parametrize(
    ("scale", "same", "rescaled"),
    [
        (0.25, False, True),
        (0.25, True, False),  # no value differs
        (NARROW.scales[0], False, False),
        (NARROW.scales[0] * (1 + 1e-12), False, False),  # one float32
    ],
)
def test_rescaled(scale: float, same: bool, rescaled: bool) -> None:
    found = apart(8, 0) if same else replace(apart(8, 1), noise=1.0)
    row = replace(
        ROW, prepared=NARROW, converted=replace(NARROW, scale=scale), local=found, cumulative=found
    )
    assert row.rescaled == rescaled
    assert not replace(row, converted=None).rescaled
    assert not replace(row, prepared=None).rescaled


def test_a_local_difference_alone_is_one() -> None:
    same, other = apart(8, 0), apart(8, 1)
    assert replace(ROW, local=same, cumulative=same, converted=NARROW).exact
    assert not replace(ROW, local=other, cumulative=same, converted=NARROW).exact
    assert replace(ROW, local=None, cumulative=same, converted=NARROW).exact
    values = replace(same, noise=1.0)
    assert replace(ROW, local=None, cumulative=values).off_grid
    assert not replace(ROW, local=other, cumulative=values).off_grid
    assert not replace(ROW, local=None, cumulative=same).off_grid


def test_shares_of_nothing() -> None:
    empty = replace(ROW, local=None, cumulative=Discrepancy())
    assert (empty.local_share, empty.cumulative_share) == (0.0, 0.0)
    one = replace(ROW, local=None, cumulative=apart(1, 1))
    assert one.local_share == 1.0


def test_coverage_counts_prepared_sites() -> None:
    gone, new = Uncovered("a", "prepared", "why"), Uncovered("b", "converted", "why")
    pair = ("c", "c", "name")
    assert Coverage((pair,), (gone,), (gone, new)).ratio == 1 / 3
    assert Coverage((pair, pair), (new,)).ratio == 1.0
    assert Coverage((), (gone,)).ratio == 0.0
    assert Coverage((), (new,)).ratio == 1.0


def test_how_many_are_named() -> None:
    rows = [replace(ROW, name=f"r{i}", cumulative=apart(8, 1, 1, 1), local=None) for i in range(4)]
    assert Report(tuple(rows[:3])).faults[-1] == "3 codes out of range at r0, r1, r2"
    assert Report(tuple(rows)).faults[-1] == "4 codes out of range at r0, r1, r2 and 1 more"
    assert findings._some(list("abcde")) == "a, b, c, d, e"
    assert findings._some(list("abcdef")) == "a, b, c, d, e and 1 more"
    assert (counted(0, "row"), counted(1, "row"), counted(2, "row")) == (
        "0 rows",
        "1 row",
        "2 rows",
    )


def test_out_of_range_is_the_larger_of_both() -> None:
    for local, cumulative in ((3, 1), (1, 3)):
        row = replace(ROW, local=apart(8, 4, 1, local), cumulative=apart(8, 4, 1, cumulative))
        assert "3 codes out of range at conv1" in Report((row,)).faults


def test_the_worst_five() -> None:
    report = samples.many(8)
    assert [row.name for row in report.worst()] == [f"features_{i}_0" for i in (7, 6, 5, 4, 3)]
    lines = text.summary(report).splitlines()
    assert sum(line.startswith("worst: ") for line in lines) == 5


def test_codes_without_a_cause_are_counted_row_by_row() -> None:
    many = replace(EXACT.rows[1], causes={"rounding": 9}, either=0)
    none = replace(EXACT.rows[1], name="other", local=apart(64, 3), causes={}, either=2)
    report = replace(EXACT, rows=(many, none, EXACT.rows[2]))
    said = "3 codes differ without a cause: not asked for, or not known here"
    assert report.left_out == (said,)


def test_a_row_that_only_one_report_recomputed() -> None:
    one = replace(EXACT.rows[1], local=apart(64, 1), noise_floor=None)
    two = replace(one, local=None, noise_floor=apart(64, 2))
    merged = Report((one,)).merge(Report((two,))).rows[0]
    assert (merged.local, merged.noise_floor) == (None, None)
    both = Report((one,)).merge(Report((one,))).rows[0]
    assert both.local == one.local + one.local  # type: ignore[operator]


def test_the_first_thing_that_tells_two_reports_apart() -> None:
    def said(other: Report) -> str:
        with pytest.raises(Exception, match="same two models") as caught:
            EXACT.merge(other)
        return str(caught.value)

    assert "engine unknown, and x86 here" in said(replace(EXACT, engine=""))
    first, *rest = EXACT.rows
    assert "site 'y' in the place of 'x'" in said(
        replace(EXACT, rows=(replace(first, name="y"), *rest))
    )
    moved = replace(first, prepared=NARROW)
    assert "site 'x': prepared 0.0078125/3 [0,127]" in said(replace(EXACT, rows=(moved, *rest)))
    gone = replace(first, converted=None)
    assert "site 'x': converted None, and 0.0078125/3" in said(replace(EXACT, rows=(gone, *rest)))
    assert "2 rows, and 3 here" in said(replace(EXACT, rows=EXACT.rows[:2]))


def test_threads_and_levels_of_merged_reports() -> None:
    one, two = replace(EXACT, threads=2, isa="avx2"), replace(EXACT, threads=1, isa="vnni")
    assert (one.merge(one).threads, one.merge(one).isa) == (2, "avx2")
    assert (one.merge(two).threads, one.merge(two).isa) == (0, "avx2 and vnni")


@pytest.mark.parametrize("lost", ["prepared", "converted"])
def test_cells_of_a_row_without_a_grid(lost: str) -> None:
    row = replace(ROW, **{lost: None})  # type: ignore[arg-type]
    cells = {column.key: column.cell(row) for column in text.COLUMNS}
    assert (cells["range"], cells["qparams"]) == ("float", "-")


def explanation(explained: int, differing: int, broken: int, *names: str) -> Explanation:
    return Explanation(names or ("half-up",), "it rounds", "round", explained, differing, broken)


@pytest.mark.parametrize(
    ("counts", "complete"), [((3, 3, 0), True), ((2, 3, 0), False), ((3, 3, 1), False)]
)
def test_an_explanation_gives_all_codes_and_changes_no_other(
    counts: tuple[int, int, int], complete: bool
) -> None:
    assert explanation(*counts).complete == complete
    assert ("to change" in str(explanation(*counts))) == complete  # no advice without a finding
    assert ("others would change" in str(explanation(*counts))) == bool(counts[2])


def test_an_op_of_a_device() -> None:
    same, off = JudgedOp("a", "linear", apart(8, 0)), JudgedOp("b", "linear", apart(8, 3))
    unknown = JudgedOp("c", "lstm", None, reason="closed")
    assert (same.equal, off.equal, unknown.equal) == (True, False, False)
    assert [list(op.sentences()) for op in (same, unknown)] == [[], []]
    assert list(off.sentences()) == [
        "3 of 8 codes differ",
        "no deviation that is known explains them",
    ]
    near = replace(off, best=explanation(2, 3, 1), through=("x",))
    assert list(near.sentences()) == [
        "3 of 8 codes differ (with x as the reference has it)",
        f"nothing gives all of them; nearest is {near.best}, which leaves 2: no finding",
    ]
    named = replace(off, named=(explanation(3, 3, 0),), separation="x = 1", best=None)
    assert list(named.sentences())[-1] == "equal on these data; x = 1"
    assert len(list(replace(named, separation="").sentences())) == 2


def test_what_a_judgement_says() -> None:
    same, off = JudgedOp("a", "linear", apart(8, 0)), JudgedOp("b", "linear", apart(8, 3))
    unknown = JudgedOp("c", "lstm", None, reason="closed")
    assert Judgement("r", (same,)).exact
    assert not Judgement("r", (replace(same, cumulative=apart(8, 1)),)).exact
    assert Judgement("r", (replace(same, cumulative=apart(8, 0)),)).exact
    assert not Judgement("r", (same, unknown)).exact
    assert Judgement("r", (same,), unchecked=(("c", "closed"),)).left_out == ("c: closed",)
    assert Judgement("r", (unknown,)).left_out == ("no op was looked at",)
    both = Judgement("r", (same, off, replace(off, name="d", local=apart(8, 2)), unknown))
    assert both.causes == {"unexplained": 5}
    assert [fault.partition(":")[0] for fault in both.faults] == ["b", "d"]
    assert both.op("b") is off
    table = both.table("tsv").splitlines()
    assert [line.split() for line in table[1:]] == [
        ["a", "linear", "8", "0", "0", "-"],
        ["b", "linear", "8", "3", "1", "-", "?"],
        ["d", "linear", "8", "2", "1", "-", "?"],
        ["c", "lstm", "-", "-", "-", "-", "closed"],
    ]
    assert Judgement.from_json(both.to_json()) == both


def test_rows_of_an_unknown_kind_stay() -> None:
    """A row by its module: the one activation that has it."""
    rows = [Row(n, k, "m", "op", "", WIDE, WIDE, None, apart(8, 0)) for n, k in
            (("w", "weight"), ("a", "activation"))]  # fmt: skip
    assert Report(tuple(rows)).row("m").name == "a"
    twice = Report((*rows, replace(rows[1], name="b")))
    with pytest.raises(UnknownNameError):
        twice.row("m")

"""What each record says, word for word: with every section that it can have, and with none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fxqfix.checks import Finding
from fxqfix.measure import Culprit
from fxqfix.measure.discrepancy import Discrepancy
from fxqfix.report import (
    Certificate,
    Certified,
    CheckedRange,
    CheckedWeight,
    Int8Certificate,
    LintReport,
    Mend,
    Migration,
    Refusal,
    Repair,
    Report,
    Routed,
    Saturating,
    frame,
    html,
    json_,
)
from tests.report import samples
from tests.report.samples import CHANNELS, NARROW, WIDE, apart

Golden = Callable[[str, str], None]


def shifted(report: Report) -> Report:
    """With rows on another grid, rows that are shifted, and rows that have a problem."""
    row = report.rows[0]
    values = replace(apart(100, 0, 0), noise=1.0, max_abs=0.125)
    up = replace(NARROW, zero_point=NARROW.zero_points[0] + 3)
    same = apart(100, 0, 0)
    moved = replace(NARROW, scale=0.7 * NARROW.scales[0])
    rows = [
        replace(row, name=f"grid{i}", converted=moved, local=values, cumulative=values, causes={})
        for i in range(4)
    ]
    rows += [
        replace(row, name=f"shift{i}", converted=up, local=same, cumulative=same, causes={})
        for i in range(4)
    ]
    rows.append(replace(row, name="odd", problems=("no float64 recomputation",), note="odd"))
    before = Discrepancy(elements=100, differing=40, max_lsb=3, signal=1000.0, noise=10.0)
    culprit = Culprit("odd", before, replace(before, differing=10, noise=1.0))
    return replace(report, rows=tuple(rows), corrected=(culprit,), isa="avx2", threads=2)


def certificate() -> Certificate:
    """A site that is exact, one with causes, an end in float, and outputs of each kind."""
    causes = {"rounding": 2, "unexplained": 1}
    far = replace(apart(4096, 3, 2, 1), sum_lsb=4)
    end = Discrepancy(elements=10, differing=4, max_abs=0.0625, signal=9.0, noise=1.0)
    sites = (
        Certified("x", "input", WIDE, apart(1024, 0)),
        Certified("conv", "conv2d", NARROW, far, causes),
        Certified("softmax", "", None, end, {"rounding": 4}),
    )
    outputs = (
        Certified("output 0", "", NARROW, apart(64, 0), shown_by="conv"),
        Certified("output 1", "", NARROW, apart(64, 5, 3, 2), shown_by="conv"),
        Certified("output 2", "", None, end, shown_by="x"),
        Certified("output 3", "", None, end, shown_by="softmax"),
        Certified("output 4", "", None, end),
        Certified("output 5", "", None, apart(64, 0)),
    )
    return Certificate(
        "onnxruntime", {"torch": "2.13.0", "onnxruntime": "1.31.1"}, 2, sites, outputs, 3, 2,
        (("QGemm", 1), ("QLinearConv", 4)), ("a note",), (("lstm", "is closed"),),
        {"cpu": "avx2"},
    )  # fmt: skip


def int8_certificate() -> Int8Certificate:
    clamp = CheckedRange("x", 0, 127, True, "quantize can give 0..255", True, True)
    weight = CheckedWeight("fc.weight", 8, 0, True, "equal")
    return Int8Certificate(
        "fbgemm", "2.13.0",
        (clamp, replace(clamp, site="relu", clamped=False), replace(clamp, site="a", held=False),
         replace(clamp, site="b", same_grid=False, clamped=False)),
        (weight, replace(weight, site="b", differing=2), replace(weight, site="c", bias="none"),
         replace(weight, site="d", same_qparams=False, bias="bias differs by 1"),
         replace(weight, site="e", bias="bias differs by 2", differing=3)),
        (Routed("up", "conv_transpose2d", "float island", "transposed-permutes"),),
        (Saturating("conv", 36, 255),),
        (("lstm", "is closed"),), (("pool", "is wrong"),), (("mean", "may be wrong"),),
        (("cat", "of one channel"),), ("from a copy on the CPU",), broken=(("add", "gets floats"),),
    )  # fmt: skip


def migration(report: Report | None = None, trained: int | None = 2) -> Migration:
    found = None if trained is None else apart(1000, trained)
    notes = ("two sites are inside",)
    return Migration("m.pt2", 1234, report is None, 1, 2, certificate(), found, report, notes)


def findings(*counts: int) -> tuple[Finding, ...]:
    codes = ("uncalibrated", "error"), ("range-lost", "warning"), ("not-lowered", "info")
    return tuple(
        Finding(code, severity, "" if i == 1 else f"{code}{i}", f"evidence {i}", "do it")
        for (code, severity), count in zip(codes, counts, strict=True)
        for i in range(count)
    )


def _as(severity: str, found: tuple[Finding, ...]) -> tuple[Finding, ...]:
    return tuple(replace(f, severity=severity) for f in found)


def lint(*counts: int, sites: int = 4) -> LintReport:
    return LintReport(findings(*counts), "fbgemm", sites)


SAMPLE, EXACT = samples.sample(), samples.exact_sample()
REPAIR = Repair(
    None,
    (Mend("restore-range", "conv", "held in [0,127]"),),
    (Refusal("bias-int32", "conv", "at most 1 code"), Refusal("rounding", "", "all sites")),
    SAMPLE,
    EXACT,
)
EMPTY = Certificate("export", {"torch": "2.13.0"}, 1, (), (), 0, 0, ())
RECORDS: dict[str, Any] = {
    "certificate": certificate(),
    "certificate_empty": EMPTY,
    "int8_certificate": int8_certificate(),
    "int8_certificate_empty": Int8Certificate("fbgemm", "2.13.0", (), (), (), (), ()),
    "migration": migration(),
    "migration_old": migration(SAMPLE, None),
    "repair": REPAIR,
    "repair_without_data": replace(REPAIR, before=None, after=None, applied=()),
    "repair_not_exact": replace(REPAIR, before=EXACT, after=SAMPLE, refused=()),
    "lint": lint(5, 3, 4),
    "lint_one_each": lint(1, 1, 1, sites=1),
    "report_shifted": shifted(SAMPLE),
}


@pytest.mark.parametrize("name", RECORDS)
def test_text(name: str, golden: Golden) -> None:
    golden(f"records/{name}", str(RECORDS[name]))


@pytest.mark.parametrize("name", ["certificate", "int8_certificate", "migration", "migration_old"])
def test_json(name: str, golden: Golden) -> None:
    # reason: decibels and cosines are of the platform's own logarithms and roots
    plain = json.loads(RECORDS[name].to_json(), parse_float=lambda text: round(float(text), 6))
    golden(f"records/{name}_json", json.dumps(plain, indent=1))


@pytest.mark.parametrize("report", ["sample", "exact", "shifted"])
def test_renderings(report: str, golden: Golden) -> None:
    found = {"sample": SAMPLE, "exact": EXACT, "shifted": shifted(SAMPLE)}[report]
    golden(f"records/dot_{report}", found.to_dot())
    golden(f"records/summary_{report}", found.summary())


def test_inspections(golden: Golden) -> None:
    found = samples.inspection()
    golden("records/csv_inspection", frame.inspection_to_csv(found))
    golden("records/json_inspection", json_.inspection_to_json(found))
    plain = html.render_inspection(replace(found, unsupported=()))
    assert "Not read" not in plain


def test_findings_that_are_not_listed_are_counted() -> None:
    assert "not listed" not in str(lint(3, 3, 3))
    assert "not listed: 1 more range-lost; see" in str(lint(3, 4, 3))
    assert str(lint(0, 0, 0)).splitlines()[1:] == ["nothing found"]
    twice = replace(
        lint(4, 0, 0), findings=(*findings(5, 0, 0), *_as("warning", findings(4, 0, 0)))
    )
    assert "not listed: 3 more uncalibrated; see" in str(twice)
    table = lint(2, 2, 0).table("tsv", limit=1).splitlines()
    assert [line.split("\t")[1].strip() for line in table] == ["code", "uncalibrated", "range-lost"]
    assert len(lint(2, 2, 0).table("tsv").splitlines()) == 5


def test_a_certificate_counts_codes_and_not_floats() -> None:
    found = certificate()
    assert (found.differing, found.out_of_range, found.max_lsb) == (3, 3, 2)
    assert found.causes == {"rounding": 6, "unexplained": 1}
    assert (found.unexplained, found.integer_kernels) == (1, 5)
    assert (EMPTY.differing, EMPTY.max_lsb, EMPTY.unexplained, EMPTY.out_of_range) == (0, 0, 0, 0)
    assert found.faults == (
        "unexplained: 1 codes",
        "3 codes out of range",
        "codes are up to 2 apart on the same inputs",
    )
    assert found.left_out == (
        "lstm: is closed",
        "output 4: 4 of 10 values differ, and no site that was looked at shows why",
    )


def test_codes_that_are_one_apart_are_no_fault() -> None:
    one = Certified("conv", "conv2d", NARROW, apart(8, 1, 1), {"rounding": 1})
    end = Certified("output 0", "", None, apart(8, 2), shown_by="conv")
    other = replace(end, name="output 1")
    same = Certified("x", "input", NARROW, apart(8, 0))
    assert replace(EMPTY, sites=(one,), outputs=(end,)).faults == ()
    # One site that differs may have set it off; none can't.
    assert replace(EMPTY, sites=(same, one), outputs=(end, other)).faults == ()
    assert replace(EMPTY, sites=(replace(same, name="conv"),), outputs=(end, other)).faults == (
        "output 0, output 1 differs, and no site does on the same inputs",
    )


def test_records_that_saw_no_value() -> None:
    some, none = Certified("a", "", None, apart(8, 0)), Certified("b", "", None, Discrepancy())
    output = Certified("output 0", "", None, Discrepancy())
    found = replace(EMPTY, sites=(none, some), outputs=(output,))
    said = tuple(f"{name}: the batches held no value of it" for name in ("b", "output 0"))
    assert found.left_out == said
    # Where no site holds a value, that is said once.
    assert replace(found, sites=(none,), outputs=()).left_out == (
        "no site was looked at",
        "no output was looked at",
    )


def test_a_migration_needs_file_and_trained_model() -> None:
    good = replace(
        EMPTY,
        sites=(Certified("a", "", None, apart(8, 0)),),
        outputs=(Certified("output 0", "", None, apart(8, 0), shown_by="a"),),
    )
    found = replace(migration(), certificate=good, trained=apart(8, 0))
    assert (found.exact, found.verdict, found.faults) == (True, "ok", ())
    assert replace(found, trained=None).exact
    off = replace(found, trained=apart(8, 1))
    assert (off.exact, off.verdict) == (False, "not ok")
    assert off.faults == ("1 outputs are not those of freeze(prepared)",)
    unseen = replace(found, certificate=EMPTY)
    assert (unseen.exact, unseen.verdict) == (False, "not judged")
    assert json.loads(found.to_json())["trained"]["differing"] == 0
    assert json.loads(replace(found, trained=None).to_json())["trained"] is None


def test_a_repair_is_exact_where_the_comparison_behind_it_is() -> None:
    assert REPAIR.exact
    assert REPAIR.modified
    assert not replace(REPAIR, after=SAMPLE).exact
    assert not replace(REPAIR, after=None).exact
    assert not replace(REPAIR, applied=()).modified
    assert replace(REPAIR, after=SAMPLE).faults == SAMPLE.faults
    assert replace(REPAIR, after=None).faults == ()
    assert replace(REPAIR, after=SAMPLE).left_out == SAMPLE.left_out
    # Weights have no local figure: their codes are in no sum.
    local = "codes that differ on the same inputs: 69 -> 0; exact"
    assert str(REPAIR).splitlines()[0] == f"fxqfix repair: 1 repaired, 2 left; {local}"


def test_channels_stand_in_one_cell() -> None:
    lines = SAMPLE.to_csv().splitlines()
    points = frame.records(SAMPLE)[3]["prepared_zero_point"]
    assert points == CHANNELS.zero_points
    assert ",0 0 0," in lines[4]

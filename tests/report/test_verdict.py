"""Verdicts: a fault makes a result not ok; else something left out makes it not judged."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fxqfix import causes
from fxqfix.errors import CheckError, UnknownNameError
from fxqfix.measure.discrepancy import Discrepancy
from fxqfix.report import (
    ALLOWED,
    Certificate,
    Certified,
    CheckedRange,
    CheckedWeight,
    Int8Certificate,
    Migration,
    Repair,
    Report,
    Uncovered,
)
from fxqfix.report.verdict import exit_code
from tests.report import samples
from tests.report.samples import apart

EXACT = samples.exact_sample()
SITE = EXACT.rows[1]


def with_site(**changes: object) -> Report:
    return replace(EXACT, rows=(EXACT.rows[0], replace(SITE, **changes), EXACT.rows[2]))


def differing(cause: str) -> Report:
    return with_site(local=apart(64, 3), causes={cause: 3}, either=3)


@pytest.mark.parametrize("cause", [c.name for c in causes.registry()])
def test_each_cause_is_allowed_or_a_fault(cause: str) -> None:
    report = differing(cause)
    assert report.ok == (cause in ALLOWED["Report"])
    assert report.verdict == ("ok" if report.ok else "not ok")
    assert any(cause in fault for fault in report.faults) != report.ok
    assert not report.exact


def test_the_table_names_causes_that_exist() -> None:
    names = {cause.name for cause in causes.registry()}
    own = {kind: allowed for kind, allowed in ALLOWED.items() if kind != "Judgement"}
    assert all(allowed <= names for allowed in own.values())


def test_codes_without_a_cause_are_not_judged() -> None:
    report = with_site(local=apart(64, 3), causes={"rounding": 2}, either=3)
    assert report.verdict == "not judged"
    assert report.left_out == ("1 codes differ without a cause: not asked for, or not known here",)


def test_codes_out_of_range_are_a_fault_whatever_their_cause() -> None:
    outside = apart(64, 3, 1, 2)
    for changes in ({"local": outside}, {"cumulative": outside}):
        report = with_site(**changes, causes={"rounding": 3}, either=3)
        assert report.verdict == "not ok"
        assert "2 codes out of range at relu" in report.faults


def test_integers_on_another_zero_point_are_not_exact() -> None:
    moved = replace(SITE.converted, zero_point=SITE.converted.zero_point + 3)
    report = with_site(converted=moved)
    assert report.row("relu").shift == 3
    assert not report.row("relu").off_grid
    assert not report.exact
    assert report.faults == ("values equal, codes shifted by 3 at relu",)
    assert "relu (by 3)" in str(report)


def test_values_on_another_grid_are_a_fault() -> None:
    found = replace(apart(64, 0), noise=1e-9, max_abs=1e-5)
    report = with_site(cumulative=found)
    assert report.row("relu").off_grid
    assert report.faults == ("values on another grid at relu",)


@pytest.mark.parametrize("state", ["unpaired", "unsupported"])
def test_a_fault_comes_before_what_was_left_out(state: str) -> None:
    gone = replace(EXACT.coverage, **{state: (Uncovered("a", "prepared", "why"),)})
    assert replace(EXACT, coverage=gone).verdict == "not judged"
    assert replace(differing("range-lost"), coverage=gone).verdict == "not ok"


def test_exit_codes() -> None:
    good, bad, open_ = EXACT, differing("range-lost"), replace(EXACT, rows=())
    assert [exit_code([r]) for r in (good, bad, open_)] == [0, 1, 2]
    assert exit_code([good, open_, bad]) == 1
    assert exit_code([good, open_]) == 2


def certificate(site: Discrepancy, output: Discrepancy, **more: object) -> Certificate:
    causes = more.pop("causes", {})
    seen = Certified("conv", "conv2d", samples.WIDE, site, causes)  # type: ignore[arg-type]
    end = Certified("output 0", "", None, output, shown_by=str(more.pop("shown_by", "conv")))
    made = Certificate("export", {"torch": "2"}, 1, (seen,), (end,), 0, 0, ())
    return replace(made, **more)  # type: ignore[arg-type]


SAME = Discrepancy(elements=8)


def test_a_certificate_is_exact_where_all_was_looked_at() -> None:
    good = certificate(SAME, SAME)
    assert good.exact
    assert good.verdict == "ok"
    for less in (
        replace(good, sites=()),
        replace(good, outputs=()),
        replace(good, unchecked=(("all sites", "why"),)),
        certificate(Discrepancy(), SAME),  # 0 of 0
    ):
        assert not less.exact
        assert less.verdict == "not judged"


def test_an_output_is_explained_by_the_site_that_shows_it() -> None:
    off = apart(8, 2)
    explained = certificate(apart(8, 1), off, causes={"rounding": 1})
    assert explained.verdict == "ok"
    assert "given the decomposed graph's codes 1 differ (rounding 1)" in str(explained)
    assert certificate(SAME, off, shown_by="").verdict == "not judged"
    # No site differs, and yet the output does: no code upstream can have set that off.
    assert certificate(SAME, off).verdict == "not ok"


def test_an_output_behind_a_site_that_differs() -> None:
    upstream = Certified("first", "conv2d", samples.WIDE, apart(8, 1), {"rounding": 1})
    found = certificate(SAME, apart(8, 2))
    found = replace(found, sites=(upstream, *found.sites))
    assert found.verdict == "ok"
    assert "given the decomposed graph's codes it is equal" in str(found)


@pytest.mark.parametrize(
    ("site", "causes"),
    [(apart(8, 1), {"unexplained": 1}), (apart(8, 1, 2), {"rounding": 1}),
     (apart(8, 1, 1, 1), {"rounding": 1}), (apart(8, 1), {"int16-saturation": 1})],
)  # fmt: skip
def test_faults_of_a_certificate(site: Discrepancy, causes: dict[str, int]) -> None:
    found = certificate(site, SAME, causes=causes)
    assert found.verdict == "not ok"
    assert found.faults
    assert "not ok:" in str(found)


RANGE = CheckedRange("x", 0, 127, True, "quantize can give 0..255", True, True)
WEIGHT = CheckedWeight("fc.weight", 8, 0, True, "equal")


def static(**changes: object) -> Int8Certificate:
    made = Int8Certificate("fbgemm", "2.13.0", (RANGE,), (WEIGHT,), (), (), ())
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "ok"),
        ({"ranges": (replace(RANGE, held=False),)}, "not ok"),
        ({"ranges": (replace(RANGE, same_grid=False),)}, "not ok"),
        ({"weights": (replace(WEIGHT, differing=1),)}, "not ok"),
        ({"weights": (replace(WEIGHT, bias="bias differs by 1"),)}, "not ok"),
        ({"defects": (("conv", "wrong"),)}, "not ok"),
        ({"possible": (("conv", "may be wrong"),)}, "not judged"),
        ({"unchecked": (("lstm", "closed"),)}, "not judged"),
        ({"ranges": (), "weights": ()}, "not judged"),
    ],
)
def test_int8_certificate(changes: dict[str, object], verdict: str) -> None:
    found = static(**changes)
    assert found.verdict == verdict
    assert found.ok == (verdict == "ok")
    assert not found.exact
    assert bool(found.reasons) == (verdict != "ok")
    assert found.to_dict()["verdict"] == verdict


def test_a_repair_is_judged_by_the_comparison_behind_it() -> None:
    assert Repair(None).verdict == "not judged"
    assert Repair(None, before=EXACT, after=EXACT).exact
    assert Repair(None, before=EXACT, after=differing("range-lost")).verdict == "not ok"


def test_a_migration_is_judged_by_the_trained_model_too() -> None:
    def migration(trained: Discrepancy | None) -> Migration:
        return Migration("m.pt2", 1, False, 1, 1, certificate(SAME, SAME), trained)

    assert migration(SAME).exact
    assert migration(apart(8, 1)).verdict == "not ok"


def test_counts_that_no_cause_covers_are_not_judged() -> None:
    """Also of rows made by hand, whose `either` was not counted."""
    report = with_site(local=apart(64, 3), causes={}, either=None)
    assert report.verdict == "not judged"
    both = replace(SITE, causes={"rounding": 9}, either=0)  # too many here make up for none there
    none = replace(SITE, name="other", local=apart(64, 3), causes={}, either=3)
    assert replace(EXACT, rows=(both, none, EXACT.rows[2])).verdict == "not judged"


def test_check() -> None:
    EXACT.check()
    report = differing("scale-formula")
    with pytest.raises(CheckError, match=r"not ok.*scale-formula: 3 codes"):
        report.check()
    report.check(allow={"scale-formula"})
    report.check(allow={"scale-formula"}, max_local_share=3 / 64)
    with pytest.raises(CheckError, match=r"more than 0.04 of the codes differ at relu"):
        report.check(allow={"scale-formula"}, max_local_share=0.04)
    with pytest.raises(UnknownNameError, match="no cause is named 'scale'"):
        report.check(allow={"scale"})
    with pytest.raises(CheckError, match=r"not judged.*no output"):
        replace(EXACT, rows=EXACT.rows[:2]).check()
    outside = with_site(local=apart(64, 3, 1, 2), causes={"range-lost": 3}, either=3)
    with pytest.raises(CheckError, match="2 codes out of range"):
        outside.check()
    outside.check(allow=["range-lost"])
    apart_by_grid = with_site(cumulative=replace(apart(64, 0), noise=1e-9, max_abs=1e-5))
    with pytest.raises(CheckError, match="another grid"):
        apart_by_grid.check(allow={"rounding"})
    apart_by_grid.check(allow={"scale-formula"})  # which is what puts it there


def test_a_site_without_values_is_not_judged() -> None:
    report = with_site(local=Discrepancy(), cumulative=Discrepancy())
    assert report.left_out == ("relu: the batches held no value of it",)
    found = certificate(SAME, SAME)
    found = replace(found, sites=(*found.sites, Certified("b", "", None, Discrepancy())))
    assert found.left_out == ("b: the batches held no value of it",)

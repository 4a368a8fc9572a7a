"""origin on a graph drawn by hand, and culprits in every rendering."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fxqfix.errors import DataError, UnknownNameError
from fxqfix.measure import Culprit, Discrepancy
from fxqfix.report import Report, Row
from tests.report.samples import NARROW, apart, sample


def row(name: str, local: int, cumulative: int, *inputs: str) -> Row:
    return Row(
        name, "activation", "", "conv2d", "quantized.conv2d", NARROW, NARROW,
        local=apart(100, local, 2), cumulative=apart(100, cumulative, 3), inputs=inputs,
    )  # fmt: skip


# Two ways to the end; the upper one differs more by then, the lower one added more.
DIAMOND = Report(
    rows=(
        row("x", 0, 0),
        row("up", 1, 60, "x"),
        row("down", 30, 30, "x"),
        row("lower", 4, 31, "down"),
        row("end", 2, 70, "up", "lower"),
        row("healthy", 0, 0, "x"),
    )
)


def test_the_path_on_which_most_was_added() -> None:
    path = DIAMOND.origin("end")
    assert [r.name for r in path] == ["down", "lower", "end"]
    assert path.added == (("down", 30, 2), ("lower", 4, 2), ("end", 2, 2))
    assert str(path).splitlines()[0] == (
        "down: adds 30 codes of 100, up to 2 LSB; 30 differ by now"
    )


def test_an_exact_site_hands_nothing_on() -> None:
    rows = list(DIAMOND.rows)
    rows[3] = row("lower", 0, 0, "down")  # whatever came in was rounded away
    found = replace(DIAMOND, rows=tuple(rows)).origin("end")
    assert [r.name for r in found] == ["up", "end"]


def test_another_grid_hands_on_what_no_code_shows() -> None:
    moved = replace(
        row("x", 0, 0),
        converted=replace(NARROW, scale=0.7 * NARROW.scales[0]),
        local=replace(apart(100, 0, 0), noise=1.0, max_abs=0.125),
        cumulative=replace(apart(100, 0, 0), noise=1.0, max_abs=0.125),
    )
    report = Report(rows=(moved, row("end", 0, 9, "x")))
    assert moved.off_grid
    assert not any(r.off_grid for r in DIAMOND.rows)
    assert str(report.origin("end")).splitlines()[0] == (
        "x: another grid, no code differs, but values do by up to 0.12; 0 differ by now"
    )
    assert "- on another grid, where no code differs but values do: x (" in str(report)
    assert "<li>on another grid, where no code differs but values do: x (" in report.to_html()
    assert "on another grid" not in str(DIAMOND)


def test_born_right_here() -> None:
    assert [r.name for r in DIAMOND.origin("down")] == ["down"]
    only_local = Report(rows=(row("x", 3, 0),))
    assert [r.name for r in only_local.origin("x")] == ["x"]


def test_an_exact_row_has_no_origin() -> None:
    assert DIAMOND.origin("healthy") == ()
    assert str(DIAMOND.origin("healthy")) == "exact"
    with pytest.raises(UnknownNameError, match="lower"):
        DIAMOND.origin("lowest")


BEFORE = Discrepancy(elements=100, differing=40, max_lsb=3, signal=1000.0, noise=10.0)
FIRST = Culprit("conv1", BEFORE, replace(BEFORE, differing=10, noise=1.0))
SECOND = Culprit("fc", BEFORE, replace(BEFORE, differing=44, noise=12.0))
FOUND = replace(sample(), corrected=(FIRST, SECOND))


def test_culprits_want_to_be_asked_for() -> None:
    with pytest.raises(DataError, match="culprits=5") as caught:
        sample().culprits()
    assert isinstance(caught.value, ValueError)
    assert FOUND.culprits() == (FIRST, SECOND)
    assert FOUND.culprits(1) == (FIRST,)
    assert replace(FOUND, corrected=()).culprits() == ()


def test_figures_of_a_culprit() -> None:
    assert (FIRST.vanished, FIRST.share, FIRST.gain_db) == (30, 0.75, 10.0)
    assert SECOND.vanished == -4
    nothing = Culprit("x", Discrepancy(elements=8), Discrepancy(elements=8))
    assert (nothing.vanished, nothing.share, nothing.gain_db) == (0, 0.0, 0.0)


def test_culprits_in_text_html_and_json() -> None:
    line = (
        "conv1: corrected alone, 30 of 40 differing codes at the end vanish, SQNR 20.0 -> 30.0 dB"
    )
    assert f"culprits:\n- {line}\n- fc: corrected alone, -4 of 40" in str(FOUND)
    assert "<h2>Culprits</h2>" in FOUND.to_html()
    assert "30 of 40 differing codes" in FOUND.to_html()
    assert Report.from_json(FOUND.to_json()) == FOUND
    assert "culprits" not in str(sample())
    assert "Culprits" not in sample().to_html()
    assert Report.from_json(sample().to_json()).corrected is None
    nobody = replace(FOUND, corrected=())
    assert Report.from_json(nobody.to_json()) == nobody


def test_merging_adds_up_what_was_corrected_in_both() -> None:
    merged = FOUND.merge(replace(FOUND, corrected=(SECOND,)))
    assert merged.culprits() == (SECOND + SECOND,)
    assert merged.culprits()[0].before.differing == 80
    assert FOUND.merge(sample()).corrected is None

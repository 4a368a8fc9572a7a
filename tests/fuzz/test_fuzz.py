"""The machine that looks for findings: it draws, replays, shrinks, and sees what it should."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.fuzz import __main__ as fuzz
from tests.fuzz import properties
from tests.fuzz.properties import Outcome, Subject, outcome_of
from tests.fuzz.specs import Spec, drawn
from tests.strategies import Plan, Recipe, Step

FOUND = sorted((Path(__file__).parent / "found").glob("*.json"))
PLAIN = Spec(Plan((Step("keep"), Step("function", (("name", "relu"),))), "image", 0), Recipe(True))


def test_a_seed_always_draws_the_same_specs() -> None:
    first = drawn(3)
    assert first == drawn(3)
    assert len(set(first)) > 10
    assert [Spec.from_json(s.to_json()) for s in first] == first


def test_a_healthy_model_has_no_findings() -> None:
    found = outcome_of(PLAIN)
    assert found.key
    assert found == Outcome(found.key)


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.stem)
def test_what_was_found_is_repaired(path: Path) -> None:
    given = json.loads(path.read_text(encoding="utf-8"))
    found = outcome_of(Spec.from_json(json.dumps(given["spec"])))
    assert found.findings == {}
    assert found.key, found.torch


def _raises(s: Subject) -> None:
    raise KeyError("raw")


def _perturbs(s: Subject) -> None:
    s.prepared.training = not s.prepared.training


def test_crashes_and_perturbations_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(properties, "PROPERTIES", {"raises": _raises, "perturbs": _perturbs})
    found = outcome_of(PLAIN).findings
    assert found["raises"].startswith("KeyError in ")
    assert found["perturbs perturbs"] == "prepared :training"


class Ends(fuzz.Child):
    """A child that aborts wherever a spec has a relu."""

    def run(self, spec: Spec) -> Outcome:
        relu = any(dict(s.options).get("name") == "relu" for s in spec.plan.steps)
        return Outcome(findings={"process": "ended with status -6"}) if relu else Outcome("key")


def test_a_finding_gets_smaller() -> None:
    kind = "process: ended with status -N"
    smallest = fuzz.shrink(PLAIN, kind, Ends())
    assert [s.kind for s in smallest.plan.steps] == ["function"]
    assert smallest.images == 1


@pytest.mark.slow
def test_a_child_that_ends_is_a_finding() -> None:
    child = fuzz.Child()
    process = child._started()
    os.kill(process.pid, 9)
    process.wait()
    found = child.run(PLAIN)
    assert found.findings == {"process": "ended with status -9"}
    assert child.run(PLAIN).findings == {}  # another one took its place
    child.stop()


def test_a_finding_is_saved_with_its_spec(tmp_path: Path) -> None:
    path = fuzz.save(PLAIN, "kind", tmp_path / "new")
    assert fuzz.replay(path) == 0
    assert Spec.from_json(json.dumps(json.loads(path.read_text())["spec"])) == PLAIN


def test_distinct_models_are_counted_once() -> None:
    tally = fuzz.Tally()
    for outcome in (Outcome("a"), Outcome("a"), Outcome("b", findings={"p": "3 of 4"}), Outcome()):
        tally.add(PLAIN, outcome)
    assert (tally.keys, tally.counts["passed"], tally.counts["torch fails"]) == ({"a", "b"}, 1, 1)
    assert list(tally.found) == ["p: N of N"]


def test_a_ledger_counts_each_model_once(tmp_path: Path) -> None:
    spec = PLAIN
    for _ in range(2):
        tally = fuzz.Tally(ledger=tmp_path / "ledger")
        tally.add(spec, Outcome(key="a"))
        tally.add(spec, Outcome(key="b", findings={"crash": "at 3"}))
        assert (len(tally.keys), tally.counts["passed"], tally.counts["found"]) == (2, 1, 1)
        assert tally.counts[spec.flow] == 2
    assert len((tmp_path / "ledger").read_text().splitlines()) == 2

"""The mutants themselves: which tokens are changed, and the list of those that are equal."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("cosmic_ray")

from tests.mutants.__main__ import GROUPS, files, sampled  # behind importorskip
from tests.mutants.equivalent import EQUIVALENT
from tests.mutants.run import ROOT, Profile, _statement
from tests.mutants.sites import mutants

SOURCE = '''"""Text with 1 + 2."""
LIMIT = 3
PART = 0.5
PLACE = 30


def judged(a: int, b: int = 1) -> bool:
    """Not 4 < 5."""
    if not a:
        raise ValueError(f"{a + 1}" + str(b - 2))
    said = "a" + str(b)
    return a < b and said is not None or a in (b, -7)
'''


def test_one_token_is_changed(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(SOURCE, encoding="utf-8")
    found = [m for token in mutants("module.py", tmp_path) for m in token]
    assert [m.change(tmp_path)[1] for m in found] == [
        "LIMIT = 4",
        "LIMIT = 2",
        "def judged(a: int, b: int = 2) -> bool:",
        "def judged(a: int, b: int = 0) -> bool:",
        "if a:",
        "return a <= b and said is not None or a in (b, -7)",
        "return a >= b and said is not None or a in (b, -7)",
        "return a < b or said is not None or a in (b, -7)",
        "return a < b and said is None or a in (b, -7)",
        "return a < b and said is not None and a in (b, -7)",
        "return a < b and said is not None or a not in (b, -7)",
        "return a < b and said is not None or a in (b, 7)",
        "return a < b and said is not None or a in (b, - 8)",
        "return a < b and said is not None or a in (b, - 6)",
    ]
    for mutant in found:
        compile(mutant.source(tmp_path), "module.py", "exec")


def test_a_seed_gives_one_sample() -> None:
    modules = files("fxqfix/checks")[:2]
    one, two, other = (sampled(modules, 20, seed) for seed in (1, 1, 2))
    assert one == two
    assert one != other
    assert len({(m.path, m.token) for m in one}) == 20


def test_equal_mutants_are_mutants_of_todays_code() -> None:
    modules = {key[0] for key in EQUIVALENT}
    sampled(sorted(modules), 1, 1)  # raises where one is none
    assert modules <= {module for place in GROUPS for module in files(place)}
    assert all(EQUIVALENT.values())


def test_every_group_has_its_tests() -> None:
    for place, tests in GROUPS.items():
        assert files(place)
        assert all((ROOT / test).exists() for test in tests)


def test_tests_of_a_line_come_first() -> None:
    path = "fxqfix/checks/ranges.py"
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    number = 1 + next(i for i, line in enumerate(lines) if line.startswith("    for tap in"))
    at = _statement(path, number)
    assert at == f"{path}:{number}"
    seconds = {"a::slow": 3.0, "a::fast": 1.0, "a::other": 0.1, "b::far": 0.1, "a::bad": 0.1}
    profile = Profile(seconds, {at: ["a::slow", "a::fast", "a::bad"]}, ["a::bad"])
    assert profile.order(path, number, 60) == ["a::fast", "a::slow", "a::other"]
    assert profile.order(path, number, 2) == ["a::fast"]
    assert profile.order(path, number, 0) == ["a::fast"]
    assert profile.order(path, 1, 60) == ["a::fast", "a::slow", "a::other"]  # on import
    assert profile.order("fxqfix/checks/modes.py", 1, 60) == []

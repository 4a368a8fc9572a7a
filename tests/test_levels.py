"""What `make levels` reads from the processes that it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import levels

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.engines.test_a" name="test_one"/>
<testcase classname="tests.engines.test_a" name="test_two"><failure message="no"/></testcase>
<testcase classname="" name="test_b.py::test_aborts"><error message="crash"/></testcase>
<testcase classname="tests.engines.test_a" name="test_four"><skipped message="no amx"/></testcase>
</testsuite></testsuites>"""


def test_a_crash_is_a_failure_of_its_test(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    path.write_text(JUNIT)
    outcome = levels.read(path, "")
    assert outcome.counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert outcome.failed == [
        "tests.engines.test_a::test_two",
        "test_b.py::test_aborts",
    ]
    assert outcome.skipped == {"no amx": 1}
    assert not outcome.ok
    assert not levels.Outcome({"passed": 0}, [], {}, "").ok  # nothing ran


def test_levels_that_no_process_had_are_named() -> None:
    assert levels.missing("vnni vnni avx512") == (
        "onednn avx2, avx2_vnni, avx512, amx; fbgemm avx2; aten default, avx2"
    )
    caps = ["avx2 avx2 avx512", "avx2_vnni vnni avx2", "avx512 vnni default", "amx vnni avx512"]
    assert levels.missing("vnni vnni avx512", *caps) == ""


def test_caps_of_this_process_do_not_reach_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert "ONEDNN_MAX_CPU_ISA" not in levels.environment()
    assert levels.environment({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"})["ONEDNN_MAX_CPU_ISA"] == (
        "AVX512_CORE"
    )

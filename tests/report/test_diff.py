from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fxqfix.errors import PairingError, WriteError
from fxqfix.report import Report
from tests.report import samples


def repaired() -> Report:
    report = samples.sample()
    same = samples.apart(3072, 0)
    first = replace(report.rows[0], local=same, cumulative=same, causes={})
    return replace(report, rows=(first, *report.rows[1:]))


def test_what_changed_is_listed_and_nothing_else() -> None:
    found = samples.sample().diff(repaired(), ("epoch 3", "epoch 9"))
    assert found.changed == ("x",)
    lines = str(found).splitlines()
    assert lines[0] == "epoch 3: not ok, differs in 4 of 5 rows, 2 sites left out"
    assert lines[1] == "epoch 9: not ok, differs in 3 of 5 rows, 2 sites left out"
    assert lines[-1].split() == [
        "x", "12", "->", "0", "12", "->", "0", "41.1", "->", "exact", "range-lost", "12", "->",
        "none",
    ]  # fmt: skip


def test_rows_of_one_side_stay_in_sight() -> None:
    report = samples.sample()
    found = report.diff(replace(report, rows=report.rows[1:]))
    assert found.changed == ("x",)
    assert found.pairs[-1] == (report.rows[0], None)


def test_reports_of_other_models_are_refused() -> None:
    for other in (samples.many(3), "report.json"):
        with pytest.raises(PairingError, match="diff"):
            samples.sample().diff(other)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["to_html", "to_json", "to_csv", "to_dot"])
def test_a_path_that_cannot_be_written(tmp_path: Path, method: str) -> None:
    write = getattr(samples.sample(), method)
    file = tmp_path / "file"
    write(file)
    before = file.read_bytes()
    for path in (tmp_path, tmp_path / "none" / "x", file / "x"):
        with pytest.raises(WriteError, match=f"Report.{method}"):
            write(path)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    link = tmp_path / "link"
    link.symlink_to(file)
    write(link)  # of a link the target is written
    assert link.is_symlink()

"""compare on a part of the data, and without some of its branches."""

from __future__ import annotations

import pytest

import fxqfix
from fxqfix.errors import OptionError
from fxqfix.report import Report
from tests.faults.injectors import INJECTORS, Fault


@pytest.fixture(scope="module")
def fault() -> Fault:
    return INJECTORS["scale-formula"]()


def compared(fault: Fault, batches: int, **options: object) -> Report:
    data = [(1 + i / 8) * fault.batches[0] for i in range(batches)]
    return fxqfix.compare(fault.prepared, fault.converted, data, **options)  # type: ignore[arg-type]


def test_causes_of_the_first_batches_alone(fault: Fault) -> None:
    whole, part = compared(fault, 3), compared(fault, 3, attribute=1)
    first = compared(fault, 1)
    for row, mine, one in zip(whole.rows, part.rows, first.rows, strict=True):
        assert (mine.local, mine.cumulative, mine.differing) == (
            row.local,
            row.cumulative,
            row.differing,
        )
        assert sum(mine.causes.values()) == sum(row.causes.values())
        if row.kind != "weight":
            later = mine.causes.get("not-attributed", 0)
            assert later == row.differing - one.differing
        causes = {name: n for name, n in mine.causes.items() if name != "not-attributed"}
        assert causes == dict(one.causes)
    assert "causes are those of the first 1 of 3 batches" in str(part)
    assert "causes are those of the first 1 of 3 batches" in part.to_json()
    assert any("whose causes were not asked for" in reason for reason in part.left_out)
    assert not part.exact


def test_a_part_of_the_causes_is_not_judged_and_no_fault() -> None:
    healthy = INJECTORS["rounding"]()
    part = compared(healthy, 3, attribute=1)
    later = any("not-attributed" in row.causes for row in part.rows)
    assert part.verdict == ("not judged" if later else compared(healthy, 3).verdict)
    assert part.faults == compared(healthy, 3).faults


def test_cumulative_figures_alone(fault: Fault) -> None:
    whole, part = compared(fault, 2, noise_floor=False), compared(fault, 2, local=False)
    for row, mine in zip(whole.rows, part.rows, strict=True):
        assert mine.cumulative == row.cumulative
        if row.kind != "weight":
            assert mine.local is None
            assert not mine.causes
    assert part.verdict != "ok"
    assert Report.from_json(part.to_json()) == part
    for render in (str, Report.summary, Report.to_html, Report.to_dot, Report.to_csv):
        assert render(part)


def test_the_noise_floor_of_the_first_batch(fault: Fault) -> None:
    first, every, none = (compared(fault, 2, noise_floor=f) for f in ("first", "all", False))
    one = compared(fault, 1)
    for a, b, c, alone in zip(first.rows, every.rows, none.rows, one.rows, strict=True):
        assert a.noise_floor == alone.noise_floor
        assert c.noise_floor is None
        if b.noise_floor is not None:
            assert a.noise_floor is not None
            assert b.noise_floor.elements == 2 * a.noise_floor.elements
        assert a.local == b.local == c.local
    assert "the noise floor is that of the first of 2 batches" in str(first)
    assert "noise floor is that of" not in str(every)
    assert every == compared(fault, 2, noise_floor=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"noise_floor": "last"}, "no such noise floor"),
        ({"attribute": -1}, "attribute counts batches"),
        ({"culprits": 1, "local": False}, "to correct a site takes its shadow"),
    ],
)
def test_other_values_are_refused(fault: Fault, options: dict[str, object], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        compared(fault, 1, **options)

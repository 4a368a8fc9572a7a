from __future__ import annotations

import copy
import pickle
from dataclasses import asdict, replace

import pytest

from fxqfix.errors import PairingError, UnknownNameError
from fxqfix.report import Report
from tests.report import samples

SAMPLE = samples.sample()


def test_report_survives_pickle_copy_and_hash() -> None:
    for twin in (pickle.loads(pickle.dumps(SAMPLE)), copy.deepcopy(SAMPLE)):
        assert twin == SAMPLE
        assert hash(twin) == hash(SAMPLE)
    assert asdict(SAMPLE)["rows"][0]["causes"] == {"range-lost": 12}


def test_row_keeps_no_hold_of_the_mapping_it_was_given() -> None:
    causes = {"rounding": 1}
    row = replace(SAMPLE.rows[0], causes=causes)
    causes["rounding"] = 2
    assert row.causes == {"rounding": 1}


def test_merge_adds_up_activations_and_keeps_weights() -> None:
    twice = SAMPLE.merge(replace(SAMPLE, notes=("observers were held still", "other data")))
    assert twice.batches == 6
    assert twice.notes == ("observers were held still", "other data")
    conv, once = twice.row("conv1"), SAMPLE.row("conv1")
    assert conv.cumulative == once.cumulative + once.cumulative
    assert conv.causes == {cause: 2 * count for cause, count in once.causes.items()}
    assert twice.row("conv1.weight") == SAMPLE.row("conv1.weight")


@pytest.mark.parametrize(
    "other",
    [
        Report(rows=()),
        replace(SAMPLE, engine="qnnpack"),
        replace(SAMPLE, rows=(replace(SAMPLE.rows[0], converted=samples.NARROW), *SAMPLE.rows[1:])),
    ],
)
def test_merge_refuses_other_models(other: Report) -> None:
    with pytest.raises(PairingError, match="same two models"):
        SAMPLE.merge(other)


def test_merge_says_which_site_and_what_to_do() -> None:
    drifted = replace(SAMPLE.rows[0], converted=samples.NARROW)
    with pytest.raises(PairingError, match=r"site '(.*)': converted .*, and .* here") as caught:
        SAMPLE.merge(replace(SAMPLE, rows=(drifted, *SAMPLE.rows[1:])))
    assert SAMPLE.rows[0].name in str(caught.value)
    assert "broadcast buffers" in str(caught.value)
    with pytest.raises(PairingError, match=f"{len(SAMPLE.rows) - 1} rows, and {len(SAMPLE.rows)}"):
        SAMPLE.merge(replace(SAMPLE, rows=SAMPLE.rows[:-1]))


def test_row_is_found_by_name_or_module() -> None:
    assert SAMPLE.row("conv1") is SAMPLE.rows[2]
    renamed = replace(SAMPLE, rows=(replace(SAMPLE.rows[2], name="node", module="a.b"),))
    assert renamed.row("a.b").name == "node"
    with pytest.raises(UnknownNameError, match="conv1"):
        SAMPLE.row("conv")


def test_worst_and_shares() -> None:
    assert [row.name for row in SAMPLE.worst(3)] == ["conv1.weight", "x", "conv1"]
    assert SAMPLE.row("conv1.weight").local_share == 13 / 27
    assert SAMPLE.row("conv1").local_share == 57 / 16384
    assert SAMPLE.row("fc").cumulative_share == 0.2


def test_origin_is_where_the_error_was_born() -> None:
    assert [row.name for row in SAMPLE.origin("fc")] == ["conv1.weight", "conv1", "fc"]
    assert SAMPLE.origin("fc.weight") == ()
    assert [row.name for row in samples.many(4).origin("features_3_0")] == [
        "features_1_0",
        "features_2_0",
        "features_3_0",
    ]


def test_exact_needs_every_site_and_every_output() -> None:
    exact = samples.exact_sample()
    assert exact.exact
    assert exact.verdict == "ok"
    for less in (
        replace(exact, coverage=SAMPLE.coverage),
        replace(exact, rows=exact.rows[:2]),  # no output
        replace(exact, rows=exact.rows[2:]),  # no site
        Report(rows=()),
    ):
        assert not less.exact
        assert less.verdict == "not judged"
        assert less.left_out
    assert not SAMPLE.exact
    assert SAMPLE.unexplained == 0
    assert SAMPLE.coverage.ratio == 5 / 6

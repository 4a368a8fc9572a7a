"""The figures of the fault benchmark, on a part of it that takes a minute, and its bookkeeping."""

from __future__ import annotations

import functools

import pytest

from fxqfix.causes import registry
from fxqfix.qparams import zero_point_first
from tests.faults import benchmark
from tests.faults.benchmark import EVERYWHERE, OWN, Outcome, Trial, _natural, pairs, run, singles
from tests.faults.plants import PLANTS
from tests.faults.zoo import ARCHITECTURES, ENGINES

NOT_PLANTED = {
    *("requantization", "kernel-defect", "inplace-lost", "int16-saturation", "zero-point-cut"),
    "half-dequantize",
    "degenerate-scale",
    *("upstream", "unexplained"),
}


@functools.cache
def alone() -> tuple[Trial, ...]:
    """Two places of every plant, a third of the trials on engines."""
    return tuple(singles(most=2, thin=3))


@functools.cache
def together() -> tuple[Trial, ...]:
    """A fortieth of the pairs."""
    return tuple(pairs(thin=40))


def test_every_cause_is_planted_or_has_a_reason_not_to_be() -> None:
    planted = {plant.cause for plant in PLANTS.values()}
    assert planted | NOT_PLANTED == {cause.name for cause in registry()}
    said = str(benchmark.__doc__)
    assert all(f"`{name}`" in said for name in NOT_PLANTED)


def test_the_benchmark_is_large_enough() -> None:
    assert len(alone()) + 2 * len(together()) >= 300
    assert {t.architecture for t in alone()} == set(ARCHITECTURES)
    assert {t.engine for t in alone()} == {None, *ENGINES}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_single_fault_is_named_and_nothing_else(architecture: str) -> None:
    outcomes = [run(trial) for trial in alone() if trial.architecture == architecture]
    missed = [o.trial for o in outcomes if not all(hit for _, hit in o.named)]
    assert not missed
    assert {o.trial: set(o.false) for o in outcomes if o.false} == {}
    idle = [cause for o in outcomes for cause in o.idle]
    if not zero_point_first():  # native quantize rounds as fake-quantize does: planting it is idle
        idle = [cause for cause in idle if cause != "rounding"]
    assert len(idle) <= 4


def test_two_faults_at_a_time() -> None:
    total = benchmark.score(run(trial) for trial in together())[-1]
    assert total.faults >= 40
    assert total.recall >= 0.95
    assert total.precision >= 0.98


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_named_in_healthy_pairs(architecture: str) -> None:
    assert _natural(architecture, None) == frozenset()
    for engine in ENGINES:
        own = EVERYWHERE | OWN
        # An int8 pool keeps its input's grid; in a cat's group the prepared one shares the cat's.
        if architecture == "Inception":
            own = own | {"shared-qparams"}
        assert {cause for _, cause in _natural(architecture, engine)} <= own


def test_scores_by_hand() -> None:
    trial = Trial("MLP", None)
    outcomes = [
        Outcome(trial, (("a", True), ("b", False)), (), frozenset({("x", "a")}), frozenset()),
        Outcome(trial, (("a", True),), ("c",), frozenset({("y", "a")}), frozenset({("x", "b")})),
    ]
    a, b, c, total = benchmark.score(outcomes)
    assert (a.recall, a.precision, a.faults) == (1.0, 1.0, 2)
    assert (b.recall, b.precision, b.false) == (0.0, 0.0, 1)
    assert (c.faults, c.idle, c.recall) == (0, 1, 1.0)
    assert (total.named, total.faults, total.right, total.false) == (2, 3, 2, 1)
    assert benchmark.table([a], "tsv").split("\n")[1].split() == [
        *("a", "2", "100.0%", "0", "100.0%", "0")
    ]

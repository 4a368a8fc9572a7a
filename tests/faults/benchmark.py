"""How often a planted fault is named, and how often something else is: the figures of the docs.

`python -m tests.faults.benchmark` plants every cause in every small architecture, converted to the
decomposed form and for the four engines, alone and two at a time, and prints a table per cause.

The terms, so that the figures can't be read in more than one way:

- A *fault* is a cause planted at a site; its *rows* are those where its codes can differ: the site
  itself for other qparams, for an op in float or in train mode the ops that read the value.
- A fault has an *effect* where a code differs in one of its rows, planted alone. One without is no
  fault (a max pool of rounded values is the rounded max pool) and is counted apart.
- It is *named* where a row of its rows names its cause. Recall: named faults over faults.
- A *naming* is a cause in a row, codes or not. It is right where that cause was planted at that
  row, else a *false alarm*. `upstream` and `rounding` (any tie) are true everywhere and count as
  neither. For int8 models neither do the engines' own arithmetic (`OWN`), nor what the healthy pair
  names in that very row. Precision: right namings over right namings and false alarms.
- `unexplained` is a false alarm wherever it stands.

What is not planted here, because no architecture but some has it: `requantization` (a pool that
eager mode does not observe), `kernel-defect` (an op that an engine computes wrongly),
`inplace-lost` (an op that overwrites what a skip reads), `zero-point-cut` (an embedding with
float zero points), `half-dequantize` (a model in half precision) and `degenerate-scale` (a
normalized constant), planted in tests/faults/injectors.py;
`int16-saturation`, which needs a CPU without VNNI.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tabulate import tabulate

import fxqfix
from fxqfix._torch import quiet
from fxqfix.report import Report
from tests.faults.plants import PLANTS, Collision, Plot, places
from tests.faults.zoo import ARCHITECTURES, ENGINES, base

__all__ = ["Outcome", "Trial", "pairs", "run", "score", "singles", "table"]

EVERYWHERE = {"upstream", "rounding"}
OWN = {"range-lost", "requantization", "bias-int32", "int16-saturation", "kernel-defect"}

Planted = tuple[str, int]  # a key of PLANTS, and its place


@dataclass(frozen=True)
class Trial:
    """One comparison to make.

    Attributes:
        architecture: A key of `ARCHITECTURES`.
        engine: Engine to convert to; None for the decomposed form.
        faults: What is planted, and where; none for the healthy pair.
    """

    architecture: str
    engine: str | None
    faults: tuple[Planted, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes:
        trial: What was tried.
        named: (cause, whether it was named) of every fault that has an effect.
        idle: Causes of the faults without effect.
        right: (row, cause) of the namings that are right.
        false: (row, cause) of the false alarms.
    """

    trial: Trial
    named: tuple[tuple[str, bool], ...]
    idle: tuple[str, ...]
    right: frozenset[tuple[str, str]]
    false: frozenset[tuple[str, str]]


def _plot(trial: Trial) -> Plot:
    shifted = any(PLANTS[name].shifted for name, _ in trial.faults)
    plot = Plot(base(trial.architecture, trial.engine or "fbgemm", shifted), trial.engine)
    for name, place in trial.faults:
        PLANTS[name].put(plot, place)
    return plot


def _report(plot: Plot) -> Report:
    with quiet():  # torch's int8 cat warns where its inputs' grids differ
        found = fxqfix.compare(
            plot.prepared, plot.converted(), [plot.batch], engine=plot.engine, noise_floor=False
        )
    assert isinstance(found, Report)
    return found


@functools.cache
def _natural(architecture: str, engine: str | None) -> frozenset[tuple[str, str]]:
    """What the healthy pair names."""
    report = _report(_plot(Trial(architecture, engine)))
    return frozenset((row.name, cause) for row in report.rows for cause in row.causes)


@functools.cache
def run(trial: Trial) -> Outcome:
    """Plant, convert, compare, judge."""
    plot = _plot(trial)
    report = _report(plot)
    found = {(row.name, cause) for row in report.rows for cause in row.causes}
    planted = {(row, cause) for cause, rows in plot.planted.items() for row in rows}
    allowed = planted | (_natural(trial.architecture, trial.engine) if trial.engine else set())
    own = OWN if trial.engine else set()
    false = {x for x in found - allowed if x[1] not in EVERYWHERE | own}
    causes = [PLANTS[name].cause for name, _ in trial.faults]
    idle = {c for c in causes if not _has_effect(trial, plot, report, c)}
    named = [(c, bool({x for x in found & planted if x[1] == c})) for c in causes if c not in idle]
    return Outcome(trial, tuple(named), tuple(idle), frozenset(found & planted), frozenset(false))


def _has_effect(trial: Trial, plot: Plot, report: Report, cause: str) -> bool:
    if len(trial.faults) > 1:
        alone = next(f for f in trial.faults if PLANTS[f[0]].cause == cause)
        return not run(Trial(trial.architecture, trial.engine, (alone,))).idle
    rows = [row for row in report.rows if row.name in plot.planted[cause]]
    return any(row.cumulative.differing or (row.local and row.local.differing) for row in rows)


def singles(
    architectures: Iterable[str] = ARCHITECTURES, *, most: int = 3, thin: int = 1
) -> Iterator[Trial]:
    """One fault at a time.

    Args:
        architectures: Keys of `ARCHITECTURES`.
        most: Places per plant in the decomposed form; engines get one.
        thin: Of the trials on engines, every so manieth.
    """
    index = itertools.count()
    for architecture, engine in itertools.product(architectures, (None, *ENGINES)):
        for name, plant in PLANTS.items():
            if engine not in plant.engines:
                continue
            found = base(architecture, engine or "fbgemm", plant.shifted)
            for place in places(plant, found, most if engine is None else 1):
                if engine is None or next(index) % thin == 0:
                    yield Trial(architecture, engine, ((name, place),))


def pairs(architectures: Iterable[str] = ARCHITECTURES, *, thin: int = 1) -> Iterator[Trial]:
    """Two different causes at a time, at different sites, in the decomposed form.

    Args:
        architectures: Keys of `ARCHITECTURES`.
        thin: Of all pairs, every so manieth.
    """
    index = itertools.count()
    for architecture in architectures:
        for one, other in itertools.combinations(PLANTS, 2):
            plants = PLANTS[one], PLANTS[other]
            if plants[0].cause == plants[1].cause or any(None not in p.engines for p in plants):
                continue
            if next(index) % thin == 0:
                yield from _apart(architecture, one, other)


def _apart(architecture: str, one: str, other: str) -> Iterator[Trial]:
    """The first two places of two plants that leave each other alone."""
    shifted = PLANTS[one].shifted or PLANTS[other].shifted
    found = base(architecture, "fbgemm", shifted)
    options = (range(PLANTS[name].places(found)) for name in (one, other))
    for a, b in itertools.product(*options):
        trial = Trial(architecture, None, ((one, a), (other, b)))
        try:
            _plot(trial)
        except Collision:
            continue
        yield trial
        return


@dataclass(frozen=True)
class Score:
    """The figures of a cause, or of all of them.

    Attributes:
        cause: Its name.
        faults: Planted, with an effect.
        named: Of these, named.
        right: Namings that are right.
        false: False alarms of this cause.
        idle: Planted without effect.
    """

    cause: str
    faults: int
    named: int
    right: int
    false: int
    idle: int

    @property
    def recall(self) -> float:
        """Named over planted, 1.0 where nothing was."""
        return self.named / self.faults if self.faults else 1.0

    @property
    def precision(self) -> float:
        """Right namings over all, 1.0 where there are none."""
        return self.right / (self.right + self.false) if self.right + self.false else 1.0


def score(outcomes: Iterable[Outcome]) -> list[Score]:
    """The figures per cause, by name, and of all causes together at the end."""
    faults, named, right, false, idle = (Counter[str]() for _ in range(5))
    for outcome in outcomes:
        faults.update(cause for cause, _ in outcome.named)
        named.update(cause for cause, hit in outcome.named if hit)
        right.update(cause for _, cause in outcome.right)
        false.update(cause for _, cause in outcome.false)
        idle.update(outcome.idle)
    counts = faults, named, right, false, idle
    causes = sorted(faults | false | idle)
    rows = [Score(cause, *(count[cause] for count in counts)) for cause in causes]
    return [*rows, Score("all", *(count.total() for count in counts))]


def table(scores: Iterable[Score], fmt: str = "github") -> str:
    """The figures as a table."""
    heads = "cause", "planted", "recall", "false alarms", "precision", "without effect"
    rows = [
        (s.cause, s.faults, f"{s.recall:.1%}", s.false, f"{s.precision:.1%}", s.idle)
        for s in scores
    ]
    return tabulate(rows, headers=heads, tablefmt=fmt, colalign=("left", *["right"] * 5))


def main() -> None:
    """Run everything and print the tables."""
    for head, trials in (("one fault", singles()), ("two faults", pairs())):
        outcomes = [run(trial) for trial in trials]
        print(f"{head}: {len(outcomes)} comparisons\n\n{table(score(outcomes))}\n")
        for outcome in outcomes:
            missed = [cause for cause, hit in outcome.named if not hit]
            if missed or outcome.false:
                print(f"{outcome.trial}: missed {missed}, false alarms {sorted(outcome.false)}")
    healthy = [(a, e) for a in ARCHITECTURES for e in (None, *ENGINES)]
    own = EVERYWHERE | OWN
    alarms = {x: {c for _, c in _natural(*x)} - (own if x[1] else set()) for x in healthy}
    print(f"healthy pairs: {len(healthy)}; named beyond the engines' own arithmetic:")
    print({x: found for x, found in alarms.items() if found} or "nothing")


if __name__ == "__main__":
    main()

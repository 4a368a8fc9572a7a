"""Which deviations give a device's codes: each alone, then pairs, then the best that there is.

Hypotheses are first tried on some rows, those with most differences among them; only those that
give every code there are computed for all of the dump. What is named gives all of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxqfix.deviations._base import Change, Deviation, Recipe, changed
from fxqfix.deviations._floats import FloatSubject
from fxqfix.deviations._plain import PlainSubject
from fxqfix.deviations._separate import separation
from fxqfix.deviations._subject import Context, Counts, Subject
from fxqfix.deviations._weighted import WeightedSubject
from fxqfix.export.walk import Seen

__all__ = ["Found", "Hypothesis", "constant", "explain", "subject_of"]

_ROWS, _FEW = 96, 4
_MOST_PAIRS, _MOST_BEST = 40, 3


@dataclass(frozen=True)
class Hypothesis:
    """One deviation, or two together, and what they give.

    Attributes:
        deviations: The rows.
        changes: The variant of each.
        counts: Its codes against the device's, over the whole dump.
    """

    deviations: tuple[Deviation, ...]
    changes: tuple[Change, ...]
    recipe: Recipe
    counts: Counts | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the deviations."""
        return tuple(d.name for d in self.deviations)


@dataclass(frozen=True)
class Found:
    """What explains an op's codes.

    Attributes:
        named: Hypotheses that give every code; they are equal on these data.
        best: Where there is none: the one that leaves least, or None.
        separation: An input on which those that are named differ, in words.
        tried: How many hypotheses were computed.
    """

    named: tuple[Hypothesis, ...]
    best: Hypothesis | None
    separation: str
    tried: int


def constant(seen: Seen) -> float | None:
    """The one number that the device gives everywhere, where the reference gives several.

    Args:
        seen: An op whose codes differ.
    """
    wanted, found = seen.wanted, seen.found
    if not isinstance(wanted, Tensor) or found is None or not found.numel():
        return None
    first = found.flatten()[0]
    if bool((found != first).any()) or bool((wanted == wanted.flatten()[0]).all()):
        return None
    return float(first)


def subject_of(seen: Seen, context: Context) -> Subject:
    """An op under any recipe."""
    if seen.op.weight is not None and seen.op.output is not None:
        return WeightedSubject(seen, context)
    if isinstance(seen.wanted, Tensor) and seen.wanted.is_floating_point():
        return FloatSubject(seen, context)
    return PlainSubject(seen, context)


def explain(seen: Seen, context: Context, rows: Mapping[str, Deviation]) -> Found:
    """Try all deviations at one op.

    Args:
        seen: The op, whose codes differ.
        context: Its neighbours.
        rows: The deviations.
    """
    subject = subject_of(seen, context)
    singles = _singles(subject, [row for row in rows.values() if not row.last])
    few, some = _sampled(subject, _FEW), _sampled(subject, _ROWS)
    named = _complete(subject, singles, few, some)
    tried = len(singles)
    if not named:
        last = _singles(subject, [row for row in rows.values() if row.last])
        named, tried = _complete(subject, last, few, some), tried + len(last)
    pairs: list[Hypothesis] = []
    if not named and constant(seen) is not None:  # two clamps give one code by chance
        return Found((), None, "", tried)
    if not named:
        pairs = list(_pairs(subject, singles, few))
        tried += len(pairs)
        named = _complete(subject, pairs, few, some)[:_MOST_PAIRS]
    if named:
        kept = tuple(_distinct(named))
        return Found(kept, None, separation(seen, context, kept, subject_of), tried)
    return Found((), _best(subject, [*singles, *pairs], some), "", tried)


def _singles(subject: Subject, rows: Iterable[Deviation]) -> list[Hypothesis]:
    return [
        Hypothesis((row,), (change,), recipe)
        for row in rows
        for change in row.changes(subject)
        if (recipe := changed(Recipe(), change)) is not None
    ]


def _sampled(subject: Subject, most: int) -> Tensor:
    """Rows with most differences, and others spread over the dump, none twice."""
    differs = (subject.wanted != subject.found).sum(1)
    count = len(differs)
    if count <= most:
        return torch.arange(count)
    hot = differs.topk(most * 2 // 3).indices
    spread = torch.linspace(0, count - 1, most - len(hot)).long()
    kept: set[int] = {*hot.tolist(), *spread.tolist()}
    return torch.tensor(sorted(kept))


def _complete(
    subject: Subject, hypotheses: Iterable[Hypothesis], few: Tensor, some: Tensor
) -> list[Hypothesis]:
    """Those that give every code."""
    left = list(hypotheses)
    for rows in (few, some, None):
        counted = [(h, subject.counts(h.recipe, rows)) for h in left]
        left = [
            Hypothesis(h.deviations, h.changes, h.recipe, counts)
            for h, counts in counted
            if counts is not None and counts.complete
        ]
    return left


def _pairs(subject: Subject, singles: list[Hypothesis], few: Tensor) -> Iterator[Hypothesis]:
    """Two of different fields; one that changes nothing at all is not worth a pair."""
    moving = []
    for h in singles:
        codes = subject.codes(h.recipe, few)
        if codes is None:
            continue
        moving.append(h)
    for a, b in itertools.combinations(moving, 2):
        if a.deviations == b.deviations or not subject.worth(a.changes[0], b.changes[0]):
            continue
        recipe = changed(a.recipe, b.changes[0])
        if recipe is not None:
            yield Hypothesis(a.deviations + b.deviations, a.changes + b.changes, recipe)


def _distinct(named: list[Hypothesis]) -> Iterator[Hypothesis]:
    """One per set of deviations."""
    seen: set[tuple[str, ...]] = set()
    for h in named:
        if h.names not in seen:
            seen.add(h.names)
            yield h


def _best(subject: Subject, hypotheses: list[Hypothesis], some: Tensor) -> Hypothesis | None:
    """The one that leaves least, if it leaves less than the reference does."""
    scored = []
    for index, h in enumerate(hypotheses):
        counts = subject.counts(h.recipe, some)
        if counts is not None and counts.explained > counts.broken:
            scored.append((counts.left, len(h.deviations), index))
    whole = []
    for _, _, index in sorted(scored)[:_MOST_BEST]:
        h = hypotheses[index]
        counts = subject.counts(h.recipe)
        if counts is not None and counts.left < counts.differing:
            whole.append(Hypothesis(h.deviations, h.changes, h.recipe, counts))
    return min(whole, key=lambda h: (h.counts.left if h.counts else 0, len(h.names)), default=None)

"""Weights that are not this op's."""

from __future__ import annotations

from collections.abc import Iterator

from fxqfix.deviations._base import Change, Deviation
from fxqfix.deviations._solve import solved
from fxqfix.deviations._subject import Subject
from fxqfix.deviations._weighted import WeightedSubject

__all__ = ["DEVIATIONS"]


def _others(subject: Subject) -> Iterator[Change]:
    own = subject.op.weight
    for op in subject.context.parameters:
        other = op.weight if op.name != subject.op.name else None
        if own is not None and other is not None and other.shape == own.shape:
            yield {"w": f"op:{op.name}"}


def _solved(subject: Subject) -> Iterator[Change]:
    if isinstance(subject, WeightedSubject):
        subject.sums.solved = solved(subject)
        if subject.sums.solved is not None:
            yield {"w": "solved"}


PLACE = 70
DEVIATIONS = (
    Deviation(
        "weights-of-another-op",
        "computes with the weight of another op",
        "hand each op its own weight",
        _others,
    ),
    Deviation(
        "stale-weights",
        "computes with a weight that is none of these ops': its codes follow from other integers",
        "load the weight that the parameters hold",
        _solved,
        "some 32 outputs per channel for each weight of the channel",
        last=True,
    ),
)

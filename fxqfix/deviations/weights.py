"""Weights that are not this op's."""

from __future__ import annotations

from collections.abc import Iterator

from fxqfix.deviations._base import Change, Deviation
from fxqfix.deviations._subject import Subject

__all__ = ["DEVIATIONS"]


def _others(subject: Subject) -> Iterator[Change]:
    own = subject.op.weight
    for op in subject.context.parameters:
        other = op.weight if op.name != subject.op.name else None
        if own is not None and other is not None and other.shape == own.shape:
            yield {"w": f"op:{op.name}"}


DEVIATIONS = (
    Deviation(
        "weights-of-another-op",
        "computes with the weight of another op",
        "hand each op its own weight",
        _others,
    ),
)

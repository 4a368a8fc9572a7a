"""The streaming probe of what the models return: a discrepancy per output, bit by bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxqfix.measure.compared import differing, float_discrepancy
from fxqfix.measure.discrepancy import Discrepancy
from fxqfix.measure.run import tensors_of
from fxqfix.passes._shadow_modules import Local, check_shape

__all__ = ["OutputProbe", "Returned"]

# (name, its sums, its record, converted, prepared) of an output that differs.
Attribute = Callable[[str, "Returned", Local, Tensor, Tensor], None]


@dataclass
class Returned:
    """The sums of one output.

    Attributes:
        end: Which of the values that the model returns it is, or is a part of.
        local: Against the prepared tail on the converted model's codes; None where there is none.
        cumulative: Against the prepared model's own output.
        noise_floor: The nudged prepared model against the prepared model.
        either: Values that differ locally or cumulatively.
        not_attributed: Those of the batches for which no cause was asked.
    """

    end: int
    local: Discrepancy | None = None
    cumulative: Discrepancy = field(default_factory=Discrepancy)
    noise_floor: Discrepancy | None = None
    either: int = 0
    not_attributed: int = 0


class OutputProbe(nn.Module):
    """Adds up the discrepancies of what the models return, over batches.

    Args:
        attribute: Called for each output of a batch that differs; None to skip causes.
        most: For how many batches it is called.
        problem: Why outputs can't be compared, "" where they can.
        places: Where each value stands in what the prepared model returns.

    Attributes:
        found: One record per tensor that is returned.
        problem: Why outputs could not be compared, "" where all were.
        lacking: How many tensors less than the prepared model the converted one returns.
    """

    def __init__(
        self,
        attribute: Attribute | None,
        most: float = math.inf,
        problem: str = "",
        places: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self._where, self.lacking = places, 0
        self._attribute, self._most, self._batches = attribute, most, 0
        self.found: list[Returned] = []
        self.problem = problem

    def forward(
        self,
        converted: list[Any],
        prepared: list[Any],
        local: list[Local | None],
        nudged: list[Any] | None = None,
    ) -> None:
        """Take what the models return for one batch."""
        self._batches += 1
        if self.problem:
            return
        converted = _like(converted, prepared)
        theirs, mine = list(_tensors(converted)), list(_tensors(prepared))
        floors = list(_tensors(nudged or []))
        if len(theirs) != len(mine):
            self.problem = f"the prepared model returns {len(mine)} tensors, the converted one "
            self.problem += str(len(theirs))
            self.lacking = max(len(mine) - len(theirs), 0)
            return
        places = list(self._places(prepared, local))
        if not self.found:
            self.found = [Returned(end) for end, _ in places]
        for i, (sums, (_, record)) in enumerate(zip(self.found, places, strict=True)):
            floor = floors[i] if floors else None
            self._add(f"output {i}", sums, record, theirs[i], mine[i], floor)

    def _places(
        self, prepared: list[Any], local: list[Local | None]
    ) -> Iterator[tuple[int, Local | None]]:
        """The end and the record of each tensor; an end that gives several has no record."""
        for end, (value, record) in enumerate(zip(prepared, local, strict=True)):
            for _ in _tensors([value]):
                yield end, record if isinstance(value, Tensor) else None

    def _add(
        self,
        name: str,
        sums: Returned,
        record: Local | None,
        converted: Tensor,
        prepared: Tensor,
        nudged: Tensor | None,
    ) -> None:
        where = self._where[sums.end] if sums.end < len(self._where) else ""
        order = "; values are compared by key, else by position: are two of them swapped?"
        check_shape(f"{name}, returned at {where}" if where else name, prepared, converted, order)
        now = float_discrepancy(prepared, converted)
        sums.cumulative += now
        differs = differing(prepared, converted)
        if record is not None:
            here = float_discrepancy(record.value, converted)
            sums.local = here if sums.local is None else sums.local + here
            differs = differs | differing(record.value, converted)
        count = int(torch.count_nonzero(differs))
        sums.either += count
        if nudged is not None:
            floor = float_discrepancy(prepared, nudged)
            sums.noise_floor = floor if sums.noise_floor is None else sums.noise_floor + floor
        if not count or record is None or self._attribute is None:
            return
        if self._batches > self._most:
            sums.not_attributed += count
        else:
            self._attribute(name, sums, record, converted, prepared)


def _like(found: Any, like: Any) -> Any:
    """What a module returned, its dicts in the order of another's where their keys are the same."""
    if isinstance(found, Mapping) and isinstance(like, Mapping) and found.keys() == like.keys():
        return {key: _like(found[key], like[key]) for key in like}
    both = isinstance(found, (tuple, list)) and isinstance(like, (tuple, list))
    if both and len(found) == len(like):
        return [_like(a, b) for a, b in zip(found, like, strict=True)]
    return found


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors that are returned, dequantized."""
    for leaf in tensors_of(values):
        yield leaf.dequantize() if leaf.is_quantized else leaf

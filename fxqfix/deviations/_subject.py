"""One op of a device, under any recipe: what it would give, and how much of the dump that is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fxqfix.deviations._base import DUE, Change, Recipe
from fxqfix.deviations._layouts import arranged
from fxqfix.export import Parameters
from fxqfix.export.walk import Seen
from fxqfix.qparams import QParams, container_range

__all__ = ["Context", "Counts", "Subject"]

_OUTPUT = frozenset({"y_point", "relu", "clamp", "y_shift", "y"})


@dataclass(frozen=True)
class Context:
    """What an op's neighbours tell.

    Attributes:
        parameters: All ops.
    """

    parameters: Parameters


@dataclass(frozen=True)
class Counts:
    """How a recipe's codes compare with the device's.

    Attributes:
        elements: Codes compared.
        explained: Of the codes that differ from the reference: those that the recipe gives.
        differing: Codes that differ from the reference.
        broken: Codes that are the reference's and that the recipe would change.
    """

    elements: int
    explained: int
    differing: int
    broken: int

    @property
    def complete(self) -> bool:
        """Whether the recipe gives every code."""
        return self.explained == self.differing and not self.broken

    @property
    def left(self) -> int:
        """Codes that the recipe does not give."""
        return self.differing - self.explained + self.broken


class Subject(ABC):
    """An op whose codes differ.

    Codes are looked at in rows: all channels of an output position, or one element.

    Args:
        seen: The op on the device's own inputs.
        context: Its neighbours.
    """

    handles: frozenset[str] = _OUTPUT

    def __init__(self, seen: Seen, context: Context) -> None:
        assert isinstance(seen.wanted, Tensor)
        assert seen.found is not None
        self.seen, self.context = seen, context
        self.op, self.reference = seen.op, seen.reference
        self.wanted, self.found = self.in_rows(seen.wanted), self.in_rows(seen.found)
        self._found: dict[str, Tensor | None] = {DUE: self.found}

    @property
    def grid(self) -> QParams:
        """The grid of the result."""
        assert self.op.output is not None
        return self.op.output

    @property
    def point(self) -> int:
        """The result's zero point."""
        return int(self.grid.zero_points[0])

    @cached_property
    def limits(self) -> tuple[int, int]:
        """What the reference clamps to."""
        low, high = self.op.limits or self.grid.container
        return (max(low, self.point), high) if self.reference.relu else (low, high)

    @abstractmethod
    def in_rows(self, value: Tensor) -> Tensor:
        """A result of the op as (rows, channels)."""

    @abstractmethod
    def whole(self, recipe: Recipe, rows: Tensor | None) -> Tensor | None:
        """Whole numbers with the zero point, not clamped; None where the recipe means nothing."""

    def spread(self, recipe: Recipe, rows: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The least and the largest whole number that float32 sums in some order give."""
        return None

    def worth(self, a: Change, b: Change) -> bool:
        """Whether the two together are tried."""
        return True

    def codes(self, recipe: Recipe, rows: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """Lowest and highest code that the recipe gives; one and the same but for `order`.

        Args:
            recipe: The recipe.
            rows: Which rows; None for all.
        """
        if recipe.order != DUE:
            bounds = self.spread(recipe, rows)
            if bounds is None:
                return None
            return self.finish(bounds[0], recipe), self.finish(bounds[1], recipe)
        whole = self.whole(recipe, rows)
        if whole is None:
            return None
        found = self.finish(whole, recipe)
        return found, found

    def finish(self, whole: Tensor, recipe: Recipe) -> Tensor:
        """Zero point, clamp and relu as the recipe has them; int64."""
        if recipe.y_point != DUE:
            whole = whole - self.point
        low, high = self._clamp(recipe)
        if recipe.clamp == "wrap":
            bottom, top = self.grid.container
            whole = (whole - bottom).remainder(top - bottom + 1) + bottom
        return whole.clamp(low, high).to(torch.int64) + recipe.y_shift

    def _clamp(self, recipe: Recipe) -> tuple[int, int]:
        low, high = self.op.limits or self.grid.container
        if recipe.clamp == "container":
            low, high = self.grid.container
        elif recipe.clamp == "declared":
            low, high = self.grid.quant_min, self.grid.quant_max
        elif recipe.clamp in ("int8", "uint8"):
            low, high = container_range(getattr(torch, recipe.clamp))
        relu = {"none": None, "zero": 0, "added": self.point}
        floor = relu.get(recipe.relu, self.point if self.reference.relu else None)
        return (low if floor is None else max(low, floor)), high

    def target(self, recipe: Recipe) -> Tensor | None:
        """The device's codes in rows, put right where the recipe has them lie otherwise."""
        if recipe.y not in self._found:
            assert self.seen.found is not None
            back = {"nchw-as-nhwc": "nhwc-as-nchw", "nhwc-as-nchw": "nchw-as-nhwc"}
            if recipe.y == "bytes":
                value = self._reread(self.seen.found)
            else:
                value = arranged(self.seen.found, back.get(recipe.y, recipe.y))
            self._found[recipe.y] = None if value is None else self.in_rows(value)
        return self._found[recipe.y]

    def _reread(self, found: Tensor) -> Tensor | None:
        """The bytes of a dump as codes of the op's own dtype; None where they are that already."""
        if found.is_floating_point() or self.op.output is None:
            return None
        low, high = self.op.output.container
        least, most = (int(n) for n in found.aminmax())
        other = (0, 255) if low < 0 else (-128, 127)
        if (low <= least and most <= high) or not other[0] <= least <= most <= other[1]:
            return None
        return (found.to(torch.int64) - low).remainder(high - low + 1) + low

    def matches(self, recipe: Recipe, rows: Tensor | None = None) -> Tensor | None:
        """Which of the device's codes the recipe gives."""
        target, codes = self.target(recipe), self.codes(recipe, rows)
        if target is None or codes is None:
            return None
        if rows is not None:
            target = target[rows]
        return (codes[0] <= target) & (target <= codes[1])

    def counts(self, recipe: Recipe, rows: Tensor | None = None) -> Counts | None:
        """The same, counted."""
        same = self.matches(recipe, rows)
        if same is None:
            return None
        wanted, found = self.wanted, self.found
        if rows is not None:
            wanted, found = wanted[rows], found[rows]
        differs = wanted != found
        differing = int(differs.sum())
        explained = int((same & differs).sum())
        return Counts(same.numel(), explained, differing, int((~same & ~differs).sum()))

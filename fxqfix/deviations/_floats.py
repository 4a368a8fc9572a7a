"""Ops that give floats under any recipe: dequantize, and what follows behind it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fxqfix.deviations._base import DUE, Recipe
from fxqfix.deviations._subject import Context, Subject
from fxqfix.export import Reference
from fxqfix.export.walk import Seen
from fxqfix.qparams import QParams

__all__ = ["FloatSubject"]


class FloatSubject(Subject):
    """Floats, compared by their values; of a dequantize the grid can be another one."""

    def __init__(self, seen: Seen, context: Context) -> None:
        super().__init__(seen, context)
        grid = self.reference.key == "dequantize" and self.op.input_qparams[0] is not None
        self.handles = frozenset({"x_point", "scale", "y"} if grid else {"y"})

    def in_rows(self, value: Tensor) -> Tensor:
        """One column of floats."""
        return value.reshape(-1, 1).double()

    @property
    def grid(self) -> QParams:
        """The grid of what is dequantized."""
        found = self.op.input_qparams[0]
        assert found is not None
        return found

    def whole(self, recipe: Recipe, rows: Tensor | None) -> Tensor | None:
        """The floats of the changed grid."""
        x = self.seen.inputs[0]
        if "scale" not in self.handles or not isinstance(x, Tensor):
            return self.wanted if rows is None else self.wanted[rows]
        grid = self.grid
        if recipe.x_point != DUE:
            grid = replace(grid, zero_point=0)
        if recipe.scale.startswith("of:"):
            other = self.context.parameters[recipe.scale.removeprefix("of:")].output
            grid = grid if other is None else replace(grid, scale=other.scale)
        elif recipe.scale == "one":
            grid = replace(grid, scale=1.0)
        op = replace(self.op, input_qparams=(grid,))
        found = Reference(op, self.reference.arithmetic).run(x)
        if not isinstance(found, Tensor):
            return None
        flat = found.reshape(-1, 1).double()
        return flat if rows is None else flat[rows]

    def finish(self, whole: Tensor, recipe: Recipe) -> Tensor:
        """Nothing is clamped."""
        return whole

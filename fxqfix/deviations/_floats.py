"""Dequantize under any recipe: what a device gives as floats."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fxqfix.deviations._base import DUE, Recipe
from fxqfix.deviations._subject import Subject
from fxqfix.export import Reference
from fxqfix.qparams import QParams

__all__ = ["FloatSubject"]


class FloatSubject(Subject):
    """A dequantize: floats, compared by their values."""

    handles = frozenset({"x_point", "scale", "y"})

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
        grid, x = self.grid, self.seen.inputs[0]
        if not isinstance(x, Tensor):
            return None
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

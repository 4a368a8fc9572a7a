"""What bn-training and dropout-training share: a module in train mode computes this site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxqfix.causes._base import Cause
from fxqfix.evidence.view import View

__all__ = ["TrainMode"]


@dataclass(frozen=True)
class TrainMode(Cause):
    """A module in train mode that a conversion runs in eval mode only.

    Looks for a module of one kind, in train mode, among those that compute this site.
    Counterfactual: the prepared op in eval mode, in float64; the codes that then agree, within
    float32 rounding and held in the declared range, are explained.

    Attributes:
        kind: The class of the modules to look for.
    """

    kind: Any = nn.Module

    def explains(self, view: View) -> Tensor | None:
        """Codes that the prepared op gives too once it is in eval mode."""
        if not self._found(view):
            return None
        # A lost range was asked before: what takes both corrections counts here.
        held = view.actual.clamp(view.grid.quant_min, view.grid.quant_max)
        return view.agrees(view.exact, view.grid, held)

    def evidence(self, view: View) -> str:
        """Which module is in train mode."""
        return f"{self._found(view)} is in train mode"

    def _found(self, view: View) -> str:
        return view.recompute.trains(self.kind) if view.recompute is not None else ""

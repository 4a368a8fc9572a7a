"""unexplained: what no cause accounts for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxqfix.causes._base import Cause
from fxqfix.causes._structure import edited, narrowed
from fxqfix.evidence.view import View

__all__ = ["CAUSE", "Unexplained"]


@dataclass(frozen=True)
class Unexplained(Cause):
    """Takes what is left, so that the shares add up to all differing codes.

    Behind what no row shows (a nested graph), the rest is not judged: a problem says so.
    """

    def explains(self, view: View) -> Tensor | None:
        """Everything; nothing behind what no row shows."""
        if view.unseen:
            view.problem = f"{', '.join(view.unseen)} quantizes inside: what that does is not known"
            return None
        return torch.ones_like(view.differs)

    def evidence(self, view: View) -> str:
        """Why a recomputation failed, or what only the converted model does; how far apart."""
        if view.problem:
            return view.problem
        largest = int((view.actual - view.expected).abs().max())
        parts = [f"up to {largest} codes apart on the same inputs", *edited(view)]
        if held := narrowed(view):
            parts.append(f"only the converted model holds its codes in {held}")
        return "; ".join(parts)


PLACE = 250
CAUSE = Unexplained(
    name="unexplained",
    summary="no known cause accounts for these codes",
    repair="",
    advice="report it with the model: an engine's arithmetic or a cause is missing",
    local=False,
)

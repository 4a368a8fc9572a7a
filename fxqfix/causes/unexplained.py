"""unexplained: what no cause accounts for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxqfix.causes._base import Cause
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
        """Why a recomputation failed, or the largest difference."""
        largest = int((view.actual - view.expected).abs().max())
        return view.problem or f"up to {largest} codes apart on the same inputs"


CAUSE = Unexplained(
    name="unexplained",
    summary="no known cause accounts for these codes",
    repair="",
    advice="report it with the model: an engine's arithmetic or a cause is missing",
    local=False,
)

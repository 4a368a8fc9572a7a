"""upstream: inherited from the inputs; the op itself adds nothing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxqfix.causes._base import Cause
from fxqfix.evidence.view import View

__all__ = ["CAUSE", "Upstream"]


@dataclass(frozen=True)
class Upstream(Cause):
    """Counterfactual: the same inputs; the codes that then agree are explained.

    Where an in-place op wrote over what the site reads, and its kernel writes in place too, that
    op's own codes are an input.
    """

    def explains(self, view: View) -> Tensor:
        """Codes that agree with the shadow and differ from the prepared model's own."""
        found = view.differs & ~view.differs_locally
        behind = view.recompute.behind if view.recompute is not None else ()
        return found | view.agrees_reading(behind) if behind else found

    def evidence(self, view: View) -> str:
        """Where to look."""
        return "inherited from earlier layers; see report.origin(name)"


PLACE = 240
CAUSE = Upstream(
    name="upstream",
    summary="the inputs differ already; with the same inputs the op gives the same codes",
    repair="",
    advice="look at the sites before this one: report.origin(name)",
    local=False,
    inherits=True,
)

"""not-lowered: the converted model stays in float where the prepared one quantizes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxqfix.causes._base import Cause
from fxqfix.evidence.view import View

__all__ = ["CAUSE", "NotLowered"]


@dataclass(frozen=True)
class NotLowered(Cause):
    """A value, or a weight, that the prepared model quantizes and the converted one doesn't.

    Looks for prepared sites without a converted partner among what computes this site.
    Counterfactual: the prepared op in float64, in float at those sites; the codes that then agree,
    within float32 rounding, are explained.
    """

    def explains(self, view: View) -> Tensor | None:
        """Codes that the prepared op gives too once it stays in float there."""
        if view.recompute is None or not view.recompute.own_floats:
            return None
        return view.corrected_by(self.name)

    def evidence(self, view: View) -> str:
        """What stays in float."""
        found = view.recompute.own_floats if view.recompute is not None else {}
        return (
            f"the converted model does not quantize {', '.join(name for name, _ in found.values())}"
        )


PLACE = 60
CAUSE = NotLowered(
    name="not-lowered",
    summary="the converted model computes in float where the prepared one quantizes",
    repair="to_decomposed",
    advice="convert with fxqfix.to_decomposed, or leave the op out of prepare's qconfig too",
)

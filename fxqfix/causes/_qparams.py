"""What the causes share that give a site, or one of its weights, other qparams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from fxqfix.causes._base import Cause
from fxqfix.evidence.steps import Step
from fxqfix.evidence.view import View
from fxqfix.qparams import QParams

__all__ = ["OtherQParams"]


@dataclass(frozen=True)
class OtherQParams(Cause):
    """A cause that makes steps on the way from the prepared to the converted qparams.

    Counterfactual: the prepared op with the qparams, of its output and of its weights, that all
    steps up to this cause's own lead to; the codes that then agree, within float32 rounding, are
    explained.
    """

    def explains(self, view: View) -> Tensor | None:
        """Codes that the prepared op gives too once it has these qparams."""
        if not any(step.cause == self.name for _, _, step in _steps(view)):
            return None
        return view.corrected_by(self.name)

    def evidence(self, view: View) -> str:
        """The qparams before and after, and what tells that this is the cause."""
        name, start, step = next(x for x in _steps(view) if x[2].cause == self.name)
        return f"{name}: fake-quant used {start}, conversion baked {step.reached}: {step.why}"


def _steps(view: View) -> Iterator[tuple[str, QParams, Step]]:
    """(site, qparams before, step): those of the output first, then those of the weights."""
    for name, start, steps in view.all_steps:
        for step in steps:
            yield name, start, step
            start = step.reached

"""kernel-defect: the engine's kernel computes something else than its op."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxqfix.causes._base import Cause
from fxqfix.evidence.view import View

__all__ = ["CAUSE", "KernelDefect"]


@dataclass(frozen=True)
class KernelDefect(Cause):
    """The op meets a row of the known-wrong kernels, and a probe shows that it is wrong here.

    Looks at int8 models only. Counterfactual: the op on the converted model's own integers, as it
    should be computed, gives other codes than the kernel: these are claimed before any cause is
    asked. Of a kernel whose effect the engine's arithmetic follows: it gives the prepared model's
    codes in float64, so whatever else the kernel gave is its own doing. Of a weight that the
    engine packs but can't unpack, all codes that differ. Of a kernel between this site and the ones
    before it: the codes that float64, rounded where the converted model is, doesn't give.
    """

    def claims(self, view: View) -> Tensor | None:
        """Codes that are not what the op makes of the converted integers."""
        if view.defect is None or not view.defect.present:
            return None
        if view.garbled:
            return view.differs_locally
        if view.between:
            return None
        return None if view.defect.emulated or view.local is None else view.miscomputed

    def explains(self, view: View) -> Tensor | None:
        """Codes that the op itself, on the converted integers, would have right."""
        if view.defect is None or not view.defect.present:
            return None
        if view.between:
            right = view.converted if view.requantized is None else view.requantized
            return ~view.agrees(right, view.target, view.raw)
        return view.agrees(view.converted, view.grid, view.expected)

    def evidence(self, view: View) -> str:
        """The row."""
        return str(view.defect)


PLACE = 190
CAUSE = KernelDefect(
    name="kernel-defect",
    summary="the engine's kernel is wrong for this op and these options",
    repair="avoid-defects",
    advice="convert with fxqfix.to_int8, or repair with fxqfix.repair: both bypass it",
)

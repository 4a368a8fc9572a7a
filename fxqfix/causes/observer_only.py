"""observer-only: the prepared model observes and doesn't quantize, so that its forward is float."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxqfix.causes._floats import InFloat
from fxqfix.dialects import Site
from fxqfix.evidence.view import View

__all__ = ["CAUSE", "ObserverOnly"]


@dataclass(frozen=True)
class ObserverOnly(InFloat):
    """A calibrated (PTQ) model holds observers: its forward is the float model's.

    Shows in the rows of the ops that read observed values or observed weights. Counterfactual: the
    prepared op on the prepared model's own inputs, with these quantized; the codes that then equal
    the converted model's are explained: they are what quantization itself costs at this op.
    Weights with grids by block stay in float in a frozen model too; there the prepared op with the
    converted weight is asked.
    """

    def explains(self, view: View) -> Tensor | None:
        """Codes that agree once the observed values, or the weights by block, are quantized."""
        found, blocked = InFloat.explains(self, view), view.blocked()
        if blocked is None:
            return found
        blocked = blocked & view.differs_locally
        return blocked if found is None else blocked | found

    def evidence(self, view: View) -> str:
        """The sites that are read in float."""
        own = view.recompute.own_blocks if view.recompute is not None else {}
        blocks = [f"{name}: a weight with grids by block stays in float" for name in own]
        return "; ".join(filter(None, (InFloat.evidence(self, view), *blocks)))

    def why(self, site: Site) -> str:
        """The source of the site's qparams, where it is an observer's."""
        alone = site.calibrated and "switched off" not in site.source
        return f"{site.source} quantizes nothing" if alone else ""


PLACE = 230
CAUSE = ObserverOnly(
    name="observer-only",
    summary="the prepared model only observes: this is what quantization itself costs",
    repair="freeze-qparams",
    advice="judge the quantized network by fxqfix.freeze(prepared), which quantizes these sites",
    local=False,
)

"""fake-quant-off: a fake-quant is switched off, so that the forward computes in float there."""

from __future__ import annotations

from dataclasses import dataclass

from fxqfix.causes._floats import InFloat
from fxqfix.dialects import Site

__all__ = ["CAUSE", "FakeQuantOff"]


@dataclass(frozen=True)
class FakeQuantOff(InFloat):
    """A fake-quant with fake_quant_enabled = 0: its value passes in float, conversion quantizes it.

    Shows in the rows of the ops that read the value. Counterfactual: the prepared op on the
    prepared model's own inputs, with these quantized; the codes that then equal the converted
    model's are explained.
    """

    def why(self, site: Site) -> str:
        """The source of the site's qparams, where it is a fake-quant that is off."""
        return site.source if site.calibrated and "switched off" in site.source else ""


PLACE = 220
CAUSE = FakeQuantOff(
    name="fake-quant-off",
    summary="a fake-quant is switched off: the prepared model computes in float, conversion not",
    repair="freeze-qparams",
    advice="prepared.apply(torch.ao.quantization.enable_fake_quant), or fxqfix.freeze(prepared)",
    local=False,
)

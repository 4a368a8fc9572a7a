"""other-qparams: the converted model holds qparams that nothing in the prepared model gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxqfix.causes._qparams import OtherQParams
from fxqfix.evidence.view import View

__all__ = ["CAUSE", "ForeignQParams"]


@dataclass(frozen=True)
class ForeignQParams(OtherQParams):
    """A scale or zero point that was edited, or that comes from another state of the model.

    Looks for converted qparams where the prepared quantizer is fixed (frozen) at others, where they
    reach beyond all that its observer has seen, where the model's observers are on and have not
    moved since the conversion, and for a weight whose codes are the prepared ones
    under another scale. Counterfactual: the prepared op with the converted qparams; the codes that
    then agree, within float32 rounding, are explained.
    """

    def explains(self, view: View) -> Tensor | None:
        """Codes that the prepared op gives too once it has these qparams."""
        if view.weight is not None and view.weight.relabelled:
            return torch.ones_like(view.differs)
        return OtherQParams.explains(self, view)


PLACE = 160
CAUSE = ForeignQParams(
    name="other-qparams",
    summary="the converted model holds qparams that nothing in the prepared model gives",
    repair="restore-qparams",
    advice="convert the very model that you compare (of a frozen one, the frozen one); "
    "fxqfix.repair puts its qparams back",
)

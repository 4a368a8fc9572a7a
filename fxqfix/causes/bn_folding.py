"""bn-folding: folding BatchNorm into the weight rounds differently than QAT's forward does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxqfix.causes._base import Cause
from fxqfix.evidence.view import View

__all__ = ["CAUSE", "BatchNormFolding"]


# What float32 is off by in the folded op and in the unfolded one: each about as much, twice over.
_REACH = 4.0


@dataclass(frozen=True)
class BatchNormFolding(Cause):
    """QAT computes conv, division, BatchNorm; conversion computes one folded conv.

    Looks for conv-BN modules of the prepared model. Counterfactual: the prepared op with its
    BatchNorm folded, in the same float32 arithmetic; the codes that then agree are explained. For
    the weight itself: the code lies on the other side of a tie that the two ways of folding round
    to either side.
    """

    def explains(self, view: View) -> Tensor | None:
        """Codes that the prepared op gives too once its BatchNorm is folded."""
        if view.weight is not None:
            if not view.weight.mine.folded or not view.grid.same_grid(view.target):
                return None
            return view.agrees(view.exact, view.grid, view.actual)
        if not any(pair.mine.folded for pair in view.weights.values()):
            return None
        # Both are roundings of one exact value: most sites have no code that can be either.
        near = view.agrees(view.exact, view.grid, view.actual, reach=_REACH)
        if not bool((near & view.left).any()):
            return None
        folded = view.folded
        return None if folded is None else view.actual == folded

    def evidence(self, view: View) -> str:
        """How many codes move when the BatchNorm is folded."""
        if view.folded is None:
            return "the folded weight lies within float32 rounding of a tie"
        moved = int(torch.count_nonzero(view.folded != view.expected))
        sample = "" if view.places.everywhere else " that were looked at"
        return f"folding moves {moved} of {view.expected.numel()} codes{sample} (first batch)"


PLACE = 50
CAUSE = BatchNormFolding(
    name="bn-folding",
    summary="BatchNorm folded into the weight rounds differently than QAT's unfolded forward",
    repair="fold-batchnorm",
    advice="judge the model by fxqfix.freeze(prepared), which is folded before conversion",
)

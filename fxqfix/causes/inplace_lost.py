"""inplace-lost: an op reads the value from before an in-place op wrote over it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxqfix.causes._base import Cause
from fxqfix.dialects._writes import Overwrite
from fxqfix.evidence.view import View

__all__ = ["CAUSE", "InplaceLost"]


@dataclass(frozen=True)
class InplaceLost(Cause):
    """The prepared model overwrites a value that is read later; the converted one keeps it.

    Most int8 kernels write a tensor of their own, `inplace=True` or not, and what reads the value
    behind the op (a skip) gets it as it was before. Looks for in-place ops of the prepared model
    between the site and its inputs. Counterfactual: the prepared op in float64, reading what was
    there before the write; the codes that then agree, within float32 rounding, are explained.
    """

    def explains(self, view: View) -> Tensor | None:
        """Codes that the prepared op gives too once nothing is overwritten."""
        if view.recompute is None or not view.recompute.before:
            return None
        reads, behind = view.recompute.before, view.recompute.behind
        # With two such ops, either alone may be lost.
        ways = [reads] + [(read,) for read in reads if len(reads) > 1]
        best = max((view.agrees_reading(way) for way in ways), key=torch.count_nonzero)
        if not behind:
            return best
        # Some kernels do write in place (relu): then the op's own codes are read.
        kept = view.agrees_reading(behind)
        return best if torch.count_nonzero(best) > torch.count_nonzero(kept) else None

    def evidence(self, view: View) -> str:
        """The in-place ops, and what reads behind them."""
        uses = view.recompute.own_overwrites if view.recompute is not None else ()
        return "; ".join(_sentence(use) for use in uses)


def _sentence(use: Overwrite) -> str:
    op = f"{use.op.name} ({use.op.target})" if use.op.op == "call_module" else use.op.name
    return f"{op} writes {use.value.name} in place, {use.reader.name} reads it later"


PLACE = 20
CAUSE = InplaceLost(
    name="inplace-lost",
    summary="a value is read after an in-place op wrote over it; converted, what was there before",
    repair="explicit-writes",
    advice="convert fxqfix.freeze(prepared) or with fxqfix.to_int8, or repair with fxqfix.repair: "
    "the reader then reads the op's result; of an eager model, write the op without inplace",
)

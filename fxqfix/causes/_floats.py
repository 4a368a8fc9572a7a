"""What the causes share that leave a site of the prepared model in float."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxqfix.causes._base import Cause
from fxqfix.dialects import Site
from fxqfix.evidence.view import View

__all__ = ["InFloat"]


@dataclass(frozen=True)
class InFloat(Cause):
    """The prepared forward takes a value, or a weight, in float that the conversion quantizes.

    Shows in the rows of the ops that read such a value: its own codes are its codes in both models.
    Counterfactual: the prepared op on the prepared model's own inputs, with those quantized that
    this cause, or one before it, leaves in float; the codes that then equal the converted model's
    are explained.
    """

    def explains(self, view: View) -> Tensor | None:
        """Codes that the prepared op gives too once its inputs and weights are quantized."""
        mine = [name for name, site in view.loose.items() if self.why(site)]
        return view.once_quantized(mine) if mine else None

    def evidence(self, view: View) -> str:
        """The sites that are read in float."""
        return "; ".join(f"{site.name}: {self.why(site)}" for site in self.sites(view))

    def sites(self, view: View) -> list[Site]:
        """Those of the site's inputs and weights that this cause leaves in float."""
        return [site for site in view.loose.values() if self.why(site)]

    def why(self, site: Site) -> str:
        """What tells that this cause leaves a site in float; "" where it doesn't."""
        raise TypeError(f"{type(self).__name__} has no counterfactual")

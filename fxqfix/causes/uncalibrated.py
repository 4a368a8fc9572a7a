"""uncalibrated: an observer never saw data, and conversion bakes scale 1, zero point 0."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxqfix.causes._floats import InFloat
from fxqfix.causes._qparams import OtherQParams
from fxqfix.dialects import Site
from fxqfix.evidence.view import View

__all__ = ["CAUSE", "Uncalibrated"]


@dataclass(frozen=True)
class Uncalibrated(OtherQParams, InFloat):
    """An observer with min=inf, max=-inf has no qparams: conversion bakes scale 1, zero point 0.

    A fused fake-quant that never saw data quantizes with another scale, 0.1 in its kernel, and
    shows in its own row. Counterfactual: the prepared op with the converted qparams. An observer
    passes the value in float, and shows in the rows of the ops that read it. Counterfactual: the
    prepared op on the prepared model's own inputs, quantized as the conversion does. The codes that
    then agree are explained.
    """

    def explains(self, view: View) -> Tensor | None:
        """Codes that agree once the prepared model has the qparams that nobody observed."""
        baked = OtherQParams.explains(self, view)
        found = InFloat.explains(self, view)
        if baked is None:
            return found
        baked = baked & view.differs_locally
        return baked if found is None else baked | found

    def evidence(self, view: View) -> str:
        """The qparams that are baked."""
        if self.sites(view):
            return InFloat.evidence(self, view)
        return OtherQParams.evidence(self, view)

    def why(self, site: Site) -> str:
        """What conversion bakes, where the site never saw data."""
        return "" if site.calibrated else f"never saw data, conversion bakes {site.baked}"


PLACE = 110
CAUSE = Uncalibrated(
    name="uncalibrated",
    summary="an observer never saw data: conversion bakes scale 1, zero point 0",
    repair="",
    advice="run calibration data that reaches this op through the prepared model, convert again",
    local=False,
)

"""shared-qparams: the kernel or the conversion picks the grid; the prepared op had its own."""

from __future__ import annotations

from dataclasses import dataclass

from fxqfix.causes._qparams import OtherQParams

__all__ = ["CAUSE", "SharedQParams"]


@dataclass(frozen=True)
class SharedQParams(OtherQParams):
    """The converted op has one grid to give, whatever the site's own quantizer holds.

    An int8 kernel hands its input's qparams on (cat: its first input's), or works its own out of
    them (addition and multiplication with a number; sigmoid and its like have a fixed one); a
    module that is called several times converts to one module with one output grid. Looks for
    converted qparams that come from there and that the site's own quantizer gives by no rule.
    Counterfactual: the prepared op with the converted qparams; the codes that then agree, within
    float32 rounding, are explained.
    """


PLACE = 120
CAUSE = SharedQParams(
    name="shared-qparams",
    summary="the kernel or the conversion picks the grid; the prepared model had another one",
    repair="to_decomposed",
    advice="convert with fxqfix.to_int8 or fxqfix.to_decomposed, which keep each site's own grid",
)

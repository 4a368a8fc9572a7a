"""shared-qparams: the converted op keeps its input's qparams, the prepared one had its own."""

from __future__ import annotations

from dataclasses import dataclass

from fxqfix.causes._qparams import OtherQParams

__all__ = ["CAUSE", "SharedQParams"]


@dataclass(frozen=True)
class SharedQParams(OtherQParams):
    """An int8 kernel hands its input's qparams on (cat: its first input's); the model had others.

    Looks for converted qparams that are those of an input of the op and that the site's own
    quantizer gives by no rule. Counterfactual: the prepared op with the converted qparams; the
    codes that then agree, within float32 rounding, are explained.
    """


CAUSE = SharedQParams(
    name="shared-qparams",
    summary="the converted op keeps an input's qparams where the prepared model had others",
    repair="to_decomposed",
    advice="let the op share its input's observer, or convert with to_int8 or to_decomposed",
)

"""dropout-training: the prepared model drops values at random, the conversion none."""

from __future__ import annotations

from fxqfix import _torch
from fxqfix.causes._train_mode import TrainMode

__all__ = ["CAUSE"]

PLACE = 40
CAUSE = TrainMode(
    name="dropout-training",
    summary="the prepared model's dropout is in train mode; quantized dropout passes values on",
    repair="",
    advice="call prepared.eval() before you compare, and before you convert; eval() can't reach a "
    "call of F.dropout that a trace baked in: use nn.Dropout",
    kind=_torch.DROPOUT,
)

"""bn-training: BatchNorm normalizes by the batch, the conversion by running statistics."""

from __future__ import annotations

from fxqfix import _torch
from fxqfix.causes._train_mode import TrainMode

__all__ = ["CAUSE"]

PLACE = 30
CAUSE = TrainMode(
    name="bn-training",
    summary="the prepared model's BatchNorm is in train mode; conversion uses running statistics",
    repair="",
    advice="call prepared.eval() before you compare, and before you convert",
    kind=_torch.BATCH_NORM,
)

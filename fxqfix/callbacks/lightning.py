"""A callback for Lightning: ``pip install 'fxqfix[lightning]'``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxqfix import Monitor, _torch
from fxqfix._extras import require

__all__ = ["MonitorCallback"]

# Without the package this file can still be read: its docs, its types.
_Callback: Any = _torch.resolve("lightning.pytorch.Callback")


class MonitorCallback(_Callback or object):  # type: ignore[misc]  # its types are there where it is installed
    """Steps a monitor with the trainer, stops it, and keeps the history in checkpoints.

    Args:
        monitor: The monitor of the prepared model that the LightningModule holds.

    Raises:
        MissingDependencyError: The package is not installed.
    """

    def __init__(self, monitor: Monitor) -> None:
        require("lightning.pytorch", "lightning", "MonitorCallback")
        super().__init__()
        self.monitor = monitor

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Count the optimizer's steps: batches whose gradients are accumulated are one."""
        if self.monitor.step(trainer.global_step):
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        return self.monitor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the checkpoint stood."""
        self.monitor.load_state_dict(state)

"""A callback for Hugging Face's Trainer: ``pip install 'fxqfix[transformers]'``."""

from __future__ import annotations

from typing import Any

from fxqfix import Monitor, _torch
from fxqfix._extras import require

__all__ = ["MonitorCallback"]

# Without the package this file can still be read: its docs, its types.
_Callback: Any = _torch.resolve("transformers.TrainerCallback")


class MonitorCallback(_Callback or object):  # type: ignore[misc]  # its types are there where it is installed
    """Steps a monitor with the trainer, and stops it.

    Args:
        monitor: The monitor of the prepared model that the trainer trains.

    Raises:
        MissingDependencyError: The package is not installed.
    """

    def __init__(self, monitor: Monitor) -> None:
        require("transformers", "transformers", "MonitorCallback")
        super().__init__()
        self.monitor = monitor

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Behind every step of the optimizer; `state.global_step` goes on in resumed runs."""
        if self.monitor.step(state.global_step):
            control.should_training_stop = True

"""validate: a metric over a data set, on the device that the model is on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxqfix import _rng, _torch
from fxqfix._devices import device_of
from fxqfix._notebook import Shown
from fxqfix._settings import entry, read_as_given
from fxqfix.dialects.trace import call
from fxqfix.errors import DataError, OptionError
from fxqfix.measure.run import batches_of, progress_bar

__all__ = ["Validation", "accuracy", "validate"]

_WHERE = "validate"


@dataclass(frozen=True)
class Validation(Shown):
    """What `validate` found.

    Attributes:
        value: The metric over all samples.
        metric: Its name.
        samples: Number of samples, counted along the first axis of the outputs.
        batches: Number of batches.
        seconds: Wall time of the forward passes, the device's work included.
        device: Where the model ran.
        emulation: Engine, instruction set and threads that an emulated or deployed model holds for;
            empty for other models.

    Example:
        >>> print(Validation(0.9375, "accuracy", 32, 2, 0.5, "cpu"))
        accuracy 0.9375 over 32 samples in 2 batches, 64 samples/s on cpu
    """

    value: Any
    metric: str
    samples: int
    batches: int
    seconds: float
    device: str
    emulation: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Render in one line."""
        rate = f"{self.samples / self.seconds:.0f} samples/s" if self.seconds else "at once"
        value = f"{self.value:.4f}" if isinstance(self.value, float) else str(self.value)
        text = f"{self.metric} {value} over {self.samples} samples in {self.batches} batches, "
        text += f"{rate} on {self.device}"
        held = ", ".join(f"{name}={value}" for name, value in self.emulation.items())
        return f"{text}; {held}" if held else text


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of samples whose largest output is the target's class.

    Args:
        outputs: (N, classes, ...).
        targets: Class numbers, (N, ...).

    Returns:
        A float tensor without axes, in [0, 1].

    Raises:
        DataError: The targets are no class numbers of these outputs' shape.

    Example:
        >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1])).item()
        0.5
    """
    shape = [len(outputs), *outputs.shape[2:]] if isinstance(outputs, Tensor) else None
    found = list(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
    if shape is None or found != shape:
        raise DataError(
            "accuracy compares class numbers with outputs",
            where=_WHERE,
            found=f"targets {found}",
            expected="outputs (N, classes, ...)" if shape is None else f"targets {shape}",
            remedy="targets of another form: a function of (outputs, targets) as metric",
        )
    return (outputs.argmax(1) == targets).double().mean()


@entry
def validate(
    model: nn.Module, data: Iterable[Any], metric: Any, *, progress: bool | None = None
) -> Validation:
    """The metric of a model over a data set: of the deployed integers, where it is emulated.

    Made for what `emulate` and `as_deployed` return, on any device; takes any module. The model
    runs in eval mode and without gradients; modes and the random state are put back.

    Args:
        model: The model.
        data: Batches of (inputs, targets), a DataLoader say, read once. Inputs are a tensor, a
            tuple of arguments or a dict of keyword arguments; all are moved to the model's device.
        metric: "accuracy", the share of samples whose largest output is the target's class; a
            function of outputs and targets that gives a number, or one per sample, averaged over
            the samples; or an object with `update(outputs, targets)` and `compute()`, as those of
            torchmetrics.
        progress: Show a bar (needs tqdm); None shows it on a terminal only.

    Returns:
        The metric, with what it holds for.

    Raises:
        DataError: There is no batch, or one is no pair of inputs and targets.
        OptionError: The metric is neither a function nor such an object, or the function gives
            something else.
        DeviceError: The model's parts lie on several devices.

    Example:
        >>> import torch
        >>> x = torch.eye(4)
        >>> validate(torch.nn.Identity(), [(x, torch.arange(4))], "accuracy").value
        1.0
    """
    home, modes = device_of(model, _WHERE), {m: m.training for m in model.modules()}
    metric = accuracy if metric == "accuracy" else metric
    keeps = hasattr(metric, "update") and hasattr(metric, "compute")
    seen: Any = metric if keeps else _Mean(metric)
    samples = batches = 0
    seconds = 0.0
    with torch.no_grad(), _rng.same_rng():
        model.eval()
        try:
            for batch in read_as_given(progress_bar(batches_of(data, _WHERE), _WHERE, progress)):
                inputs, targets = _pair(batch, batches, home)
                start = time.perf_counter()
                outputs = call(model, inputs)
                _wait(home)
                seconds += time.perf_counter() - start
                seen.update(outputs, targets)
                samples, batches = samples + _count(outputs), batches + 1
        finally:
            for module, mode in modes.items():
                module.training = mode
        _check_seen(batches)
        value = seen.compute()
    name = str(getattr(metric, "__name__", type(metric).__name__))
    held = getattr(model, "emulation", None) or getattr(model, "meta", {}).get("emulation", {})
    return Validation(_plain(value), name, samples, batches, seconds, str(home), dict(held))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _check_seen(batches: int) -> None:
    if not batches:
        raise DataError("data holds no batch", where=_WHERE, expected="at least one batch")


def _wait(home: torch.device) -> None:
    if home.type == "cuda":
        torch.cuda.synchronize(home)


class _Mean:
    """A function's values, averaged over the samples."""

    def __init__(self, function: Any) -> None:
        if not callable(function):
            raise OptionError(
                "the metric can't be computed",
                where=_WHERE,
                found=type(function).__name__,
                expected='"accuracy", a function, or an object with update and compute',
            )
        self.function, self.total, self.samples = function, 0.0, 0

    def update(self, outputs: Any, targets: Any) -> None:
        """Take a batch."""
        count = _count(outputs)
        if not count:  # a batch of no samples
            return
        value = self.function(outputs, targets)
        tensor = torch.as_tensor(value, dtype=torch.float64) if _counts(value) else None
        if tensor is None or tensor.numel() not in (1, count):
            raise OptionError(
                "the metric can't be averaged",
                where=_WHERE,
                found=type(value).__name__
                + (f" of shape {list(value.shape)}" if isinstance(value, Tensor) else ""),
                expected=f"a number, or one for each of the batch's {count} samples",
            )
        self.total += float(tensor.mean()) * count
        self.samples += count

    def compute(self) -> float:
        """The average."""
        return self.total / self.samples if self.samples else float("nan")


def _counts(value: Any) -> bool:
    return isinstance(value, Tensor | float | int)


def _pair(batch: Any, index: int, home: torch.device) -> tuple[Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise DataError(
            "a batch is no pair",
            where=f"{_WHERE}, batch {index}",
            found=type(batch).__name__ + (f" of {len(batch)}" if hasattr(batch, "__len__") else ""),
            expected="(inputs, targets)",
            remedy="several inputs go into a tuple of their own: ((a, b), targets)",
        )
    inputs, targets = _torch.tree_map_tensors(lambda t: t.to(home), tuple(batch))
    return inputs, targets


def _count(outputs: Any) -> int:
    found: list[Tensor] = []
    _torch.tree_map_tensors(found.append, outputs)
    return len(found[0]) if found and found[0].dim() else 1

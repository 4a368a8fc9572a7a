"""Monitor: what a model's conversion will lose, looked at while it trains."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import distributed, nn

from fxqfix import _rng, _torch, causes, checks
from fxqfix._notebook import Shown
from fxqfix._settings import entry
from fxqfix.dialects import unwrapped
from fxqfix.dialects._code import hooks
from fxqfix.dialects._wrappers import copied
from fxqfix.errors import (
    DataError,
    FxqfixError,
    OptionError,
    UnknownNameError,
    UnsupportedError,
    in_brief,
)
from fxqfix.flows._writers import writing
from fxqfix.flows.compare import compare
from fxqfix.flows.convert import convert_by_torch
from fxqfix.flows.freeze import freeze
from fxqfix.flows.lint import lint
from fxqfix.measure import batches_of
from fxqfix.names import Engine
from fxqfix.report import Report
from fxqfix.report import history as rendering
from fxqfix.report._files import save
from fxqfix.report.history import Check
from fxqfix.report.lint import LintReport

__all__ = ["Monitor"]

Condition = Collection[str] | Callable[[Check], bool] | None


class Monitor(Shown):
    """Looks at a prepared model every so many steps of its training.

    A look lints the model, freezes and converts a copy, and compares the two on a small batch. The
    model, its optimizer, its gradients and the random state stay as they are: training goes on as
    without it, bit for bit. A look that fails says so in `Check.problem`; training goes on.

    In a distributed run rank 0 looks, and all ranks get its answer: call `step` on every rank.

    Args:
        prepared: The model in training, FX or eager; also wrapped by DistributedDataParallel,
            DataParallel or torch.compile.
        data: Batches to compare on, a DataLoader included, or one batch; the first are read now
            and kept. A few samples do: a look takes as long as they do.
        every: Steps between two looks.
        writer: Where figures go: anything with `add_scalar` (TensorBoard's SummaryWriter), a
            `logging.Logger`, the path of a .csv file; None for the logger "fxqfix".
        stop_on: Names of causes and of lint's findings that should end the training, or a function
            of a `Check` that says whether to.
        warn_on: The same for a warning.
        batches: How many batches to keep.
        engine: The engine to convert for; None is torch.backends.quantized.engine.
        prefix: What the writer's tags begin with.

    Attributes:
        history: Every look, the oldest first.
        latest: The report of the last look; None where there is none.
        stopped: Why training should stop, "" where it need not.

    Raises:
        OptionError: `every` or `batches` is no count, or the writer is none.
        UnknownNameError: `stop_on` or `warn_on` names no cause and no finding.
        DataError: The data holds no batch.
        WriteError: The writer is a path that can't be written.
        UnsupportedError: A module has a forward hook of the user's.

    Example:
        >>> from torch.ao.quantization import get_default_qat_qconfig_mapping
        >>> from torch.ao.quantization.quantize_fx import prepare_qat_fx
        >>> x = torch.linspace(-1, 1, 16).reshape(2, 8)
        >>> net = nn.Sequential(nn.Linear(8, 2)).train()
        >>> prepared = prepare_qat_fx(net, get_default_qat_qconfig_mapping("fbgemm"), (x,))
        >>> monitor = Monitor(prepared, x, every=2, stop_on={"kernel-defect"}, engine="fbgemm")
        >>> for _ in range(4):
        ...     _ = prepared(x).sum().backward()
        ...     if monitor.step():
        ...         break
        >>> [check.step for check in monitor.history]
        [2, 4]
    """

    def __init__(
        self,
        prepared: nn.Module,
        data: Iterable[Any],
        *,
        every: int = 100,
        writer: Any = None,
        stop_on: Condition = None,
        warn_on: Condition = None,
        batches: int = 1,
        engine: Engine | None = None,
        prefix: str = "fxqfix",
    ) -> None:
        for name, value in (("every", every), ("batches", batches)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(
                    f"{name} is no count", where="Monitor", found=repr(value),
                    expected="a whole number, 1 or more",
                )  # fmt: skip
        _refuse_hooks(prepared)
        self.prepared, self.every, self.engine = prepared, every, engine
        self._stop_on, self._warn_on = _condition(stop_on), _condition(warn_on)
        self._data = _first(data, batches)
        self._leads = _rank() == 0
        self._write = writing(writer, prefix) if self._leads else None
        self._writer, self._prefix = writer, prefix
        self.history: list[Check] = []
        self.latest: Report | None = None
        self.stopped = ""
        self._step = 0
        self._last = 0
        self._spent = 0.0
        self._started = time.perf_counter()

    def step(self, step: int | None = None) -> bool:
        """Count one step of the optimizer, and look where one is due.

        Args:
            step: The number of the step, for loops that count (resumed ones too); None counts the
                calls. A number that was seen last is passed over, so that loops that accumulate
                gradients may call it for every batch.

        Returns:
            Whether training should stop.
        """
        self._step = self._step + 1 if step is None else step
        if self._step and self._step % self.every == 0 and self._step != self._last:
            self.check()
        return bool(self.stopped)

    def check(self) -> Check:
        """Look now.

        Returns:
            What was seen. On the other ranks of a distributed run it holds rank 0's answer alone.
        """
        self._last = self._step
        seen = self._look() if self._leads else Check(self._step, 0.0)
        self.stopped = _from_rank_0(seen.stop) or self.stopped
        if self._leads:
            self.history.append(seen)
        return seen

    def _look(self) -> Check:
        start = time.perf_counter()
        found, report, problem = self._compared()
        spent = time.perf_counter() - start
        self._spent += spent
        seen = rendering.checked(self._step, 1000 * spent, report, found, problem)
        reason = self._stop_on(seen)
        if reason:
            seen = Check(**{**seen.to_dict(), "stop": reason})
        self.latest = report
        if self._write is not None:
            self._write(seen, report)
        warned = self._warn_on(seen)
        if warned:
            warnings.warn(f"fxqfix: {warned} at step {self._step}", stacklevel=4)
        return seen

    @entry
    def _compared(self) -> tuple[LintReport | None, Report | None, str]:
        """The findings, the report, and why there is none."""
        model, found = unwrapped(self.prepared), None
        own = _torch.quantized_engine(self.engine)
        with _rng.same_rng(), torch.no_grad(), own:
            try:
                found = lint(model, engine=self.engine)
                _refuse_hooks(model)
                copy = copied(model, "Monitor").eval()
                converted = convert_by_torch(freeze(copy))
                options: dict[str, Any] = {"noise_floor": False, "progress": False}
                report = compare(copy, converted, self._data, engine=self.engine, **options)
            except FxqfixError as error:
                return found, None, in_brief(error)
        return found, report, ""

    @property
    def overhead(self) -> float:
        """The looks' share (0 to 1) of the time since the monitor was made."""
        return self._spent / max(time.perf_counter() - self._started, 1e-9)

    def state_dict(self) -> dict[str, Any]:
        """Plain values that go into a checkpoint: the history, and where it stands."""
        past = [check.to_dict() for check in self.history]
        return {"step": self._step, "stopped": self.stopped, "history": past}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a saved run stood.

        Raises:
            DataError: This is no state of a monitor.
        """
        try:
            history = [Check(**values) for values in state["history"]]
            self._step, self.stopped = int(state["step"]), str(state["stopped"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                "this is no state of a monitor",
                where="Monitor.load_state_dict",
                found=f"{type(error).__name__}: {error}",
                expected="what state_dict returned",
            ) from error
        self.history = history
        self._last = history[-1].step if history else 0

    def table(self, fmt: str = "simple") -> str:
        """The history in any tabulate format."""
        return rendering.table(self.history, fmt)

    def plot(self, ax: Any = None) -> Any:
        """Draw how the sites and the causes move over training; returns the axes.

        A writer with `add_figure` gets the figure too.
        """
        drawn = rendering.plot(self.history, ax)
        if ax is None and callable(getattr(self._writer, "add_figure", None)):
            self._writer.add_figure(f"{self._prefix}/history", drawn.figure, self._step)
        return drawn

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The page of the last report; written to `path` where given.

        Raises:
            DataError: There was no look yet, or the last one failed.
        """
        if self.latest is None:
            raise DataError(
                "there is no report yet",
                where="Monitor.to_html",
                found=str(self.history[-1]) if self.history else "no look",
                remedy="monitor.check()",
            )
        return save(self.latest.to_html(), path, "Monitor.to_html")

    def __repr__(self) -> str:
        """One short line."""
        looks = len(self.history)
        return f"<Monitor: every {self.every} steps, {looks} looks so far>"

    def __str__(self) -> str:
        """The history, and what it cost."""
        if not self.history:
            return f"fxqfix monitor: every {self.every} steps; no look yet"
        each = sum(check.milliseconds for check in self.history) / len(self.history)
        head = (
            f"fxqfix monitor: every {self.every} steps, {each:.1f} ms a check, "
            f"{100 * self.overhead:.1f}% of the time"
        )
        stop = [f"stop: {self.stopped}"] if self.stopped else []
        return "\n".join([head, *stop, "", self.table()])


def _refuse_hooks(model: nn.Module) -> None:
    """A copy of a model shares its hooks, and what they keep: a look would be a step for them."""
    for path, hook in hooks(unwrapped(model)):
        raise UnsupportedError(
            "a look runs a copy of the model, which would call this forward hook",
            where=f"Monitor, {path or 'the model'}",
            found=getattr(hook, "__name__", type(hook).__name__),
            remedy="remove it (handle.remove()), or put what it does into the model's forward",
        )


def _first(data: Iterable[Any], count: int) -> list[Any]:
    """The first batches; what a DataLoader draws to make them is put back."""
    with _rng.same_rng():
        found = list(islice(iter(batches_of(data, "Monitor")), count))
    if not found:
        raise DataError(
            "data holds no batch",
            where="Monitor",
            expected="at least one batch",
            remedy="check that the iterator was not used up before",
        )
    return found


def _condition(given: Condition) -> Callable[[Check], str]:
    """A function of a check that says why the condition holds, or ""."""
    if given is None:
        return lambda check: ""
    if callable(given):
        asked = given
        name = getattr(given, "__name__", type(given).__name__)
        return lambda check: f"{name} says so" if asked(check) else ""
    names = [given] if isinstance(given, str) else list(given)
    known = {cause.name for cause in causes.registry()}
    known |= {check.code for check in checks.registry()} | {"non-finite"}
    for name in names:
        if name not in known:
            raise UnknownNameError(
                f"no cause and no finding of lint is named {name!r}",
                where="Monitor",
                expected=", ".join(sorted(known)),
            )

    def met(check: Check) -> str:
        seen = [n for n in names if check.causes.get(n) or check.findings.get(n)]
        return ", ".join(seen)

    return met


def _rank() -> int:
    return distributed.get_rank() if _several() else 0


def _several() -> bool:
    ready = distributed.is_available() and distributed.is_initialized()
    return ready and distributed.get_world_size() > 1


def _from_rank_0(said: str) -> str:
    """What rank 0 says, on every rank."""
    if not _several():
        return said
    box = [said]
    distributed.broadcast_object_list(box, src=0)
    return box[0]

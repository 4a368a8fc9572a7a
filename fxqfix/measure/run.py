"""Stream batches through a twin graph: each is read once, none is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx

from fxqfix import _rng, _torch
from fxqfix._reasons import innermost
from fxqfix._settings import as_given, read_as_given
from fxqfix.errors import DataError, DeviceError, FxqfixError, ModelRunError, NonFiniteError
from fxqfix.passes._ends import TAG, only
from fxqfix.passes._held import doubted

__all__ = [
    "STRAYED",
    "Run",
    "batches_of",
    "cannot_run",
    "check_values",
    "positional",
    "progress_bar",
    "run",
    "strayed",
    "streamed",
    "tensors_of",
]


After = Callable[[tuple[Any, ...], dict[str, Any], Any], None]


@dataclass
class Run:
    """What a run tells besides the probes' numbers.

    Attributes:
        batches: Batches read.
        notes: What a reader has to know about the data.
    """

    batches: int = 0
    notes: list[str] = field(default_factory=list)


def batches_of(data: Any, where: str = "compare") -> Iterable[Any]:
    """The batches of `data`: any iterable of them; a bare tensor or dict is one batch.

    The generators of a DataLoader are put back once it is read.

    Args:
        data: What the user gave.
        where: The call that reads it, for the message.

    Raises:
        DataError: It is not iterable.
    """
    if isinstance(data, (Tensor, Mapping)):
        return [data]
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):  # a file's name, say
        raise DataError(
            "data is not an iterable of batches",
            where=where,
            found=type(data).__name__,
            expected="a DataLoader, a list of batches, or one tensor",
        )
    drawing = hasattr(data, "sampler") or _rng.Rereadable.generators(data)
    return _rng.Rereadable(data) if drawing else data


def run(
    twin: fx.GraphModule,
    data: Any,
    *,
    where: str = "compare",
    progress: bool | None = None,
    after: After | None = None,
) -> Run:
    """Run every batch through the twin, under no_grad and with the random state put back.

    Args:
        twin: What `InsertShadows` returned.
        data: Batches; see `batches_of`.
        where: The call that reads the data, for messages.
        progress: Show a bar (needs tqdm); None shows it on a terminal where tqdm is installed.
        after: Called behind every batch with its arguments, its keywords and the random state that
            it started from.

    Returns:
        The number of batches, and notes.

    Raises:
        DataError: There is no batch.
        NonFiniteError: A batch holds NaN or inf.
        DeviceError: A batch is on another device than the model.
        ModelRunError: A model raised.
    """
    result = Run()
    with torch.no_grad(), _rng.same_rng():
        for args, kwargs in streamed(twin, data, result, where=where, progress=progress):
            start = _rng.rng_state()
            _forward(twin, f"{where}, batch {result.batches}", args, kwargs)
            if after is not None:
                after(args, kwargs, start)
    return result


def streamed(
    model: fx.GraphModule,
    data: Any,
    result: Run,
    *,
    where: str = "compare",
    progress: bool | None = None,
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments and keywords of each batch for a model, checked; the batches are counted.

    Args:
        model: What takes the batches.
        data: Batches; see `batches_of`.
        result: Where batches are counted, once they are done with, and notes are kept.
        where: The call that reads the data, for messages.
        progress: See `run`.

    Raises:
        DataError: There is no batch, or none holds a value.
        NonFiniteError: A batch holds NaN or inf.
        DeviceError: A batch is on another device than the model.
    """
    names = [str(n.target) for n in model.graph.nodes if n.op == "placeholder"]
    tensors = values = 0
    batches = progress_bar(batches_of(data, where), where, progress)
    for index, batch in enumerate(read_as_given(batches)):
        args, kwargs = _arguments(batch, names, result)
        given = list(tensors_of([*args, *kwargs.values()]))
        check_values(model, f"{where}, batch {index}", given)
        tensors, values = tensors + len(given), values + sum(t.numel() for t in given)
        yield args, kwargs
        result.batches += 1
    if not result.batches:
        raise DataError(
            "data holds no batch",
            where=where,
            expected="at least one batch",
            remedy="check that the iterator was not used up before (pass the DataLoader itself)",
        )
    if tensors and not values:  # else "0 of 0 codes differ" would read as equal
        raise DataError(
            "the batches hold no values",
            where=where,
            found=f"{result.batches} batches of {tensors} empty tensors",
            expected="at least one batch with a value in it",
        )


def progress_bar(data: Iterable[Any], where: str, progress: bool | None) -> Iterator[Any]:
    """The batches, with a bar.

    Args:
        data: Batches.
        where: The call that reads them, which the bar names.
        progress: See `run`.
    """
    tqdm = _torch.resolve("tqdm.auto.tqdm") if progress is not False else None
    if tqdm is None:
        yield from data
        return
    # disable=None hides the bar where stderr is no terminal; delay spares short runs.
    yield from tqdm(
        data,
        desc=where,
        unit="batch",
        leave=False,
        delay=1,
        disable=None if progress is None else False,
    )


def _arguments(batch: Any, names: list[str], result: Run) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if not isinstance(batch, (tuple, list)):
        return (batch,), {}
    if len(batch) > len(names) and names:  # (inputs, labels) of a DataLoader
        note = f"the last {len(batch) - len(names)} of {len(batch)} elements of each batch "
        note += "are not taken by the model and were left out (labels?)"
        if note not in result.notes:
            result.notes.append(note)
        batch = batch[: len(names)]
    return tuple(batch), {}


def check_values(
    model: fx.GraphModule, where: str, values: Iterable[Any], home: torch.device | None = None
) -> None:
    """Refuse tensors that the model can't be judged on.

    Args:
        model: What takes them.
        where: The call and the batch, for messages.
        values: Tensors, and nested tuples, lists and dicts of them.
        home: The device of the model; None is that of its parameters and buffers.

    Raises:
        NonFiniteError: One holds NaN or inf.
        DeviceError: One is on another device than the model.
    """
    # A decomposed graph has no parameters, its integer weights are buffers.
    home = home or next((t.device for t in chain(model.parameters(), model.buffers())), None)
    for tensor in tensors_of(values):
        if home is not None and tensor.device != home:
            raise DeviceError(
                "batch and model are on different devices",
                where=where,
                found=f"batch on {tensor.device}",
                expected=f"model's device, {home}",
                remedy=f"move the data with .to({str(home)!r}) or the models to {tensor.device}",
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteError(
                "the data holds NaN or inf",
                where=where,
                found=f"{count} of {tensor.numel()} values",
                expected="finite values",
                remedy="clean the data; a quantized model has no code for NaN",
            )


def tensors_of(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from tensors_of(value.values())
        elif isinstance(value, (tuple, list)):
            yield from tensors_of(value)


def positional(
    graph_module: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], where: str
) -> tuple[Any, ...]:
    """Keywords in the order of the graph's inputs; an input left out gets its default.

    Args:
        graph_module: The graph.
        args: Its positional arguments.
        kwargs: Its keywords.
        where: The call and the batch, for messages.

    Raises:
        ModelRunError: The graph has no such keyword, or an input that has no default is missing.
    """
    nodes = [n for n in graph_module.graph.nodes if n.op == "placeholder"][len(args) :]
    inputs = {str(n.target): n.args for n in nodes}  # name -> (default,) or nothing
    missing = [name for name, default in inputs.items() if not default and name not in kwargs]
    strange = [name for name in kwargs if name not in inputs]
    if kwargs and (missing or strange):
        problem = f"no input is named {strange}" if strange else f"the inputs {missing} are missing"
        raise cannot_run("the model", ValueError(problem), where, list(kwargs.values()))
    while inputs and list(inputs)[-1] not in kwargs:  # the graph's own defaults
        inputs.popitem()
    return (*args, *(kwargs.get(name, *default) for name, default in inputs.items()))


def cannot_run(
    who: str, error: Exception, where: str, values: Sequence[Any], remedy: str | None = None
) -> ModelRunError:
    """What to raise where a model raised on a batch.

    Args:
        who: The model, at the start of a sentence.
        error: What it raised.
        where: The call and the batch.
        values: The arguments that it was given.
        remedy: What to do, where more is known than that a batch has to fit the model.
    """
    found = f"shapes {[tuple(t.shape) for t in tensors_of(values)]}"
    others = [v for v in values if not isinstance(v, (Tensor, Mapping, tuple, list))]
    if others:
        found = f"arguments of types {', '.join(type(v).__name__ for v in values)}"
    return ModelRunError(
        f"{who} can't run this batch: {_said(error)}",
        where=where,
        found=found,
        remedy=remedy
        or "each batch has to be what the model's forward takes "
        "(tensor, tuple of arguments, or dict of keywords)",
    )


def _said(error: Exception) -> str:
    return innermost(error).removeprefix(f"{type(error).__name__}: ")


def _forward(
    twin: fx.GraphModule, where: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    copies = _torch.tree_map_tensors(Tensor.clone, (args, kwargs))
    try:
        # forward, not __call__: FX prints its own trace of an error before raising it.
        with as_given(model=True):
            twin.forward(*copies[0], **copies[1])
    except FxqfixError:
        raise
    except Exception as error:  # a model can raise anything
        values, remedy = [*args, *kwargs.values()], None
        if _raises_converted(twin, args, kwargs):
            remedy = "here the converted model raises, so call it on this batch by itself; each "
            remedy += "batch has to be what the model's forward takes, and converted to what its "
            remedy += "kernels take"
        raise cannot_run("the models", error, where, values, remedy) from error


# Why figures of a site can't be relied on where its stand-in is found wrong after the first batch.
STRAYED = "what stands in for this module gives other bits on the last batch than on the first"


def strayed(twin: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """Sites whose stand-in in the prepared branch gives other bits than the user's own module.

    Args:
        twin: The twin; only its prepared branch is left.
        args: The arguments of the last batch.
        kwargs: Its keywords.
    """
    only(twin, "prepared")
    with torch.no_grad(), _rng.same_rng(), doubted(twin) as found:
        _forward(twin, "compare, the last batch once more", args, dict(kwargs))
    return found


class _Steps(fx.Interpreter):
    """Remembers which node it was at."""

    extra_traceback = False
    at: fx.Node | None = None

    def run_node(self, node: fx.Node) -> Any:
        """Run it."""
        self.at = node
        return super().run_node(node)


def _raises_converted(twin: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it is a node of the converted model that raises; all others are woven in."""
    if not isinstance(twin, fx.GraphModule):
        return False
    steps = _Steps(twin)
    with suppress(Exception):
        given = positional(twin, args, kwargs, "compare")
        steps.run(*_torch.tree_map_tensors(Tensor.clone, given))
    return steps.at is not None and steps.at.op != "placeholder" and TAG not in steps.at.meta

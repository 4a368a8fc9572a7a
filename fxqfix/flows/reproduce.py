"""One op's discrepancy as a script that needs torch alone: what goes into a bug report."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxqfix import _rng, _torch
from fxqfix._settings import entry
from fxqfix.errors import DataError, UnsupportedError
from fxqfix.export import OpParameters, Parameters
from fxqfix.flows._script import script
from fxqfix.flows.convert import convert_by_torch
from fxqfix.flows.decompose import to_decomposed
from fxqfix.flows.extract import extract_parameters, golden_vectors
from fxqfix.measure import batches_of
from fxqfix.report import Report, Row
from fxqfix.report._files import save

__all__ = ["Source", "reproduce", "with_source"]


class Source:
    """Where a report comes from, as long as the user keeps it: nothing is kept alive for it.

    Only data that can be read again is known: a tensor, a DataLoader, a list of batches.
    """

    def __init__(self, prepared: nn.Module, converted: nn.Module | None, data: Any) -> None:
        self._prepared = weakref.ref(prepared)
        self._converted = weakref.ref(converted) if converted is not None else None
        # A list is held by its batches: it can't be referred to weakly.
        held = list(data) if isinstance(data, list | tuple) else [data]
        again = not isinstance(data, Iterator) and all(_refers(batch) for batch in held)
        self._data = [weakref.ref(batch) for batch in held] if again else []
        self._many = isinstance(data, list | tuple)

    def __reduce__(self) -> tuple[Any, ...]:
        """A report that is pickled or copied forgets where it comes from."""
        return _nothing, ()

    def reproduce(
        self, report: Report, name: str, path: str | os.PathLike[str], **given: Any
    ) -> str:
        """`reproduce` with what is still there, unless it is given."""
        known: dict[str, Any] = {"prepared": self._prepared()}
        if self._converted is not None:
            known["converted"] = self._converted()
        batches = [batch() for batch in self._data]
        if batches and None not in batches:
            known["data"] = batches if self._many else batches[0]
        return reproduce(report, name, path, **{**known, **given})


def _refers(value: Any) -> bool:
    try:
        weakref.ref(value)
    except TypeError:
        return False
    return True


def _nothing() -> None:
    return None


@entry
def reproduce(
    report: Report,
    name: str,
    path: str | os.PathLike[str],
    *,
    prepared: nn.Module | None = None,
    converted: nn.Module | None = None,
    data: Iterable[Any] | None = None,
) -> str:
    """Write a script that shows the discrepancy of one site with torch alone.

    Args:
        report: What compare returned.
        name: A site, or its weight.
        path: Where to write the script.
        prepared: The prepared model.
        converted: The converted one, an int8 model; None for torch's own conversion of a copy.
        data: The batches; the first that shows a difference at this site is taken.

    Returns:
        The script.

    Raises:
        UnknownNameError: There is no such site.
        DataError: A model or the data is gone, or no code differs there.
        UnsupportedError: The op has no such script.
        WriteError: The path can't be written.
    """
    row = report.row(name)
    if row.kind == "weight" and name.endswith(".weight"):
        row = report.row(name.removesuffix(".weight"))
    missing = [what for what, v in (("prepared", prepared), ("data", data)) if v is None]
    if missing or prepared is None or data is None:
        raise DataError(
            f"{' and '.join(missing)} can't be reached any more",
            where="Report.reproduce",
            remedy="report.reproduce(name, path, prepared=..., converted=..., data=[batch])",
        )
    with _torch.quantized_engine(report.engine or None), _rng.same_rng(), torch.no_grad():
        other = convert_by_torch(prepared) if converted is None else converted
        mine, theirs = _parameters(report, row, prepared, other)
        for inputs, found in _vectors(other, theirs, data):
            text = _smallest(report, row, mine, theirs, inputs, found)
            if text:
                return save(text, path, "Report.reproduce")
    raise DataError(
        "no code differs there on this data, given the same inputs",
        where="Report.reproduce",
        found=name,
        remedy="take a site of report.worst(), and the data of the report",
    )


def _parameters(
    report: Report, row: Row, prepared: nn.Module, converted: nn.Module
) -> tuple[OpParameters, OpParameters]:
    partner = {a: b for a, b, _ in report.coverage.paired}.get(row.name, row.name)
    mine = _find(extract_parameters(to_decomposed(prepared)), row.name)
    theirs = _find(extract_parameters(converted), partner)
    if mine is None or theirs is None or mine.op != theirs.op:
        ops = [op.op if op is not None else "none" for op in (mine, theirs)]
        raise UnsupportedError(
            "the site is not one op in both models",
            where="Report.reproduce",
            found=f"{row.name}: {ops[0]} prepared, {ops[1]} converted",
            expected="one quantized op with one of the same kind as its partner",
        )
    return mine, theirs


def _find(parameters: Parameters, name: str) -> OpParameters | None:
    for op in parameters:
        if op.name == name or (op.op == "quantize" and op.inputs == (name,)):
            return op
    return None


def _vectors(
    converted: nn.Module, op: OpParameters, data: Iterable[Any]
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """The op's inputs and its result, batch by batch."""
    for batch in batches_of(data, "Report.reproduce"):
        golden = golden_vectors(converted, batch)
        yield tuple(golden.output_of(name) for name in op.inputs), golden.output_of(op.name)


def _smallest(
    report: Report,
    row: Row,
    mine: OpParameters,
    theirs: OpParameters,
    inputs: tuple[Tensor, ...],
    found: Tensor,
) -> str:
    """The script for the sample that differs most; "" where none does. Each was run before."""
    about = f"Causes, as fxqfix names them: {', '.join(row.causes) or 'none'}."
    said = "; ".join(filter(None, row.evidence.values()))
    about += f" {said}." if said else ""
    title = f"{row.name} ({theirs.op} on {report.engine}): a kernel's codes against their reference"

    def written(inputs: tuple[Tensor, ...], found: Tensor) -> tuple[str, Tensor]:
        text = script(title, mine, theirs, inputs, found, report.engine, about)
        return text, _differs(text)

    text, differs = written(inputs, found)
    if not bool(differs.any()):
        return ""
    if all(value.dim() and value.shape[0] == len(found) for value in inputs):
        most = int(differs.flatten(1).sum(1).argmax()) if differs.dim() > 1 else 0
        one, part = written(tuple(v[most : most + 1] for v in inputs), found[most : most + 1])
        text = one if bool(part.any()) else text
    return text


def _differs(text: str) -> Tensor:
    """Run a script up to its verdict: which codes differ."""
    scope: dict[str, Any] = {}
    exec(text.partition("\ndiffer = ")[0], scope)  # written here, from integers and known forms
    differs: Tensor = scope["expected"] != scope["found"]
    return differs


def with_source(
    report: Report, prepared: nn.Module, converted: nn.Module | None, data: Any
) -> Report:
    """The report, which knows where it comes from."""
    return replace(report, source=Source(prepared, converted, data))

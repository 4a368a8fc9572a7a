"""judge: what an engine of one's own computed, op by op, and what it does otherwise."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxqfix._settings import entry
from fxqfix.deviations import Context, Found, Hypothesis, constant, explain, registry
from fxqfix.dialects.site import closest
from fxqfix.errors import DataError
from fxqfix.export import Arithmetic, GoldenVectors, OpParameters, Parameters
from fxqfix.export.answers import Answers, read_answers
from fxqfix.export.walk import Seen, walk
from fxqfix.measure import Discrepancy
from fxqfix.qparams import QParams, dequantize
from fxqfix.report import Explanation, JudgedOp, Judgement

__all__ = ["judge"]

_FORM_ONLY = frozenset({"y", "y_shift"})  # the right codes, in another form


@entry
def judge(
    parameters: Parameters,
    answers: Mapping[str, Any] | GoldenVectors | str | os.PathLike[str],
    *,
    golden: GoldenVectors | None = None,
) -> Judgement:
    """Compare what an engine of your own computed with the reference, and name what it does.

    Each op is computed by the arithmetic that `parameters` name, on the device's own inputs to it.
    Where codes differ, known deviations (`fxqfix deviations`) are computed in its place, each alone
    and then in pairs: what gives every code is named. Neither the model nor torch's quantized ops
    are needed.

    Args:
        parameters: What `extract_parameters` gave, or `Parameters.load`.
        answers: Name of an op -> its result: a mapping of arrays, `GoldenVectors`, an .npz,
            .safetensors or .json file, or a folder of .npy files, or of raw files with a
            manifest.json (``{"tensors": [{"name", "file", "dtype", "shape", "layout"}]}``). The
            model's inputs go by their names; with `golden` they may be left out.
        golden: What `golden_vectors` gave for the same inputs: then each op is also compared with
            its golden codes.

    Returns:
        Per op, codes that differ on its own inputs, what explains them, and what to change. Ops
        that the device did not give are computed by the reference, and said so.

    Raises:
        DataError: The parameters don't say their arithmetic, the answers can't be read as a whole,
            or none of them is an op's.
        MissingDependencyError: numpy or safetensors is needed for the files.

    Example:
        >>> import torch
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         q = torch.quantize_per_tensor(x, 0.5, 3, torch.quint8)
        ...         return torch.ops.quantized.add(q, q, 1.0, 3).dequantize()
        >>> import fxqfix
        >>> parameters = fxqfix.extract_parameters(Net(), engine="qnnpack", isa="vnni")
        >>> x = torch.linspace(-1, 1, 64)
        >>> golden = fxqfix.golden_vectors(Net(), x)
        >>> judge(parameters, golden).exact
        True
        >>> codes = (golden.values["add"].int() - 3).clamp(min=0)
        >>> wrong = {**golden.values, "add": codes}
        >>> [e.deviations for e in judge(parameters, wrong).op("add").named]
        [('output-zero-point-missing',)]
    """
    arithmetic = _arithmetic(parameters)
    found = read_answers(answers)
    inputs = _inputs(parameters, found, golden)
    _check_names(parameters, found)
    judging = _Judging(parameters, arithmetic, found, golden)
    values = judging.values(inputs)
    shapes = {} if golden is None else {n: tuple(v.shape) for n, v in golden.values.items()}
    with torch.no_grad():
        walk(parameters, arithmetic, values, shapes, judging.look)
    return judging.judgement()


def _arithmetic(parameters: Parameters) -> Arithmetic:
    if parameters.arithmetic is not None:
        return parameters.arithmetic
    raise DataError(
        "these parameters don't say which arithmetic they come from",
        where="judge",
        found="a file of an older version",
        remedy="extract them again, or dataclasses.replace(parameters, "
        'arithmetic=fxqfix.export.Arithmetic.of("qnnpack"))',
    )


def _inputs(
    parameters: Parameters, found: Answers, golden: GoldenVectors | None
) -> dict[str, Tensor]:
    """The model's inputs: the device's, or else the golden ones."""
    inputs = {}
    for name in parameters.inputs:
        value = found.values.get(name)
        if value is None and golden is not None and name not in found.problems:
            value = golden.values.get(name)
        if value is None:
            continue
        if value.is_floating_point() and not bool(value.isfinite().all()):
            found.problems[name] = "it holds NaN or inf"
            continue
        if not value.is_floating_point() and _is_quantized_here(parameters, name):
            found.problems[name] = f"it holds {value.dtype}, and floats are quantized here"
            continue
        inputs[name] = value.float() if value.is_floating_point() else value
    return inputs


def _is_quantized_here(parameters: Parameters, name: str) -> bool:
    return any(op.op == "quantize" and name in op.inputs for op in parameters)


def _check_names(parameters: Parameters, found: Answers) -> None:
    known = {op.name for op in parameters}
    given = {*found.values, *found.problems} - set(parameters.inputs)
    if known & given:
        return
    raise DataError(
        "none of the answers is an op's",
        where="judge",
        found=", ".join(sorted(given)[:8]) or "no array",
        expected=f"names of ops, such as {', '.join([op.name for op in parameters][:8])}",
        remedy="name the arrays as extract_parameters names the ops",
    )


@dataclass
class _Judging:
    """What is gathered while the ops are walked."""

    parameters: Parameters
    arithmetic: Arithmetic
    answers: Answers
    golden: GoldenVectors | None
    ops: list[JudgedOp] = field(default_factory=list)
    unchecked: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stood_in: dict[str, str] = field(default_factory=dict)  # not given -> what it is

    def values(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What can be compared."""
        values = dict(inputs)
        for op in self.parameters:
            value = self.answers.values.get(op.name)
            if value is None or op.name in self.answers.problems:
                continue
            try:
                _check_grid(op, self.answers.grids.get(op.name))
                values[op.name] = _usable(value, op, self.notes)
            except ValueError as error:
                self.answers.problems[op.name] = str(error)
        return values

    def look(self, seen: Seen) -> Tensor | None:
        """Judge one op; what its readers are to get, where that is not what the device gave."""
        op, why = seen.op, self.answers.problems.get(seen.op.name, seen.reason)
        asked = op.output is not None or op.name in self.parameters.outputs
        if seen.found is None or not isinstance(seen.wanted, Tensor):
            given = op.name in self.answers.values or op.name in self.answers.problems
            if given or (asked and why):
                self.unchecked.append((op.name, why or "its result is no single tensor"))
            elif asked and not isinstance(seen.wanted, tuple):
                self.stood_in[op.name] = ", ".join(seen.through)
            return None
        if op.output is None and not seen.wanted.is_floating_point():
            return None
        differs = not _equal(seen.found, seen.wanted)
        local = _apart(seen.wanted, seen.found, op.output, differs)
        found = explain(seen, Context(self.parameters), registry()) if differs else None
        self.ops.append(self._judged(seen, local, found))
        if found is not None and found.named and _in_form_only(found.named[0]):
            return seen.wanted
        return None

    def _judged(self, seen: Seen, local: Discrepancy, found: Found | None) -> JudgedOp:
        assert seen.found is not None
        op, cumulative = seen.op, None
        golden = None if self.golden is None else self.golden.values.get(op.name)
        reason = ""
        if golden is not None and golden.shape == seen.found.shape:
            differs = not _equal(golden, seen.found)
            cumulative = _apart(golden, seen.found, op.output, differs)
        elif golden is not None:
            reason = f"golden vectors of another shape, {tuple(golden.shape)}"
        if found is None:
            return JudgedOp(op.name, op.op, local, cumulative, through=seen.through, reason=reason)
        return JudgedOp(
            op.name,
            op.op,
            local,
            cumulative,
            tuple(map(_explanation, found.named)),
            None if found.best is None else _explanation(found.best),
            found.separation,
            seen.through,
            reason,
            found.tried,
            constant(seen),
        )

    def judgement(self) -> Judgement:
        """The record."""
        known = {op.name for op in self.parameters} | set(self.parameters.inputs)
        names = [*self.answers.values, *self.answers.problems]
        parts = {f"{n}.{i}" for n in known for i in range(64)}
        unknown = tuple(dict.fromkeys(n for n in names if n not in known and n not in parts))
        missing = self._missing()
        inputs = [
            (n, self.answers.problems[n])
            for n in self.parameters.inputs
            if n in self.answers.problems
        ]
        return Judgement(
            str(self.arithmetic),
            tuple(self.ops),
            (*inputs, *self.unchecked, *missing),
            tuple(self._other_inputs()),
            tuple(_with_nearest(n, known) for n in unknown),
            tuple(dict.fromkeys([*self.answers.notes, *self.notes])),
        )

    def _missing(self) -> list[tuple[str, str]]:
        """Ops that the device did not give, and that no op behind them shows."""
        readers: dict[str, set[str]] = {}
        judged = {op.name: op for op in self.ops}
        for op in self.ops:
            for name in op.through:
                readers.setdefault(name, set()).add(op.name)
        left = []
        for name in self.stood_in:
            shown = [r for r in readers.get(name, ()) if judged[r].local is not None]
            if not shown or name in self.parameters.outputs:
                left.append((name, "the device did not give it"))
            else:
                self.notes.append(f"{name} was not given: it is judged with {', '.join(shown)}")
        return left

    def _other_inputs(self) -> list[str]:
        if self.golden is None:
            return []
        pairs = {
            n: (self.answers.values.get(n), self.golden.values.get(n))
            for n in self.parameters.inputs
        }
        return [
            n
            for n, (mine, due) in pairs.items()
            if mine is not None and due is not None and not _equal(mine, due)
        ]


def _with_nearest(name: str, known: set[str]) -> str:
    near = closest(name, sorted(known))
    return f"{name} (nearest: {near[0]})" if near else name


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two arrays hold the same numbers, whatever their dtypes."""
    return torch.equal(a, b) if a.dtype == b.dtype else torch.equal(a.double(), b.double())


def _in_form_only(hypothesis: Hypothesis) -> bool:
    return all(set(change) <= _FORM_ONLY for change in hypothesis.changes)


def _apart(wanted: Tensor, found: Tensor, grid: QParams | None, differs: bool) -> Discrepancy:
    if not differs:
        return Discrepancy(elements=wanted.numel())
    a, b = wanted.double(), found.double()
    scale = 1.0 if grid is None else grid.scales[0]
    point = 0.0 if grid is None else grid.zero_points[0]
    lsb = (b - a).abs()
    least, most = (-math.inf, math.inf) if grid is None else (grid.quant_min, grid.quant_max)
    real, other = (a - point) * scale, (b - point) * scale
    return Discrepancy(
        elements=a.numel(),
        differing=int((lsb > 0).sum()),
        max_lsb=0 if grid is None else int(lsb.max()),
        sum_lsb=0 if grid is None else int(lsb.sum()),
        out_of_range=int(((b < least) | (b > most)).sum()),
        saturated_low=int((b <= least).sum()),
        saturated_high=int((b >= most).sum()),
        max_abs=float(lsb.max()) * scale,
        signal=float(real.square().sum()),
        noise=float((other - real).square().sum()),
        energy=float(other.square().sum()),
        product=float((real * other).sum()),
    )


def _explanation(hypothesis: Hypothesis) -> Explanation:
    counts, rows = hypothesis.counts, hypothesis.deviations
    assert counts is not None
    merged = {k: v for change in hypothesis.changes for k, v in change.items()}
    return Explanation(
        hypothesis.names,
        f"the device {' and '.join(row.summary for row in rows)}",
        "; ".join(row.remedy for row in rows),
        counts.explained,
        counts.differing,
        counts.broken,
        ", ".join(f"{k}={v}" for k, v in merged.items()),
    )


def _usable(value: Tensor, op: OpParameters, notes: list[str]) -> Tensor:
    """An array as codes or floats, as the op gives them.

    Raises:
        ValueError: It can't be, and why.
    """
    floats = value.is_floating_point()
    if value.dtype == torch.bool or value.is_complex():
        raise ValueError(f"dtype {value.dtype} holds no codes")
    if floats and not bool(value.isfinite().all()):
        raise ValueError("it holds NaN or inf")
    grid = op.output
    if grid is None:
        if not floats and op.op == "dequantize":
            raise ValueError("its result is a float, and the array holds integers")
        return value.float() if floats else value
    if value.dtype == grid.storage:
        return value
    if not floats:
        wide = value.to(torch.int64)
        wrapped = value.dtype == torch.uint64 and bool((wide < 0).any())
        if wrapped or (wide.numel() and not -(2**31) <= int(wide.min()) <= int(wide.max()) < 2**31):
            raise ValueError("it holds integers beyond 32 bits")
        return wide.to(torch.int32)
    return _from_floats(value, op.name, grid, notes)


def _from_floats(value: Tensor, name: str, grid: QParams, notes: list[str]) -> Tensor:
    """Codes that were written as floats, or whose values were.

    Raises:
        ValueError: They are neither, or can be both.
    """
    low, high = grid.container
    scale, point = grid.tensors(value)
    codes = (value.double() / scale.double()).round() + point.double()
    inside = bool((codes >= low).all() & (codes <= high).all())
    of_values = inside and torch.equal(dequantize(codes.to(torch.int32), grid), value.float())
    whole = torch.equal(value.round(), value)
    if whole and bool((value >= low).all() & (value <= high).all()):
        if of_values and not torch.equal(codes, value.double()):
            raise ValueError("its floats can be codes as well as values of this grid: give codes")
        return value.to(grid.storage)
    if of_values:
        notes.append(f"{name}: floats were taken for the codes that they are values of")
        return codes.to(grid.storage)
    raise ValueError("it holds floats that are neither codes nor values of this grid")


def _check_grid(op: OpParameters, given: tuple[float, int] | None) -> None:
    """A quantized tensor says a grid of its own.

    Raises:
        ValueError: It is not the op's.
    """
    grid = op.output
    if given is None or grid is None or given == (grid.scales[0], int(grid.zero_points[0])):
        return
    raise ValueError(
        f"it is a quantized tensor with scale={given[0]:g} zp={given[1]}, and {grid} is due"
    )

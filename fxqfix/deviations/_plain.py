"""Ops without a weight under any recipe: the reference's own arithmetic on changed parameters.

A zero point left out, another divisor or another scale are parameters: the reference computes with
them as it does with the due ones. Only other roundings need a formula, which is the op on real
values in float64.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxqfix.deviations._base import DUE, Change, Recipe
from fxqfix.deviations._layouts import arranged
from fxqfix.deviations._roundings import fixed, rounded
from fxqfix.deviations._subject import Context, Subject
from fxqfix.engines.pools import divisors_of, qnnpack_multiplier, sums_of
from fxqfix.errors import UnsupportedError
from fxqfix.export import OpParameters, Reference
from fxqfix.export.forms import FORMS, pooled
from fxqfix.export.walk import Seen
from fxqfix.ops import TABLE
from fxqfix.qparams import QParams, container_range

__all__ = ["PlainSubject"]

_INPUTS = frozenset({"x", "cast", "x_shift", "x_point"})
_CHEAP = frozenset({"clamp", "y_shift", "y"})  # of what is computed already
_SMALL = 4096
_UNIT = 2.0**-24
_POOLS = ("avg_pool1d", "avg_pool2d", "avg_pool3d")
_AVERAGES = tuple(row.key for row in TABLE if row.averages)
_TABLES = tuple(row.key for row in TABLE if row.pointwise == "curve")


class PlainSubject(Subject):
    """An op without a weight; a row is one code."""

    def __init__(self, seen: Seen, context: Context) -> None:
        super().__init__(seen, context)
        self._results: dict[tuple[object, ...], Tensor | None] = {}
        key = self.reference.key
        handles = set(Subject.handles)
        if key == "quantize":
            handles |= {"rounding", "divide", "scale"}
        else:
            handles |= _INPUTS | {"engine", "scale"}
        if key in FORMS:
            handles |= {"rounding", "multiplier"}
        if key in _AVERAGES:
            handles |= {"average"}
        if key in ("add", "mul", "cat", "sub"):
            handles |= {"mix"}
        if key in _TABLES:
            handles |= {"table"}
        if key.startswith("max_pool"):
            handles |= {"pad"}
        if key in _POOLS:
            handles |= {"pad"}
        if self.reference.arithmetic.decomposed and key in FORMS:
            handles |= {"order"}
        self.handles = frozenset(handles)

    def worth(self, a: Change, b: Change) -> bool:
        """Each computation is of the whole op: two that need a new one are tried on small ops."""
        return self.found.numel() <= _SMALL or not (a.keys() - _CHEAP and b.keys() - _CHEAP)

    def in_rows(self, value: Tensor) -> Tensor:
        """One column."""
        return value.reshape(-1, 1).to(torch.int64)

    def whole(self, recipe: Recipe, rows: Tensor | None) -> Tensor | None:
        """All of it, once; then the rows."""
        plain = replace(recipe, **{n: getattr(Recipe(), n) for n in _CHEAP})
        key = tuple(vars(plain).values())
        if key not in self._results:
            try:
                found = self._computed(plain)
            except (UnsupportedError, IndexError, RuntimeError):  # codes that no table has
                found = None
            self._results[key] = None if found is None else found.reshape(-1, 1).to(torch.int32)
        found = self._results[key]
        if found is None or found.shape != self.found.shape:
            return None
        return found if rows is None else found[rows]

    def _computed(self, recipe: Recipe) -> Tensor | None:
        inputs = self._inputs(recipe)
        op = self._op(recipe)
        if inputs is None or op is None:
            return None
        if self.reference.key == "quantize" and isinstance(inputs[0], Tensor):
            if recipe.key(("rounding", "divide")) == (DUE, DUE):
                return self._run(op, inputs, DUE)
            return self._quantized(inputs[0], op.output or self.grid, recipe)
        if recipe.mix != DUE:
            return self._mixed(inputs, op, recipe)
        if recipe.pad != DUE:
            return self._padded(inputs, op, recipe)
        if recipe.key(("rounding", "multiplier")) != (DUE, DUE):
            steps = self._steps(inputs, op)
            return None if steps is None else self._rounded(steps, recipe)
        if recipe.average != DUE and self.reference.arithmetic.engine == "qnnpack":
            return self._qnnpack_average(inputs[0], op, recipe.average)
        return self._run(op, inputs, recipe.engine)

    def _run(self, op: OpParameters, inputs: list[Any], engine: str) -> Tensor | None:
        """By the reference's arithmetic, or another engine's; without clamping to limits."""
        arithmetic = self.reference.arithmetic
        if engine == DUE and op is self.op and (kernel := self.reference.kernel) is not None:
            return torch.as_tensor(kernel(*inputs)).to(torch.int64)
        if engine != DUE:
            if engine == arithmetic.engine:
                return None
            arithmetic = replace(
                arithmetic.of(engine, arithmetic.isa or "vnni", arithmetic.threads),
                point_first=arithmetic.point_first,
            )
            op = _with_quantized_dtypes(op)
        limits = None if op.output is None else op.output.container
        shape = tuple(self.seen.wanted.shape) if isinstance(self.seen.wanted, Tensor) else None
        if engine != DUE or not self.reference.arithmetic.decomposed:
            op = replace(op, limits=limits)
        found = Reference(op, arithmetic).run(*inputs, shape=shape)
        if not isinstance(found, Tensor) or op.output is None:
            return None
        return found.to(torch.int64) + (self.point - int(op.output.zero_points[0]))

    def _inputs(self, recipe: Recipe) -> list[Any] | None:
        """The device's inputs, as the recipe takes them."""
        found: list[Any] = []
        for x, grid in zip(self.seen.inputs, self.op.input_qparams, strict=True):
            if not isinstance(x, Tensor) or grid is None:
                found.append(x)
                continue
            value = x if recipe.x == DUE else arranged(x, recipe.x)
            if value is None:
                return None
            shift = recipe.x_shift + recipe.table
            if recipe.cast != DUE:
                low, high = container_range(getattr(torch, recipe.cast))
                value = (value.to(torch.int64) - low).remainder(high - low + 1) + low
            if shift:
                value = value.to(torch.int64) + shift
            low, high = grid.container
            if value is not x:
                fresh = value.to(torch.int64).clamp(low, high).to(x.dtype)
                value = torch.empty_like(x).copy_(fresh)
            found.append(value)
        return found

    def _op(self, recipe: Recipe) -> OpParameters | None:
        """The op with zero points, scales and divisors as the recipe has them."""
        op = self.op
        if recipe.y_point != DUE and op.output is not None:  # clamped behind it
            op = replace(op, output=replace(op.output, zero_point=0))
        if recipe.relu != DUE and self.reference.relu:
            op = replace(op, op=self.reference.key)
        left = {"none": (0, 1, 2, 3), "none-0": (0,), "none-1": (1,)}.get(recipe.x_point, ())
        if left:
            grids = tuple(
                replace(q, zero_point=0) if i in left and q is not None else q
                for i, q in enumerate(op.input_qparams)
            )
            if grids == op.input_qparams:
                return None
            op = replace(op, input_qparams=grids)
        if recipe.average != DUE and self.reference.arithmetic.engine == "qnnpack":
            return op
        if recipe.scale != DUE:
            return self._scaled(op, recipe.scale)
        if recipe.average != DUE:
            return self._averaged(op, recipe.average)
        return op

    def _scaled(self, op: OpParameters, name: str) -> OpParameters | None:
        """Another scale: of a site by name ("of:NAME"), or of another input."""
        grids = list(op.input_qparams)
        if name == "swapped" and len(grids) == 2 and grids[0] and grids[1]:
            a, b = grids[0], grids[1]
            swapped = (replace(a, scale=b.scale), replace(b, scale=a.scale))
            return replace(op, input_qparams=swapped)
        if name == "first" and len(grids) > 1 and grids[0]:
            one = grids[0].scale
            return replace(op, input_qparams=tuple(q and replace(q, scale=one) for q in grids))
        if name.startswith("of:") and op.output is not None:
            other = self.context.parameters[name.removeprefix("of:")].output
            return (
                None if other is None else replace(op, output=replace(op.output, scale=other.scale))
            )
        if name == "power-of-two" and op.output is not None:
            near = 2.0 ** round(torch.log2(torch.tensor(op.output.scales[0])).item())
            return replace(op, output=replace(op.output, scale=near))
        return None

    def _averaged(self, op: OpParameters, how: str) -> OpParameters | None:
        options = dict(op.options)
        if how in ("with-padding", "without-padding") and self.reference.key in _POOLS:
            options["count_include_pad"] = how == "with-padding"
            return replace(op, options=options)
        if self.reference.key == "avg_pool2d" and "kernel_size" in options:
            size = options["kernel_size"]
            size = size if isinstance(size, tuple) else (size, size)
            count = size[0] * size[-1]
            off = {"one-more": count + 1, "one-less": count - 1}.get(how)
            if how == "power-of-two":
                off = _power(count)
            if off and off != count:
                options["divisor_override"] = off
                return replace(op, options=options)
        return None

    def _qnnpack_average(self, x: Tensor, op: OpParameters, how: str) -> Tensor | None:
        """Qnnpack counts the kernel's positions; here the sums are scaled by other counts."""
        grid = op.input_qparams[0]
        if grid is None or self.reference.key != "avg_pool2d":
            return None
        options = pooled(op.options)
        centered = (x.to(torch.int64) - int(grid.zero_points[0])).double()
        counts = divisors_of(centered, {**options, "count_include_pad": how != "without-padding"})
        most = int(counts.max())
        changed = {"one-more": most + 1, "one-less": most - 1, "power-of-two": _power(most)}
        if how in changed:
            counts = torch.full_like(counts, changed[how])
        sums, found = sums_of(centered, options).float(), torch.zeros(())
        for count in set(counts.flatten().tolist()):
            scaled = torch.round(sums * qnnpack_multiplier(grid, int(count)))
            found = torch.where(counts == count, scaled, found)
        return found + self.point

    def _steps(self, inputs: list[Any], op: OpParameters) -> Tensor | None:
        """The op on real values in float64, in steps of the result."""
        if op.output is None:
            return None
        reals = [_real(x, q) for x, q in zip(inputs, op.input_qparams, strict=True)]
        key, grid = self.reference.key, op.input_qparams[0]
        if key in _AVERAGES and grid is not None:  # exact, so that halves are halves
            point, ratio = int(grid.zero_points[0]), grid.scales[0] / op.output.scales[0]
            whole = FORMS[key](op.options, [inputs[0].double() - point])
            return torch.as_tensor(whole * ratio)
        found = Reference(op, self.reference.arithmetic).real(reals)
        return found / op.output.scales[0] if isinstance(found, Tensor) else None

    def _rounded(self, steps: Tensor, recipe: Recipe) -> Tensor:
        how = "even" if recipe.rounding == DUE else recipe.rounding
        value = steps.float().double() if recipe.multiplier == "f32" else steps
        return rounded(value, how) + self.point

    def _quantized(self, x: Tensor, grid: QParams, recipe: Recipe) -> Tensor:
        """Floats to codes."""
        scale = torch.tensor(grid.scales[0], dtype=torch.float32)
        point = int(grid.zero_points[0])
        divided = {
            "true": lambda: (x / scale).double(),
            "f64": lambda: x.double() / grid.scales[0],
            DUE: lambda: (x * (1.0 / scale)).double(),
        }
        value = divided.get(recipe.divide.removesuffix("-point"), divided[DUE])()
        how = "even" if recipe.rounding == DUE else recipe.rounding
        if recipe.divide.endswith("point"):  # added before the rounding
            return rounded(
                (value + point).float() if "f64" not in recipe.divide else value + point, how
            )
        return rounded(value, how) + point

    def _mixed(self, inputs: list[Any], op: OpParameters, recipe: Recipe) -> Tensor | None:
        """Inputs brought to the result's grid one by one, before they are joined."""
        key, grids = self.reference.key, op.input_qparams
        if op.output is None or any(q is None for q in grids) or len(grids) < 2:
            return None
        os = op.output.scales[0]
        parts = [
            x.to(torch.int64) - int(q.zero_points[0])
            for x, q in zip(inputs, grids, strict=True)
            if q
        ]
        scales = [q.scales[0] for q in grids if q]
        if key == "cat":
            if recipe.mix != "copied":
                return None
            return torch.cat([x.to(torch.int64) for x in inputs], op.options.get("dim", 0))
        if recipe.mix == "f64":
            exact = {"add": lambda: parts[0] * (scales[0] / os) + parts[1] * (scales[1] / os)}
            exact["mul"] = lambda: parts[0] * parts[1] * (scales[0] * scales[1] / os)
            return None if key not in exact else torch.round(exact[key]().double()) + self.point
        if key == "mul":
            if recipe.mix not in ("q31", "q31-double", "q15"):
                return None
            one = torch.tensor([scales[0] * scales[1] / os], dtype=torch.float64)
            total = parts[0] * parts[1]
            return (
                fixed(total.reshape(-1, 1), one, recipe.mix, "up").reshape(total.shape) + self.point
            )
        if key != "add":
            return None
        if recipe.mix == "rounded-first":
            a, b = (torch.round(p.double() * (s / os)) for p, s in zip(parts, scales, strict=True))
            return a + b + self.point
        if recipe.mix == "left-20":  # TFLite: both to twice the larger scale, 20 bits to the left
            return self._left_shifted(parts, scales, os)
        return None

    def _left_shifted(self, parts: list[Tensor], scales: list[float], os: float) -> Tensor:
        twice = 2 * max(scales)
        shape = (parts[0] + parts[1]).shape
        total = torch.zeros(shape, dtype=torch.float64).reshape(-1, 1)
        for part, scale in zip(parts, scales, strict=True):
            one = torch.tensor([scale / twice], dtype=torch.float64)
            flat = (part.expand(shape).reshape(-1, 1) << 20).double()
            total = total + fixed(flat, one, "q31-double", "up")
        last = torch.tensor([twice / ((1 << 20) * os)], dtype=torch.float64)
        return fixed(total, last, "q31-double", "up").reshape(shape) + self.point

    def _padded(self, inputs: list[Any], op: OpParameters, recipe: Recipe) -> Tensor | None:
        """Pools whose padding holds code 0 (or, of maxima, the zero point)."""
        grid, options = op.input_qparams[0], op.options
        if grid is None or op.output is None or not any(options.get("padding", ())):
            return None
        filler = 0 if recipe.pad == "zero" else int(grid.zero_points[0])
        margin = [n for n in reversed(options["padding"]) for _ in range(2)]
        x = torch.nn.functional.pad(inputs[0].double(), margin, value=float(filler))
        plain = {**options, "padding": (0,) * len(options["padding"])}
        if self.reference.key.startswith("max_pool"):
            return torch.as_tensor(FORMS[self.reference.key](plain, [x]))
        found = FORMS[self.reference.key](plain, [x - int(grid.zero_points[0])])
        return torch.round(found * (grid.scales[0] / op.output.scales[0])) + self.point

    def spread(self, recipe: Recipe, rows: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """By a bound of float32 ops: some units of the largest input in steps."""
        inputs, op = self._inputs(recipe), self._op(recipe)
        steps = None if inputs is None or op is None else self._steps(inputs, op)
        if steps is None or inputs is None or op is None or op.output is None:
            return None
        reals = [_real(x, q) for x, q in zip(inputs, op.input_qparams, strict=True)]
        most = max(float(r.abs().max()) for r in reals if r.numel()) / op.output.scales[0]
        count = max((r.numel() // max(1, steps.numel()) for r in reals), default=1)
        error = _UNIT * (8 + count) * (most + steps.abs())
        bounds = [(torch.round(steps + s * error) + self.point).reshape(-1, 1) for s in (-1, 1)]
        low, high = bounds if rows is None else (b[rows] for b in bounds)
        return low, high


def _power(count: int) -> int:
    """The power of two from a count up."""
    return 1 << (count - 1).bit_length()


def _real(x: Tensor, grid: QParams | None) -> Tensor:
    if grid is None:
        return x.double()
    return (x.to(torch.int64) - int(grid.zero_points[0])).double() * grid.scales[0]


def _with_quantized_dtypes(op: OpParameters) -> OpParameters:
    names = {torch.uint8: torch.quint8, torch.int8: torch.qint8}
    grids = tuple(q and replace(q, dtype=names.get(q.dtype, q.dtype)) for q in op.input_qparams)
    output = op.output and replace(op.output, dtype=names.get(op.output.dtype, op.output.dtype))
    return replace(op, input_qparams=grids, output=output)

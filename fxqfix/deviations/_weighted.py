"""Linear ops and convolutions under any recipe: sums, overflow, bias, multiplier, rounding."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from fxqfix.deviations._base import DUE, Recipe
from fxqfix.deviations._roundings import FIXED, fixed, rounded
from fxqfix.deviations._subject import Context, Subject
from fxqfix.deviations._sums import SAMPLE, Sums
from fxqfix.engines import Weighted
from fxqfix.engines._requantize import Onednn
from fxqfix.engines.saturation import pairing
from fxqfix.errors import UnsupportedError
from fxqfix.export import Reference
from fxqfix.export.requantize import int32_bias, multipliers
from fxqfix.export.walk import Seen

__all__ = ["WeightedSubject"]

_UNIT = 2.0**-24  # what a float32 sum can be off by, relative to its largest part
_SUMS = ("x", "cast", "x_shift", "x_point", "pad", "w", "w_point", "pairs")
_CHUNK = 2**22


class WeightedSubject(Subject):
    """A linear op or a convolution; a row is all channels of one output position."""

    handles = Subject.handles | {
        *_SUMS,
        *("overflow", "bias", "engine", "multiplier", "channels", "shift", "rounding", "order"),
    }

    def __init__(self, seen: Seen, context: Context) -> None:
        op = seen.op
        self.size = (
            tuple(seen.found.shape[2:])
            if op.op.startswith("conv") and seen.found is not None
            else ()
        )
        super().__init__(seen, context)
        x = seen.inputs[0]
        assert isinstance(x, Tensor)
        kernel = self.reference.kernel
        order = ""
        if isinstance(kernel, Weighted) and kernel.lost is not None and self.reference.call:
            order = pairing(self.reference.call)
        self.sums = Sums(op, context.parameters, x, self.size, seen.image, order)
        self._kernels: dict[tuple[str, bool], Weighted | None] = {}
        self._sums: dict[tuple[object, ...], Tensor | None] = {}
        self._last: tuple[tuple[object, ...], dict[int, Tensor | None]] = ((), {})
        assert op.weight_qparams is not None
        self.source = op.input_qparams[0]
        self.scales = self._channel_scales()

    def in_rows(self, value: Tensor) -> Tensor:
        """Channels last."""
        last = value.movedim(1, -1) if self.size else value
        return last.reshape(-1, last.shape[-1]).to(torch.int64)

    def _channel_scales(self) -> Tensor:
        grid = self.op.weight_qparams
        assert grid is not None
        scales = torch.tensor(grid.scales, dtype=torch.float64)
        return scales.repeat(self.found.shape[1] // len(scales))

    # ---- sums

    def whole(self, recipe: Recipe, rows: Tensor | None) -> Tensor | None:
        """In parts, where all rows together would take too much memory."""
        if rows is not None:
            return self._whole(recipe, rows)
        step = max(1, _CHUNK // max(1, self.sums.count * self.sums.groups + self.found.shape[1]))
        parts = [
            self._whole(recipe, r)
            for r in torch.arange(len(self.found)).tensor_split(-(-len(self.found) // step) or 1)
        ]
        whole = [p for p in parts if p is not None]
        return torch.cat(whole) if len(whole) == len(parts) else None

    def _summed(self, recipe: Recipe, rows: Tensor) -> Tensor | None:
        if len(rows) > SAMPLE:  # of the whole dump: those of the last recipe are kept
            key = recipe.key(_SUMS)
            if self._last[0] != key:
                self._last = (key, {})
            first = int(rows[0])
            if first not in self._last[1]:
                due = self._due_sums if recipe.key(_SUMS) == Recipe().key(_SUMS) else None
                self._last[1][first] = self.sums.at(recipe, rows) if due is None else due[rows]
            return self._last[1][first]
        sample = (*recipe.key(_SUMS), *rows.tolist())
        if sample not in self._sums:
            self._sums[sample] = self.sums.at(recipe, rows)
        return self._sums[sample]

    def _whole(self, recipe: Recipe, rows: Tensor) -> Tensor | None:
        sums = self._summed(recipe, rows)
        if sums is None:
            return None
        if recipe.overflow.startswith("steps-"):
            stepped = self._stepped(sums, recipe, rows)
            if stepped is None:
                return None
            sums = stepped
        elif recipe.overflow != DUE:
            sums = self._overflown(sums, recipe)
        return self._requantized(sums, recipe, self._others(rows))

    @cached_property
    def _due_sums(self) -> Tensor | None:
        """The kernel's own sums in rows, which take less time; None where it has no exact ones."""
        kernel, x = self.reference.kernel, self.seen.inputs[0]
        tiles = isinstance(kernel, Onednn) and kernel.row.tiles
        if not isinstance(kernel, Weighted) or tiles or not isinstance(x, Tensor):
            return None
        found: Tensor = kernel.accumulate(x).double()
        found = found if kernel.lost is None else found - kernel.lost(x)
        last = found.movedim(1, -1) if self.size else found
        return last.reshape(-1, last.shape[-1])

    def _others(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Further inputs of fused kernels, in rows."""
        return tuple(self.in_rows(x)[rows] for x in self.seen.inputs[1:] if isinstance(x, Tensor))

    def _stepped(self, sums: Tensor, recipe: Recipe, rows: Tensor) -> Tensor | None:
        """Sums that saturate after each product, added one by one where one can."""
        _, bits, order = recipe.overflow.split("-")
        top = 2.0 ** (int(bits) - 1)
        most = self.sums.magnitudes(recipe, rows)
        if most is not None and float(most.max()) < top:
            return sums
        return self.sums.saturated(recipe, rows, top, order)

    def _overflown(self, sums: Tensor, recipe: Recipe) -> Tensor:
        kind, bits, *more = recipe.overflow.split("-")
        bias = self._bias(recipe.bias) if more else torch.zeros(1)
        top = 2.0 ** (int(bits) - 1)
        total = sums + bias
        if kind == "wrap":
            total = (total + top).remainder(2 * top) - top
        return total.clamp(-top, top - 1) - bias

    # ---- bias

    @cached_property
    def steps(self) -> Tensor:
        """The bias in units of the accumulator, float64, not rounded."""
        bias = self.op.bias
        if bias is None or self.source is None:
            return torch.zeros(1, dtype=torch.float64)
        return bias.double() / (self.source.scales[0] * self.scales)

    @cached_property
    def int32_bias(self) -> Tensor:
        """The bias as an int32."""
        if self.op.bias is None or self.source is None:
            return torch.zeros(1, dtype=torch.float64)
        return int32_bias(self.op.bias, self.source.scales[0], self.scales.float()).double()

    def _bias(self, how: str) -> Tensor:
        """What is added to the sums, in units of the accumulator."""
        whole, steps = self.int32_bias, self.steps
        if how in ("none", "after", "after-steps"):
            return torch.zeros(1, dtype=torch.float64)
        if how in ("truncated", "floor", "up", "away"):
            return rounded(steps, "zero" if how == "truncated" else how)
        if how == "float":
            return steps
        if how == "twice":
            return 2 * whole
        if how == "negative":
            return -whole
        if how.startswith("clamp-"):
            top = 1 << (int(how.removeprefix("clamp-")) - 1)
            return whole.clamp(-top, top - 1)
        if how.startswith("wrap-"):
            top = 1 << (int(how.removeprefix("wrap-")) - 1)
            return (whole + top).remainder(2 * top) - top
        if how in ("largest-scale", "first-scale"):  # one scale for all channels
            one = self.scales.max() if how == "largest-scale" else self.scales[0]
            return torch.round(steps * self.scales / one)
        if how == "output-scale":  # rounded to codes of the output, and brought back
            codes = torch.round(steps * self.real)
            return codes / self.real
        if how == "weight-scale" and self.source is not None:
            return torch.round(steps * self.source.scales[0])
        if how == "input-scale":
            return torch.round(steps * self.scales)
        return whole

    # ---- requantization

    @cached_property
    def real(self) -> Tensor:
        """The real multipliers, float64."""
        assert self.source is not None
        return self.source.scales[0] * self.scales / self.grid.scales[0]

    def kernel(self, engine: str, biased: bool) -> Weighted | None:
        """The engine's own requantization; None where that is not known.

        Args:
            engine: Its name; "due" for the reference's.
            biased: Whether it adds the bias.
        """
        key = (engine, biased)
        if key not in self._kernels:
            self._kernels[key] = self._built(engine, biased)
        return self._kernels[key]

    def _built(self, engine: str, biased: bool) -> Weighted | None:
        arithmetic = self.reference.arithmetic
        if engine == DUE and biased:
            own = self.reference.kernel
            return own if isinstance(own, Weighted) else None
        if arithmetic.decomposed and engine == DUE:
            return None
        if engine != DUE:
            from_here = arithmetic.of(engine, arithmetic.isa or "vnni", arithmetic.threads)
            arithmetic = replace(from_here, point_first=arithmetic.point_first)
        op = self.op if biased else replace(self.op, bias=None)
        if engine != DUE and op.weight_qparams is not None:  # their kernels take quint8
            quantized = {torch.uint8: torch.quint8, torch.int8: torch.qint8}
            grids = tuple(
                None if q is None else replace(q, dtype=quantized.get(q.dtype, q.dtype))
                for q in op.input_qparams
            )
            op = replace(op, input_qparams=grids)
        try:
            found = Reference(op, arithmetic).kernel
        except UnsupportedError:
            return None
        own = self.reference.kernel
        if engine == DUE and isinstance(found, Onednn) and isinstance(own, Onednn):
            found.row = own.row
        return found if isinstance(found, Weighted) else None

    def _requantized(
        self, sums: Tensor, recipe: Recipe, others: tuple[Tensor, ...]
    ) -> Tensor | None:
        changed = any(v != DUE for v in recipe.key(("multiplier", "channels", "rounding")))
        if not changed and not recipe.shift:
            whole = self._by_kernel(sums, recipe, others)
        else:
            whole = self._explicit(sums, recipe)
        if whole is None or recipe.bias not in ("after", "after-steps"):
            return whole
        steps = self.steps * self.real
        return whole + torch.round(steps)

    def _by_kernel(self, sums: Tensor, recipe: Recipe, others: tuple[Tensor, ...]) -> Tensor | None:
        if self.reference.arithmetic.decomposed and recipe.engine == DUE:
            return self._decomposed(sums, recipe)
        due = recipe.bias == DUE
        kernel = self.kernel(recipe.engine, due)
        if kernel is None:
            return None
        sums = sums if due else sums + self._bias(recipe.bias)
        dims = len(self.size)
        shape = (*sums.shape, *(1,) * dims)
        # It uses its sums up, and these are kept.
        found = kernel.requantize(sums.reshape(shape).clone(), *(o.reshape(shape) for o in others))
        return found.reshape(sums.shape).double()

    def _decomposed(self, sums: Tensor, recipe: Recipe) -> Tensor:
        return torch.round(self._steps(sums, recipe)).double() + self.point

    def _steps(self, sums: Tensor, recipe: Recipe) -> Tensor:
        """Dequantized, the exact value in float32, in steps of the output as `quantize` has it."""
        assert self.source is not None
        bias = self.steps if recipe.bias == DUE else self._bias(recipe.bias)
        value = (sums + bias) * (self.source.scales[0] * self.scales)
        inverse = 1.0 / torch.tensor(self.grid.scales[0], dtype=torch.float32)
        return value.float() * inverse

    def spread(self, recipe: Recipe, rows: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """By the bound of float sums: as many half units of the largest as there are products."""
        if not self.reference.arithmetic.decomposed:
            return None
        rows = torch.arange(len(self.found)) if rows is None else rows
        sums, sizes = self._summed(recipe, rows), self.sums.magnitudes(recipe, rows)
        if sums is None or sizes is None:
            return None
        steps = self._steps(sums, recipe).double()
        most = (sizes + self.steps.abs()) * self.real
        error = most * _UNIT * (self.sums.count + 4)
        low, high = (torch.round(steps + sign * error) + self.point for sign in (-1, 1))
        return low, high

    def _explicit(self, sums: Tensor, recipe: Recipe) -> Tensor | None:
        how = "even" if recipe.rounding == DUE else recipe.rounding
        scales = self._scales(recipe.channels)
        if scales is None or self.source is None:
            return None
        bias = self.int32_bias if recipe.bias == DUE else self._bias(recipe.bias)
        kind = recipe.multiplier
        xs, os = self.source.scales[0], self.grid.scales[0]
        if kind == DUE and recipe.channels == DUE:
            value = self._value(sums, recipe)
            if value is None:
                return None
            return rounded(value * 2.0**recipe.shift, how) + self.point
        single = multipliers(xs, scales.float(), os)
        if kind in FIXED:
            how = "up" if recipe.rounding == DUE else recipe.rounding
            return fixed(sums + bias, single, kind, how, recipe.shift) + self.point
        if kind == "f64":
            value = (sums + bias) * (xs * scales / os)
        elif kind == "f32-inverse":
            step = scales.float() * torch.tensor(xs, dtype=torch.float32)
            value = (sums + bias).float() * (step * (1.0 / torch.tensor(os, dtype=torch.float32)))
        else:
            value = (sums + bias).float() * single
        return rounded(value.double() * 2.0**recipe.shift, how) + self.point

    def _value(self, sums: Tensor, recipe: Recipe) -> Tensor | None:
        """What the reference rounds, in steps."""
        if self.reference.arithmetic.decomposed and recipe.engine == DUE:
            return self._steps(sums, recipe).double()
        due = recipe.bias == DUE
        kernel = self.kernel(recipe.engine, due)
        if kernel is None:
            return None
        sums = sums if due else sums + self._bias(recipe.bias)
        shape = (*sums.shape, *(1,) * len(self.size))
        return kernel.scaled(sums.reshape(shape).clone()).reshape(sums.shape).double()

    def _scales(self, channels: str) -> Tensor | None:
        """Which scale each channel gets."""
        own = self.scales
        if channels == DUE:
            return own
        if len(set(own.tolist())) == 1:
            return None  # the same for all
        picks = {
            "first": own[:1].expand_as(own),
            "largest": own.max().expand_as(own),
            "mean": own.mean().expand_as(own),
            "rolled": own.roll(1),
            "rolled-back": own.roll(-1),
            "reversed": own.flip(0),
        }
        return picks[channels]

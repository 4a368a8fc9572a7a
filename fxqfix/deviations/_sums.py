"""Exact sums of products at some positions of a weighted op, with anything in it changed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fxqfix.deviations._base import DUE, Recipe
from fxqfix.deviations._layouts import arranged, columns, weight_as
from fxqfix.engines._accumulate import by_output
from fxqfix.engines.saturation import pairs_of_weights
from fxqfix.export import OpParameters, Parameters
from fxqfix.qparams import container_range

__all__ = ["SAMPLE", "Patches", "Sums"]

SAMPLE = 128  # rows of a sample at most; what they give is kept

_LOW, _HIGH = -(2**15), 2**15 - 1


@dataclass(frozen=True)
class Patches:
    """What some outputs are computed from.

    Attributes:
        raw: Codes, (rows, positions of the kernel, channels); 0 outside of the image.
        inside: (rows, positions): whether there is one.
    """

    raw: Tensor
    inside: Tensor


class Sums:
    """The sums of one op.

    Args:
        op: A linear op or a convolution.
        parameters: All ops, for the weights of others.
        x: The device's input codes.
        size: The output's size per axis, () for linear.
        image: What a flattened input was.
        order: How the reference's pairs of products saturate; "" for not at all.
    """

    def __init__(
        self,
        op: OpParameters,
        parameters: Parameters,
        x: Tensor,
        size: tuple[int, ...],
        image: tuple[int, ...],
        order: str,
    ) -> None:
        assert op.weight is not None
        assert op.input_qparams[0]
        self.op, self.parameters, self.image, self.order = op, parameters, image, order
        self.source, self.size = op.input_qparams[0], size
        self.point = int(self.source.zero_points[0])
        self.transposed = "transpose" in op.op
        self.groups = int(op.options.get("groups", 1)) if size else 1
        self.x = self._image(x)
        self.solved: Tensor | None = None  # the weight that a device's codes follow from
        self._patches: dict[tuple[object, ...], Patches | None] = {}

    def _image(self, x: Tensor) -> Tensor:
        """Linear's rows are images of one point; other padding modes are padded here."""
        if not self.size:
            return x.reshape(-1, x.shape[-1], 1).contiguous()
        mode = self.op.options.get("padding_mode", "zeros")
        if mode == "zeros":
            return x.contiguous()
        margin = [n for n in reversed(self.op.options["padding"]) for _ in range(2)]
        return F.pad(x.double(), margin, mode=mode).to(x.dtype)

    def _options(self, name: str, default: int) -> tuple[int, ...]:
        if not self.size:
            return (default,)
        if name == "padding" and self.op.options.get("padding_mode", "zeros") != "zeros":
            return (0,) * len(self.size)
        return tuple(self.op.options.get(name, (default,) * len(self.size)))

    def patches(self, arrangement: str, rows: Tensor) -> Patches | None:
        """The codes behind some outputs.

        Args:
            arrangement: How the activations lie.
            rows: Which outputs, as numbers of (image, position).
        """
        if len(rows) > SAMPLE:
            return self._gathered(arrangement, rows)
        key = (arrangement, *rows.tolist())
        if key not in self._patches:
            self._patches[key] = self._gathered(arrangement, rows)
        return self._patches[key]

    def _arranged(self, name: str) -> Tensor | None:
        if name == DUE:
            return self.x
        if not self.size:
            order = columns(self.x.shape[1], self.image, name)
            return None if order is None else self.x[:, order]
        return arranged(self.x, name)

    def _gathered(self, arrangement: str, rows: Tensor) -> Patches | None:
        x = self._arranged(arrangement)
        if x is None or self.op.weight is None:
            return None
        kernel = tuple(self.op.weight.shape[2:]) or (1,)
        size, sizes = self.size or (1,), tuple(x.shape[2:])
        rest, at = rows, []
        for n in reversed(size):
            at.append(rest % n)
            rest = rest // n
        flat, inside = torch.zeros(len(rows), 1, dtype=torch.int64), torch.ones(len(rows), 1) > 0
        options = (self._options(n, d) for n, d in (("stride", 1), ("padding", 0), ("dilation", 1)))
        for o, n, k, s, p, d in zip(reversed(at), sizes, kernel, *options, strict=True):
            steps = torch.arange(k) * d
            if self.transposed:
                wide = o[:, None] + p - steps
                place, good = wide.div(s, rounding_mode="floor"), wide % s == 0
            else:
                place = o[:, None] * s - p + steps
                good = torch.ones_like(place, dtype=torch.bool)
            good = good & (place >= 0) & (place < n)
            flat = (flat[:, :, None] * n + place.clamp(0, n - 1)[:, None]).flatten(1)
            inside = (inside[:, :, None] & good[:, None]).flatten(1)
        raw = x.flatten(2).movedim(1, 2)[rest[:, None], flat].to(torch.float64)
        return Patches(raw * inside[:, :, None], inside)

    def weight(self, recipe: Recipe) -> Tensor | None:
        """(outputs, positions, channels), zero points off, as the recipe has it."""
        codes, grid = self._codes(recipe), self.op.weight_qparams
        assert grid is not None
        if codes is None:
            return None
        wide = codes.to(torch.float64)
        if recipe.w_point == DUE:
            points = torch.tensor(grid.zero_points, dtype=torch.float64)
            shape = [1] * wide.dim()
            shape[grid.axis or 0] = -1
            wide = wide - points.reshape(shape)
        rows = by_output(wide, self.groups) if self.transposed else wide
        return rows.flatten(2).movedim(1, 2) if rows.dim() > 2 else rows[:, None]

    def _codes(self, recipe: Recipe) -> Tensor | None:
        """The weight's raw codes."""
        codes = self.op.weight
        assert codes is not None
        if recipe.w == "solved":
            return self.solved
        if recipe.w.startswith("op:"):
            other = self.parameters[recipe.w.removeprefix("op:")].weight
            assert other is not None
            codes = other
        elif recipe.w != DUE:
            found = weight_as(codes, recipe.w)
            if found is None:
                return None
            codes = found
        return codes

    def at(self, recipe: Recipe, rows: Tensor) -> Tensor | None:
        """The sums, float64 (rows, outputs), without bias."""
        patches, weight = self.patches(recipe.x, rows), self.weight(recipe)
        if patches is None or weight is None:
            return None
        raw = self._cast(patches.raw, recipe) + recipe.x_shift
        point = self.point if recipe.x_point == DUE else 0
        outside = {DUE: 0, "zero": -point, "point": self.point - point}[recipe.pad]
        x = torch.where(patches.inside[:, :, None], raw - point, float(outside))
        found = self.product(x, weight)
        order = self.order if recipe.pairs == DUE else recipe.pairs.removesuffix("none")
        if order:
            lost = self.lost(patches, order, recipe)
            found = found if lost is None else found - lost
        return found

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Sums of (rows, positions, channels) by (outputs, positions, channels / groups)."""
        count, g = len(x), self.groups
        parts = x.reshape(count, x.shape[1], g, -1).permute(2, 0, 1, 3).reshape(g, count, -1)
        rows = weight.reshape(g, weight.shape[0] // g, -1).transpose(1, 2)
        return torch.bmm(parts, rows).transpose(0, 1).reshape(count, -1)

    def saturated(self, recipe: Recipe, rows: Tensor, top: float, order: str) -> Tensor | None:
        """The sums where the accumulator is clamped to [-top, top) after each product.

        Args:
            recipe: The recipe.
            rows: Which outputs.
            top: Half of the accumulator's range.
            order: In which the products are added: "ohwi" or "oihw".
        """
        patches, weight = self.patches(recipe.x, rows), self.weight(recipe)
        if patches is None or weight is None:
            return None
        x = torch.where(patches.inside[:, :, None], patches.raw - self.point, 0.0)
        count, g = len(x), self.groups
        parts = x.reshape(count, x.shape[1], g, -1).permute(2, 0, 1, 3)
        columns = weight.reshape(g, weight.shape[0] // g, *weight.shape[1:])
        if order == "oihw":
            parts, columns = parts.transpose(2, 3), columns.transpose(2, 3)
        parts, columns = parts.flatten(2), columns.flatten(2)
        total = torch.zeros(g, count, columns.shape[1], dtype=torch.float64)
        for step in range(parts.shape[2]):
            total += parts[:, :, None, step] * columns[:, None, :, step]
            total.clamp_(-top, top - 1)
        return total.transpose(0, 1).reshape(count, -1)

    def magnitudes(self, recipe: Recipe, rows: Tensor) -> Tensor | None:
        """Sums of absolute products: what bounds the error of float sums."""
        patches, weight = self.patches(recipe.x, rows), self.weight(recipe)
        if patches is None or weight is None:
            return None
        x = torch.where(patches.inside[:, :, None], patches.raw - self.point, 0.0)
        return self.product(x.abs(), weight.abs())

    def _cast(self, raw: Tensor, recipe: Recipe) -> Tensor:
        if recipe.cast == DUE:
            return raw
        low, high = container_range(getattr(torch, recipe.cast))
        return (raw - low).remainder(high - low + 1) + low

    def lost(self, patches: Patches, order: str, recipe: Recipe) -> Tensor | None:
        """What the sums lose where pairs of raw products saturate at 16 bits."""
        codes = self._codes(recipe)
        if codes is None:
            return None
        rows = by_output(codes, self.groups) if self.transposed else codes
        values, places = pairs_of_weights(rows, order)
        lift = -self.source.container[0]
        outside = float(self.point if order == "flat" else 0)
        raw = self._cast(patches.raw, recipe) + recipe.x_shift
        x = torch.where(patches.inside[:, :, None], raw + lift, outside)
        count, g = len(x), self.groups
        flat = x.reshape(count, x.shape[1], g, -1).permute(2, 0, 1, 3).reshape(g, count, -1)
        first, second = torch.tensor(places).T
        pairs = values.reshape(g, -1, *values.shape[1:]).double()
        total = []
        for part, w in zip(flat, pairs, strict=True):
            both = (
                part[:, None, first] * w[None, :, :, 0] + part[:, None, second] * w[None, :, :, 1]
            )
            total.append((both - both.clamp(_LOW, _HIGH)).sum(-1))
        return torch.stack(total, 1).reshape(count, -1)

    @property
    def count(self) -> int:
        """Products per sum."""
        assert self.op.weight is not None
        return math.prod(self.op.weight.shape) // max(1, self.op.weight.shape[int(self.transposed)])

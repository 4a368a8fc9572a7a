"""A prepared weight on the converted grid, and what of the converted one is no rounding of it.

Scales and zero points are one correction, values are another: what a cause gives a weight are the
prepared values on the converted grid, never the converted codes as they are.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fxqfix.dialects.weights import WeightView
from fxqfix.evidence.places import Places
from fxqfix.qparams import QParams, dequantize, quantize

__all__ = ["WeightPair", "bias_apart", "cut", "of_its_own"]

_WIDTH = 4 * 2.0**-24  # relative: what folding and quantizing in another order may round apart
_FOLDED = 2.0**-10  # codes of the output: folding BatchNorm in another order moves a bias by less
_FLOAT = 2.0**-22  # relative: a bias through float32 and back


def near(mine: WeightView, theirs: WeightView) -> Tensor:
    """Mask of the converted codes that are a rounding of the prepared values on their grid."""
    if mine.values is None or mine.values.shape != theirs.codes.shape:
        return torch.ones_like(theirs.codes, dtype=torch.bool)
    found = _rounds(mine.values, theirs)
    same = not mine.qparams.same_grid(theirs.qparams) and not bool(found.all())
    if same and torch.equal(mine.codes.int(), theirs.codes.int()):  # under another scale
        return torch.ones_like(found)
    return found


def _rounds(values: Tensor, theirs: WeightView) -> Tensor:
    # The float32 rounding is one that the width allows: float64 is for the others alone.
    found = quantize(values, theirs.qparams) == theirs.codes
    places = Places(found.shape, found.device, (~found).flatten().nonzero().squeeze(1))
    if len(places):
        found.view(-1)[places.at] = _near(values, theirs, places)
    return found


def _near(values: Tensor, theirs: WeightView, places: Places) -> Tensor:
    scale, point = places.grid(theirs.qparams)
    scaled = places.take(values).double() / scale
    width = _WIDTH * (scaled.abs() + point.abs() + 1.0)
    low, high = torch.round(scaled + point - width), torch.round(scaled + point + width)
    limits = theirs.qparams.quant_min, theirs.qparams.quant_max
    codes = places.take(theirs.codes).double()
    return (low.clamp(*limits) <= codes) & (codes <= high.clamp(*limits))


def cut(mine: WeightView, theirs: WeightView) -> Tensor:
    """Mask of the converted codes that have a fractional zero point added last and cut off."""
    none = torch.zeros_like(theirs.codes, dtype=torch.bool)
    grid = theirs.qparams
    if mine.values is None or all(float(z).is_integer() for z in grid.zero_points):
        return none
    scale, point = grid.tensors(mine.values)
    scaled = mine.values.float() * (1.0 / scale)
    ways = (torch.round(scaled) + point, torch.round(scaled) + point.trunc())
    codes = theirs.codes.int()
    found = [way.clamp(grid.quant_min, grid.quant_max).to(torch.int32) == codes for way in ways]
    return (found[0] | found[1]) & ~near(mine, theirs)


def of_its_own(mine: WeightView, theirs: WeightView) -> Tensor:
    """Mask of the converted codes that no rounding of the prepared values explains."""
    return ~near(mine, theirs) & ~cut(mine, theirs)


def bias_apart(mine: WeightView, theirs: WeightView, step: float) -> float:
    """How far the biases are apart, in real values; 0.0 where rounding explains it.

    Args:
        mine: The prepared weight.
        theirs: The converted one; without a bias it has zeros, which torch packs.
        step: One code of the op's output.
    """
    held = [b.detach().double() for b in (mine.bias, theirs.bias) if b is not None]
    if not held:
        return 0.0
    held += [torch.zeros_like(held[0])] * (2 - len(held))
    apart = (held[0] - held[1]).abs()
    allowed = _FLOAT * held[0].abs() + (_FOLDED * step if mine.folded else 0.0)
    return float(apart.max()) if bool((apart > allowed).any()) else 0.0


class WeightPair:
    """A prepared weight and its converted partner; what follows from both is computed once.

    Args:
        mine: The prepared weight.
        theirs: The converted one.
    """

    def __init__(self, mine: WeightView, theirs: WeightView) -> None:
        self.mine, self.theirs = _stored(mine), _stored(theirs)
        self._settled: dict[tuple[Any, ...], WeightView] = {}

    @cached_property
    def same_grid(self) -> bool:
        """Whether equal codes stand for equal values."""
        return self.mine.qparams.same_grid(self.theirs.qparams)

    @cached_property
    def near(self) -> Tensor:
        """See `near`."""
        return near(self.mine, self.theirs)

    @cached_property
    def relabelled(self) -> bool:
        """Whether the prepared codes stand on another grid, and are no rounding of values there."""
        mine, theirs = self.mine, self.theirs
        if mine.values is None or mine.values.shape != theirs.codes.shape or self.same_grid:
            return False
        if not torch.equal(mine.codes.int(), theirs.codes.int()):
            return False
        return not bool(_rounds(mine.values, theirs).all())

    @cached_property
    def own(self) -> int:
        """How many converted codes no rounding of the prepared values explains."""
        if bool(self.near.all()):
            return 0
        return int(torch.count_nonzero(of_its_own(self.mine, self.theirs)))

    @cached_property
    def cut(self) -> int:
        """How many converted codes have the fraction of their zero point cut off."""
        return int(torch.count_nonzero(cut(self.mine, self.theirs)))

    @cached_property
    def widened(self) -> bool:
        """Whether the codes differ by nothing but a clamp to the declared range."""
        a, b = self.mine.codes.to(torch.int32), self.theirs.codes.to(torch.int32)
        if a.shape != b.shape or not self.same_grid or torch.equal(a, b):
            return False
        qparams = self.mine.qparams
        return torch.equal(b.clamp(qparams.quant_min, qparams.quant_max), a)

    def bias_apart(self, step: float) -> float:
        """See `bias_apart`."""
        if step not in self._bias:
            self._bias[step] = bias_apart(self.mine, self.theirs, step)
        return self._bias[step]

    @cached_property
    def _bias(self) -> dict[float, float]:
        return {}

    def differs(self, step: float) -> bool:
        """Whether weights or biases have other values; see `of_its_own` and `bias_apart`."""
        return self.bias_apart(step) > 0.0 or self.own > 0

    @cached_property
    def swapped(self) -> WeightView:
        """The prepared weight on its own grid, with the converted values where those are others."""
        mine, theirs = self.mine, self.theirs
        codes = quantize(dequantize(theirs.codes, theirs.qparams), mine.qparams)
        if mine.values is not None and mine.values.shape == codes.shape:
            codes = torch.where(of_its_own(mine, theirs), codes, mine.codes.int())
        return self._known(replace(mine, codes=codes, bias=self._their_bias))

    @cached_property
    def otherwise_rounded(self) -> WeightView:
        """The prepared weight, with those converted codes of one grid that round its values too."""
        mine, theirs = self.mine, self.theirs
        alike = mine.values is not None and mine.values.shape == theirs.codes.shape
        if not alike or not self.same_grid or torch.equal(mine.codes, theirs.codes):
            return mine
        codes = torch.where(self.near, theirs.codes.int(), mine.codes.int())
        same = torch.equal(codes, mine.codes.int())
        return mine if same else self._known(replace(mine, codes=codes))

    @property
    def _their_bias(self) -> Tensor | None:
        if self.theirs.bias is None and self.mine.bias is not None:
            return torch.zeros_like(self.mine.bias)
        return self.theirs.bias

    def settled(self, grid: QParams, step: float, corrected: Container[str]) -> WeightView:
        """The prepared weight on a grid, with what these causes correct of its values.

        Args:
            grid: The grid to put it on.
            step: One code of the op's output.
            corrected: Names of causes: "zero-point-cut", "other-weights".
        """
        same = self.bias_apart(step) == 0.0 or "other-weights" in corrected
        names = tuple(name in corrected for name in ("zero-point-cut", "other-weights"))
        key = grid, grid is self.theirs.qparams, grid is self.mine.qparams, same, *names
        if key not in self._settled:
            bias = self._their_bias if same else self.mine.bias
            self._settled[key] = self._known(self._on(grid, bias, corrected))
        return self._settled[key]

    def _on(self, grid: QParams, bias: Tensor | None, corrected: Container[str]) -> WeightView:
        mine, theirs = self.mine, self.theirs
        if mine.values is None:
            return theirs if grid is theirs.qparams else mine
        if grid is not theirs.qparams:
            codes = mine.codes if grid is mine.qparams else quantize(mine.values, grid)
            return replace(mine, codes=codes, qparams=grid, bias=bias)
        if mine.values.shape != theirs.codes.shape or "other-weights" in corrected:
            return replace(theirs, bias=bias)
        taken = self.near
        if bool(taken.all()):
            return replace(theirs, bias=bias)
        if "zero-point-cut" in corrected:
            taken = taken | cut(mine, theirs)
        codes = torch.where(taken, theirs.codes.int(), quantize(mine.values, grid))
        return replace(theirs, codes=codes, bias=bias)

    def _known(self, found: WeightView) -> WeightView:
        """The weight, with codes that are there already in place of equal ones."""
        found = _stored(found)
        for one in (self.mine, self.theirs):
            if one.codes.shape == found.codes.shape and torch.equal(one.codes, found.codes):
                return replace(found, codes=one.codes)
        return found


def _stored(weight: WeightView) -> WeightView:
    """Codes in a byte each, where they fit."""
    low, high = weight.qparams.container
    storage = weight.qparams.storage
    fits = storage.itemsize == 1 and weight.codes.dtype == torch.int32
    if not fits or (weight.qparams.quant_min < low) or (weight.qparams.quant_max > high):
        return weight
    return replace(weight, codes=weight.codes.to(storage))

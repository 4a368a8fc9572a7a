"""A prepared weight on the converted grid, and what of the converted one is no rounding of it.

Scales and zero points are one correction, values are another: what a cause gives a weight are the
prepared values on the converted grid, never the converted codes as they are.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

import torch
from torch import Tensor

from fxqfix.dialects.weights import WeightView
from fxqfix.qparams import QParams, dequantize, quantize

__all__ = ["bias_apart", "cut", "differs", "of_its_own", "otherwise_rounded", "settled", "swapped"]

_WIDTH = 4 * 2.0**-24  # relative: what folding and quantizing in another order may round apart
_FOLDED = 2.0**-10  # codes of the output: folding BatchNorm in another order moves a bias by less
_FLOAT = 2.0**-22  # relative: a bias through float32 and back


def near(mine: WeightView, theirs: WeightView) -> Tensor:
    """Mask of the converted codes that are a rounding of the prepared values on their grid."""
    if mine.values is None or mine.values.shape != theirs.codes.shape:
        return torch.ones_like(theirs.codes, dtype=torch.bool)
    scale, point = (t.double() for t in theirs.qparams.tensors(mine.values))
    scaled = mine.values.double() / scale
    width = _WIDTH * (scaled.abs() + point.abs() + 1.0)
    low, high = torch.round(scaled + point - width), torch.round(scaled + point + width)
    limits = theirs.qparams.quant_min, theirs.qparams.quant_max
    codes = theirs.codes.double()
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


def differs(mine: WeightView, theirs: WeightView, step: float) -> bool:
    """Whether weights or biases have other values; see `of_its_own` and `bias_apart`."""
    return bias_apart(mine, theirs, step) > 0.0 or bool(of_its_own(mine, theirs).any())


def swapped(mine: WeightView, theirs: WeightView) -> WeightView:
    """The prepared weight on its own grid, with the converted values where those are others."""
    codes = quantize(dequantize(theirs.codes, theirs.qparams), mine.qparams)
    if mine.values is not None and mine.values.shape == codes.shape:
        codes = torch.where(of_its_own(mine, theirs), codes, mine.codes.int())
    return replace(mine, codes=codes, bias=_their_bias(mine, theirs))


def otherwise_rounded(mine: WeightView, theirs: WeightView) -> WeightView:
    """The prepared weight, with those converted codes of one grid that round its values too."""
    alike = mine.values is not None and mine.values.shape == theirs.codes.shape
    if not alike or not mine.qparams.same_grid(theirs.qparams):
        return mine
    codes = mine.codes.int()
    return replace(mine, codes=torch.where(near(mine, theirs), theirs.codes.int(), codes))


def _their_bias(mine: WeightView, theirs: WeightView) -> Tensor | None:
    if theirs.bias is None and mine.bias is not None:
        return torch.zeros_like(mine.bias)
    return theirs.bias


def settled(
    mine: WeightView, theirs: WeightView, grid: QParams, step: float, corrected: Container[str]
) -> WeightView:
    """The prepared weight on a grid, with what these causes correct of its values.

    Args:
        mine: The prepared weight.
        theirs: The converted one.
        grid: The grid to put it on.
        step: One code of the op's output.
        corrected: Names of causes: "zero-point-cut", "other-weights".
    """
    same = bias_apart(mine, theirs, step) == 0.0 or "other-weights" in corrected
    bias = _their_bias(mine, theirs) if same else mine.bias
    if mine.values is None:
        return theirs if grid is theirs.qparams else mine
    if grid is not theirs.qparams:
        codes = mine.codes if grid is mine.qparams else quantize(mine.values, grid)
        return replace(mine, codes=codes, qparams=grid, bias=bias)
    if mine.values.shape != theirs.codes.shape or "other-weights" in corrected:
        return replace(theirs, bias=bias)
    taken = near(mine, theirs)
    if "zero-point-cut" in corrected:
        taken = taken | cut(mine, theirs)
    codes = torch.where(taken, theirs.codes.int(), quantize(mine.values, grid))
    return replace(theirs, codes=codes, bias=bias)

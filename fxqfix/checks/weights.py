"""Weights: values that no code stands for, codes that say nothing, values beyond their grid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxqfix.checks._base import Check, Finding, Subject
from fxqfix.dialects import Tap
from fxqfix.dialects._finite import non_finite
from fxqfix.dialects.weights import WeightView
from fxqfix.qparams import FLOOR

__all__ = ["CHECKS", "not_finite"]

# Of a weight's values beyond its range. An observer that averages lags behind, most of all where a
# BatchNorm scales the weight.
_SOME, _MANY = 0.1, 0.5


def not_finite(model: Any) -> Iterator[Finding]:
    """A finding per parameter with NaN or inf.

    Args:
        model: The model, of any kind.
    """
    for path, found in non_finite(model):
        remedy = "go back to a checkpoint from before training diverged"
        yield Finding("non-finite", "error", path, found, remedy)


def _finite(subject: Subject) -> Iterator[Finding]:
    return not_finite(subject.graph_module)


def _views(subject: Subject) -> Iterator[tuple[Tap, WeightView]]:
    for tap in subject.reading.weights:
        used = tap.site.used
        if used is not None and tap.weight is not None and tap.site.calibrated:
            yield tap, tap.weight()


def _dead(subject: Subject) -> Iterator[Finding]:
    for tap, view in _views(subject):
        axis = view.qparams.axis
        if axis is None:
            axis = int(tap.site.op.startswith("conv_transpose"))
        if not view.codes.dim():
            continue  # a number as a constant has no channels
        dead = _zero(view, axis)
        if view.qparams.axis is not None:
            dead |= torch.tensor(view.qparams.scales, device=dead.device) <= FLOOR
        places = dead.nonzero().flatten().tolist()
        if not places:
            continue
        which = f"{len(places)} of {len(dead)} channels have"
        if len(places) == len(dead):
            which = f"all {len(dead)} channels have"
        scale = view.qparams.scales[places[0] if view.qparams.axis is not None else 0]
        yield Finding(
            "dead-channel",
            "warning",
            tap.site.name,
            f"{which} (next to) no weights, first {places[0]}: scale {scale:.3g}",
            "prune them; BatchNorm behind a dead channel blows up what is left",
        )


def _zero(view: WeightView, axis: int) -> Tensor:
    """Mask of the channels all of whose codes stand for zero."""
    _, point = view.qparams.tensors(view.codes)
    nonzero = (view.codes != point).movedim(axis, 0).reshape(view.codes.shape[axis], -1)
    return ~nonzero.any(1)


def _saturated(subject: Subject) -> Iterator[Finding]:
    """Weights that were trained on behind their grid: it is frozen, or its observer is off."""
    for tap, view in _views(subject):
        if view.values is None or not tap.site.quantizes:
            continue
        scale, point = view.qparams.tensors(view.values)
        steps = view.values / scale + point
        low, high = view.qparams.quant_min, view.qparams.quant_max
        beyond = (steps < low - 1) | (steps > high + 1)
        share = float(beyond.sum()) / max(beyond.numel(), 1)
        if share < _SOME:
            continue
        yield Finding(
            "weight-saturated",
            "error" if share >= _MANY else "warning",
            tap.site.name,
            f"{int(beyond.sum())} of {beyond.numel()} values lie beyond the range of their grid, "
            f"{view.qparams}: their codes saturate",
            "prepare and observe again; a frozen grid does not follow weights that are trained on",
        )


PLACE = 50
CHECKS = (
    Check("non-finite", "parameters that are NaN or inf", _finite),
    Check("dead-channel", "weight channels that are zero", _dead),
    Check("weight-saturated", "weights beyond the range of their grid", _saturated),
)

"""An input on which hypotheses differ that are equal on a device's own data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxqfix.deviations._subject import Context, Subject
from fxqfix.errors import FxqfixError
from fxqfix.export.walk import Seen
from fxqfix.qparams import QParams

if TYPE_CHECKING:
    from fxqfix.deviations._search import Hypothesis

__all__ = ["separation"]

_TRIES = 6
_IMAGES = 4


def separation(
    seen: Seen,
    context: Context,
    named: Sequence[Hypothesis],
    make: Callable[[Seen, Context], Subject],
) -> str:
    """Say an input of the op on which the first two that can be told apart differ.

    Args:
        seen: The op.
        context: Its neighbours.
        named: What explains its codes equally well.
        make: Makes the subject of a seen op.

    Returns:
        A sentence; "" for less than two hypotheses.
    """
    if len(named) < 2:
        return ""
    for text, inputs in _tries(seen):
        try:
            wanted = seen.reference.run(*inputs)
        except FxqfixError:
            continue
        if not isinstance(wanted, Tensor):
            continue
        other = replace(seen, inputs=tuple(inputs), wanted=wanted, found=wanted)
        found = _apart(make(other, context), named)
        if found:
            return f"{text}: {found}"
    needs = list(dict.fromkeys(d.needs for h in named for d in h.deviations if d.needs))
    hint = f"; what could: {' or '.join(needs)}" if needs else ""
    return f"none of {_TRIES} inputs tried tells them apart{hint}"


def _apart(subject: Subject, named: Sequence[Hypothesis]) -> str:
    first = subject.codes(named[0].recipe)
    for other in named[1:]:
        second = subject.codes(other.recipe)
        if first is None or second is None or first[0].shape != second[0].shape:
            continue
        differs = (first[0] != second[0]).nonzero()
        if len(differs):
            row, channel = differs[0].tolist()
            a, b = (c[0][row, channel].item() for c in (first, second))
            mine, others = ("+".join(h.names) for h in (named[0], other))
            shape = "x".join(map(str, subject.wanted.shape))
            where = f"at [{row}, {channel}] of {shape} (positions x channels)"
            return f"{where} {mine} gives {a:g}, {others} gives {b:g}"
    return ""


def _tries(seen: Seen) -> list[tuple[str, list[Tensor]]]:
    """Inputs of the op's own sizes: any codes, and the ends of the range."""
    sources = [x for x in seen.inputs if isinstance(x, Tensor)]
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(_TRIES):
        made = []
        for x, grid in zip(sources, seen.op.input_qparams, strict=True):
            shape = (min(len(x), _IMAGES), *x.shape[1:]) if x.dim() else x.shape
            low, high = (-4.0, 4.0) if grid is None else grid.container
            if index < _TRIES - 2:
                text = f"an input of any codes (torch.Generator seed 0, draw {index})"
                unit = torch.rand(shape, generator=generator)
                value = unit * (high - low) + low
                if grid is None:
                    value = _near_ties(value, seen.op.output)
            else:
                text = f"an input of {'highest' if index % 2 else 'lowest'} codes"
                value = torch.full(shape, float(high if index % 2 else low))
            made.append(value if grid is None else value.round().clamp(low, high).to(x.dtype))
        found.append((text, made))
    return found


def _near_ties(value: Tensor, grid: QParams | None) -> Tensor:
    """Floats that lie between two codes."""
    if grid is None:
        return value
    scale = torch.tensor(grid.scales[0], dtype=torch.float32)
    return ((value / scale).round() + 0.5) * scale

"""Which integer weights a device's codes follow from, if they follow from any."""

from __future__ import annotations

import torch
from torch import Tensor

from fxqfix.deviations._weighted import WeightedSubject

__all__ = ["solved"]

_MOST_ROWS, _MOST_TAPS, _SPARE, _PAIRS = 8192, 1024, 2, 64


def solved(subject: WeightedSubject) -> Tensor | None:
    """The codes of a weight, by least squares over the device's own inputs and codes.

    Each code tells its sum to half a step, so that many rows tell each weight to less than half of
    one. Codes at the ends of the range tell nothing. What is found counts only if it gives every
    code again, which whoever asks has to check.

    Args:
        subject: An op with a weight whose codes differ.

    Returns:
        Codes in the weight's own shape, due ones where no code differs; None where rows are too few
        or nothing else is found.
    """
    op, sums = subject.op, subject.sums
    grid, codes = op.weight_qparams, op.weight
    taps = sums.count
    if codes is None or grid is None or sums.transposed or taps > _MOST_TAPS:
        return None
    count = len(subject.found)
    rows = torch.linspace(0, count - 1, min(count, _MOST_ROWS)).long()
    patches = sums.patches("due", rows)
    if patches is None:
        return None
    x = torch.where(patches.inside[:, :, None], patches.raw - sums.point, 0.0)
    low, high = subject.limits
    found, due = subject.found[rows], codes.reshape(len(codes), -1).clone()
    differs = (subject.found != subject.wanted).any(0)
    step = 1.0 / subject.real
    per_group = len(codes) // sums.groups
    for channel in differs.nonzero().flatten().tolist():
        inner = found[:, channel]
        inside = (inner > low) & (inner < high)
        if int(inside.sum()) < _SPARE * taps + 8:
            return None
        c = channel // per_group * codes.shape[1]
        part = x[inside][:, :, c : c + codes.shape[1]].flatten(1)
        at = channel if len(step) > 1 else 0
        bias = subject.steps[channel if len(subject.steps) > 1 else 0]
        target = (inner[inside].double() - subject.point) * step[at] - bias
        weight = torch.linalg.lstsq(part, target[:, None]).solution.flatten().round()
        weight = _refined(part, target, weight, float(step[at]) / 2)
        point = grid.zero_points[channel if grid.axis is not None else 0]
        ends = grid.container
        # By position of the kernel, then channel; the weight's own order is the other way round.
        whole = (weight + point).clamp(*ends).reshape(-1, codes.shape[1]).T
        due[channel] = whole.flatten().to(codes.dtype)
    made = due.reshape(codes.shape)
    return None if torch.equal(made, codes) else made


def _refined(part: Tensor, target: Tensor, weight: Tensor, half: float) -> Tensor:
    """Steps of one weight, or of two, as long as more sums come within half a step of the codes."""

    def violation(left: Tensor) -> Tensor:
        return (left.abs() - half).clamp(min=0).square().sum(0)

    count = len(weight)
    steps = torch.cat([part, -part], 1)
    left = target - part @ weight
    now = float(violation(left))
    for _ in range(4 * count):
        if now == 0:
            break
        one = violation(left[:, None] - steps)
        moves = [int(one.argmin())]
        best = float(one[moves[0]])
        if best >= now and count <= _PAIRS:
            both = torch.stack([violation((left - s)[:, None] - steps) for s in steps.T])
            best, moves = float(both.min()), list(divmod(int(both.argmin()), 2 * count))
        if best >= now:
            break
        for move in moves:
            weight[move % count] += 1 if move < count else -1
            left = left - steps[:, move]
        now = best
    return weight

"""From one grid to another: which cause makes which step, by what a quantizer holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fxqfix.causes import Held
from fxqfix.evidence.steps import explain
from fxqfix.qparams import QParams


def grid(scale: float, point: int = 0) -> QParams:
    return QParams(scale, point, 0, 127, torch.quint8)


USED, GIVEN, MOVED, OTHER, BUFFERS = (grid(s) for s in (0.5, 0.25, 0.3, 0.7, 0.9))
FUSED = Held(USED, GIVEN, GIVEN, BUFFERS, "fused kernel", False, True, True)
PLAIN = replace(FUSED, source="buffers (FakeQuantize)", buffers=USED)
ON = replace(FUSED, observing=True)
FIXED = replace(FUSED, given=USED, moved=USED, buffers=USED, source="buffers", observed=False)


@pytest.mark.parametrize(
    ("held", "target", "inputs", "causes"),
    [
        (FUSED, USED, (), []),
        (FUSED, GIVEN, (), ["scale-formula"]),
        (FUSED, grid(0.25 * (1 + 1e-8)), (), ["scale-formula"]),  # through float32 and back
        (FUSED, grid(0.25, 1), (), ["stale-qparams"]),  # another zero point is another grid
        (FUSED, BUFFERS, (), ["stale-qparams"]),  # an exporter that copies buffers
        (FUSED, OTHER, (), ["stale-qparams"]),  # a state_dict that came later
        (PLAIN, GIVEN, (), ["stale-qparams"]),
        (ON, GIVEN, (), ["scale-formula"]),
        (ON, OTHER, (), ["moving-observer"]),
        (replace(ON, still=True), OTHER, (), ["other-qparams"]),  # the others did not move
        (ON, grid(0.5, 1), (), ["other-qparams"]),  # a range that moves changes its scale
        (replace(ON, moved=MOVED), MOVED, (), ["scale-formula", "moving-observer"]),
        (replace(ON, given=USED, moved=MOVED), MOVED, (), ["moving-observer"]),
        (FUSED, OTHER, (GIVEN, OTHER), ["shared-qparams"]),
        (FUSED, GIVEN, (GIVEN,), ["scale-formula"]),  # its own observer gives it
        (replace(FUSED, calibrated=False), grid(1.0), (), ["uncalibrated"]),
        (FIXED, OTHER, (), ["other-qparams"]),
        (replace(ON, seen=(0.0, 0.7 * 127)), OTHER, (), ["moving-observer"]),
        (replace(ON, seen=(0.0, 0.6 * 127)), OTHER, (), ["other-qparams"]),  # nothing was so large
        (replace(ON, seen=(0.0, 0.7 * 127)), grid(0.3, 5), (), ["other-qparams"]),  # or so small
        (FIXED, OTHER, (OTHER,), ["shared-qparams"]),
    ],
)
def test_each_state_leads_to_its_cause(
    held: Held, target: QParams, inputs: tuple[QParams, ...], causes: list[str]
) -> None:
    steps = explain(held, target, inputs)
    assert [step.cause for step in steps] == causes
    if steps:
        assert steps[-1].reached == target


def test_the_steps_in_between_are_reached_in_turn() -> None:
    held = replace(ON, moved=MOVED)
    assert [step.reached for step in explain(held, MOVED)] == [GIVEN, MOVED]

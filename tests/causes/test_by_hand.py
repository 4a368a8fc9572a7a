"""Causes on views made by hand: one rule at a time, in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxqfix.causes import registry
from fxqfix.causes.degenerate_scale import FLOOR
from fxqfix.causes.half_dequantize import in_half
from fxqfix.qparams import QParams

CAUSES: dict[str, Any] = {cause.name: cause for cause in registry()}
GRID = QParams(0.5, 0, 0, 127, torch.quint8)
WHOLE = QParams(0.5, 0, 0, 255, torch.quint8)


def codes(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def mask(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


@dataclass
class View:
    """What a cause reads; values agree with codes where they are equal after rounding."""

    expected: Tensor
    raw: Tensor
    grid: QParams = GRID
    target: QParams = WHOLE
    weight: Any = None
    weights: dict[str, Any] = field(default_factory=dict)
    known: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        known = self.__dict__.get("known", {})
        if name not in known:
            raise AttributeError(name)
        return known[name]

    @property
    def actual(self) -> Tensor:
        return self.raw

    @property
    def differs_locally(self) -> Tensor:
        return self.raw != self.expected

    def agrees(self, value: Tensor, grid: QParams, found: Tensor) -> Tensor:
        wanted = torch.round(value / grid.scales[0]) + grid.zero_points[0]
        return wanted.clamp(grid.quant_min, grid.quant_max) == found


# --- range-lost ----------------------------------------------------------------------------------


def test_range_lost_takes_codes_that_a_clamp_brings_back() -> None:
    low = QParams(0.5, 4, 2, 127, torch.quint8)
    view = View(codes(127, 127, 126, 2, 2, 3), codes(128, 255, 128, 1, 2, 1), low)
    assert CAUSES["range-lost"].explains(view).tolist() == mask(1, 1, 0, 1, 0, 0).tolist()


def test_range_lost_says_which_codes_leave_which_range() -> None:
    said = CAUSES["range-lost"].evidence
    for raw, wanted in (([3, 128], "codes 3..128 where [0,127]"), ([0, 127], "weight of 'fc'")):
        pair = SimpleNamespace(
            widened=True,
            theirs=SimpleNamespace(codes=torch.tensor([-128, 5])),
            mine=SimpleNamespace(qparams=QParams(0.5, 0, -127, 127, torch.qint8)),
        )
        view = View(codes(0), codes(*raw), weights={"fc": pair})
        view.known["found"] = SimpleNamespace(raw=torch.tensor(raw))
        assert said(view).startswith(wanted)
    assert said(view) == "weight of 'fc': codes -128..5, declared [-127,127]"


# --- degenerate-scale ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "bits", "weight", "asked"),
    [
        (FLOOR, 8, None, True),
        (FLOOR / 2, 8, None, True),
        (FLOOR * 1.5, 8, None, False),
        (FLOOR, 16, None, False),
        (FLOOR * 1.5, 16, None, False),
        (FLOOR, 8, "a weight", False),
    ],
)
def test_degenerate_scale_looks_at_8_bit_values_at_the_floor(
    scale: float, bits: int, weight: Any, asked: bool
) -> None:
    dtype = torch.quint8 if bits == 8 else torch.int16
    grid = QParams(scale, 0, 0, 2**bits // 2 - 1, dtype)
    view = View(codes(5, 5, 5), codes(5, 6, 7), grid, weight=weight)
    found = CAUSES["degenerate-scale"].explains(view)
    assert (found is not None) == asked
    if asked:
        assert found.tolist() == [False, True, True]


def test_degenerate_scale_leaves_codes_that_are_apart_on_a_healthy_grid() -> None:
    steps = int(2.0**-12 / FLOOR)
    grid = QParams(FLOOR, 0, -(2**31), 2**31 - 1, torch.qint32)
    narrow = SimpleNamespace(scales=grid.scales, bits=8)
    for apart, explained in ((steps // 2, True), (2 * steps, False), (-2 * steps, False)):
        view = View(codes(0), codes(apart), narrow)  # type: ignore[arg-type]
        assert CAUSES["degenerate-scale"].explains(view).tolist() == [explained]


# --- train mode ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bn-training", "dropout-training"])
def test_train_mode_takes_what_eval_mode_gives(name: str) -> None:
    view = View(codes(9, 9, 9, 9), codes(3, 4, 200, 4))
    view.known["exact"] = torch.tensor([1.5, 1.5, 80.0, 80.0], dtype=torch.float64)
    view.known["recompute"] = SimpleNamespace(trains=lambda kind: "model.bn")
    # The third is beyond the declared range in eval mode, and so is its code.
    assert CAUSES[name].explains(view).tolist() == [True, False, True, False]
    assert CAUSES[name].evidence(view) == "model.bn is in train mode"
    view.known["recompute"] = SimpleNamespace(trains=lambda kind: "")
    assert CAUSES[name].explains(view) is None
    view.known["recompute"] = None
    assert CAUSES[name].explains(view) is None


# --- upstream and unexplained --------------------------------------------------------------------


def test_upstream_takes_what_agrees_on_the_same_inputs() -> None:
    view = View(codes(1, 1, 1), codes(1, 2, 1), known={"recompute": None})
    view.known["differs"] = mask(1, 1, 0)
    assert CAUSES["upstream"].explains(view).tolist() == [True, False, False]
    reading = {"recompute": SimpleNamespace(behind=("reads",)), "differs": mask(1, 1, 0)}
    view.known |= {**reading, "agrees_reading": lambda reads: mask(0, 1, 0)}
    assert CAUSES["upstream"].explains(view).tolist() == [True, True, False]


def test_unexplained_takes_the_rest_but_for_what_no_row_shows() -> None:
    view = View(codes(1, 9), codes(4, 2), known={"unseen": (), "problem": "", "emulated": None})
    view.known["differs"] = mask(1, 1)
    view.target = view.grid
    assert CAUSES["unexplained"].explains(view).tolist() == [True, True]
    assert CAUSES["unexplained"].evidence(view) == "up to 7 codes apart on the same inputs"
    view.target = QParams(0.5, 0, 3, 127, torch.quint8)
    said = CAUSES["unexplained"].evidence(view)
    assert said.endswith("only the converted model holds its codes in [3, 127]")
    view.known["problem"] = "why not"
    assert CAUSES["unexplained"].evidence(view) == "why not"
    view.known["unseen"] = ("lstm",)
    assert CAUSES["unexplained"].explains(view) is None
    assert "lstm quantizes inside" in view.problem


# --- kernel-defect -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("defect", "known", "claimed"),
    [
        (None, {}, None),
        ((False, False), {}, None),  # (present, emulated)
        ((True, False), {}, [True, False]),
        ((True, True), {}, None),
        ((True, False), {"local": None}, None),
        ((True, False), {"between": True}, None),
        ((True, False), {"garbled": True, "between": True}, [False, True]),
    ],
)
def test_what_a_wrong_kernel_claims(
    defect: Any, known: dict[str, Any], claimed: list[bool] | None
) -> None:
    row = None if defect is None else SimpleNamespace(present=defect[0], emulated=defect[1])
    before = {"garbled": False, "between": False, "local": "record", "miscomputed": mask(1, 0)}
    view = View(codes(1, 1), codes(1, 2), known={**before, **known, "defect": row})
    found = CAUSES["kernel-defect"].claims(view)
    assert (None if found is None else found.tolist()) == claimed


# --- half-dequantize -----------------------------------------------------------------------------


def test_inputs_that_half_precision_moves() -> None:
    grid = QParams(0.5, 3, -(2**15), 2**15 - 1, torch.int16)
    held = torch.tensor([10, 2051, -2050], dtype=torch.int16)
    value = ((held.float() - 3) * 0.5).to(torch.bfloat16)
    found = in_half(SimpleNamespace(inputs=[value, "x"], codes=[(held, grid), None]))  # type: ignore[arg-type]
    own = (held.to(torch.bfloat16) - 3) * 0.5
    assert torch.equal(own, value) == (found is None)
    if found is not None:
        assert torch.equal(found[0], own)  # type: ignore[arg-type]
        assert found[1] == "x"
    small = torch.tensor([10, 7], dtype=torch.int16)
    same = ((small.float() - 3) * 0.5).to(torch.bfloat16)
    assert in_half(SimpleNamespace(inputs=[same], codes=[(small, grid)])) is None  # type: ignore[arg-type]
    floats = SimpleNamespace(inputs=[value.float()], codes=[(held, grid)])
    assert in_half(floats) is None  # type: ignore[arg-type]


def test_kinds_of_places_and_order() -> None:
    """The order in which causes are asked is what the list in their docstring promises."""
    order = list(CAUSES)
    for first, later in (
        ("range-lost", "bn-training"),
        ("bias-int32", "rounding"),
        ("rounding", "uncalibrated"),
        ("uncalibrated", "shared-qparams"),
        ("shared-qparams", "stale-qparams"),
        ("stale-qparams", "scale-formula"),
        ("scale-formula", "moving-observer"),
        ("moving-observer", "other-qparams"),
        ("other-qparams", "other-weights"),
        ("other-weights", "int16-saturation"),
        ("kernel-defect", "requantization"),
        ("requantization", "upstream"),
        ("upstream", "unexplained"),
    ):
        assert order.index(first) < order.index(later)

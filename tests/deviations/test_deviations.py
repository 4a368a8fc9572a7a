"""Deviations: the registry, every planted fault in every architecture, pairs, and their figures."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from fxqfix.deviations import Deviation, Recipe, Registry, registry
from fxqfix.errors import OptionError
from tests.deviations import engine
from tests.deviations.planted import ARCHITECTURES, device, plant, recalled


def _row(**changed: Any) -> Deviation:
    plain = {"name": "x", "summary": "does", "remedy": "do", "variants": ({"rounding": "up"},)}
    return Deviation(**{**plain, **changed})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": "Half Up"}, "kebab-case"),
        ({"name": ""}, "kebab-case"),
        ({"summary": ""}, "what it is"),
        ({"remedy": ""}, "what it is"),
        ({"variants": ()}, "has a variant"),
        ({"variants": ({"no_such_field": 1},)}, "no recipe has"),
        ({"variants": ({"rounding": "due"},)}, "changes nothing"),
        ({"variants": ({},)}, "changes nothing"),
    ],
)
def test_the_registry_refuses_mistakes(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Registry().add(_row(**changed))


def test_the_registry_refuses_a_name_twice() -> None:
    found = Registry()
    found.add(_row())
    with pytest.raises(OptionError, match="taken"):
        found.add(_row())


def test_every_row_is_a_sentence() -> None:
    rows = registry()
    assert len(rows) > 45
    for name, row in rows.items():
        assert name == row.name
        assert row.summary[0].islower()
        assert not row.summary.endswith(".")
        assert row.remedy[0].islower()


def test_every_planted_kind_is_a_row() -> None:
    assert set(engine.FAULTS) <= registry().keys()


@functools.cache
def _healthy(name: str, weights: str) -> dict[str, torch.Tensor]:
    return device(name, weights).run({})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_engine_without_a_fault_is_the_reference(name: str) -> None:
    checked = 0
    for weights in ("channel", "affine"):
        found, values = device(name, weights), _healthy(name, weights)
        for op in found.parameters:
            if any(engine.applies(op, fault) for fault in engine.FAULTS):
                inputs = [values[n].numpy() for n in op.inputs]
                codes = engine.compute(op, inputs, (), list(found.parameters))
                assert torch.equal(torch.from_numpy(codes.copy()).int(), values[op.name].int())
                checked += 1
    assert checked >= 8


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_planted_is_named_and_nothing_else_is_blamed(name: str) -> None:
    places = {fault: plant(name, fault) for fault in engine.FAULTS}
    planted = {fault: found for fault, found in places.items() if found is not None}
    assert len(planted) >= 25, sorted(set(engine.FAULTS) - set(planted))
    for fault, (op, _, judgement) in planted.items():
        row = judgement.op(op.name)
        assert recalled(judgement, name, op, (fault,)), (fault, [e.deviations for e in row.named])
        # All that are named give every code.
        assert all(e.complete and e.differing == row.local.differing for e in row.named)
        assert (len(row.named) == 1) == (not row.separation), fault
        # Ops behind it compute on what it gave, and are equal.
        others = [o.name for o in judgement.ops if o.name != op.name and not o.equal]
        assert others == [], fault
        assert judgement.verdict == ("ok" if row.allowed else "not ok")


PAIRS = [
    ("input-zero-point-missing", "half-away"),
    ("weight-layout", "bias-missing"),
    ("kernel-flipped", "truncation"),
    ("padding-with-zero", "int32-multiplier-rounded-twice"),
    ("bias-twice", "accumulator-wraps"),
    ("pairs-saturate", "kernel-flipped"),
    ("per-tensor-multiplier", "bias-after-requantization"),
    ("output-off-by-128", "rounds-down"),
]


@pytest.mark.parametrize("faults", PAIRS, ids="+".join)
def test_a_pair_is_named(faults: tuple[str, str]) -> None:
    found = plant("Inception", *faults) or plant("VGGWide", *faults)
    assert found is not None
    op, _, judgement = found
    name = "Inception" if plant("Inception", *faults) else "VGGWide"
    assert recalled(judgement, name, op, faults), judgement.op(op.name).named


def test_a_plain_recipe_is_the_reference() -> None:
    assert Recipe().key(("x", "shift")) == ("due", 0)

"""Deviations: the registry, every planted fault in every architecture, pairs, and their figures."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from fxqfix import Parameters, extract_parameters, golden_vectors, judge
from fxqfix._torch import quantized_engine
from fxqfix.deviations import DEVIATIONS, Deviation, Recipe, registry
from fxqfix.errors import RegistryError
from fxqfix.export import Reference
from tests.deviations import engine
from tests.deviations.planted import ARCHITECTURES, device, plant, recalled
from tests.test_extract import models


def _row(**changed: Any) -> Deviation:
    plain = {"name": "x", "summary": "does", "remedy": "do", "variants": ({"rounding": "up"},)}
    return Deviation(**{**plain, **changed})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": "Half Up"}, "kebab-case"),
        ({"name": ""}, "kebab-case"),
        ({"summary": ""}, "it has no summary"),
        ({"remedy": ""}, "it has no remedy"),
        ({"variants": ()}, "it has no variants"),
        ({"variants": ({"no_such_field": 1},)}, "no recipe has"),
        ({"variants": ({"rounding": "due"},)}, "changes nothing"),
        ({"variants": ({},)}, "changes nothing"),
    ],
)
def test_the_registry_refuses_mistakes(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(RegistryError, match=said):
        DEVIATIONS.add(_row(**changed), module="x")


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


def test_a_range_of_the_device_that_is_not_the_models() -> None:
    prepared, converted, x = models("PlainCNN", "fbgemm")
    with quantized_engine("fbgemm"):
        int8 = extract_parameters(converted, ranges_from=prepared)
        decomposed = extract_parameters(prepared)
        golden, held = golden_vectors(converted, 2 * x), golden_vectors(prepared, 2 * x)
    name = "body_0_0"
    # convert_fx dropped [0, 127]: a device that holds it differs from the int8 model.
    clamped = {**golden.values, name: golden.values[name].clamp(max=127)}
    assert ("clamps-to-declared-range",) in _named(int8, clamped, name)
    # The decomposed ops hold it: a device that does not differs from them.
    loose = Reference(dataclasses.replace(decomposed[name], limits=(0, 255)), decomposed.arithmetic)
    codes = loose.run(held.values["x_quantize"])
    assert ("clamps-to-container",) in _named(decomposed, {**held.values, name: codes}, name)


def _named(parameters: Parameters, values: Any, name: str) -> list[tuple[str, ...]]:
    return [e.deviations for e in judge(parameters, values).op(name).named]


def test_an_integer_engine_is_ok_beside_the_decomposed_ops() -> None:
    prepared, _, x = models("Residual", "fbgemm")
    parameters = extract_parameters(prepared)
    have: dict[str, torch.Tensor] = {"x": x}
    for op in parameters:
        inputs = [have[name] for name in op.inputs]
        found = Reference(op, parameters.arithmetic).run(*inputs)
        if engine.key(op) in ("conv2d", "linear"):
            codes = engine.compute(op, [t.numpy() for t in inputs], (), list(parameters))
            held = torch.from_numpy(codes.copy()).clamp(*op.limits)
            found = torch.empty_like(found).copy_(held)
        have[op.name] = found
    judgement = judge(parameters, have)
    assert judgement.verdict == "ok", judgement.reasons
    # An integer bias, or sums in another order, move a code here and there.
    assert sum(op.local.differing for op in judgement.ops) < 20

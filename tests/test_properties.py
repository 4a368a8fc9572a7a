"""What has to hold for every network: random ones, prepared in random ways.

Each property is decided by running models or by an independent count, never by the package's own
word. A failing example prints as a plan that can be pasted back.
"""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.ao.quantization import quantize_fx

from fxqfix import Report, compare, freeze, inspect, to_decomposed
from fxqfix._torch import quiet
from fxqfix.dialects import read
from fxqfix.pairing import pair
from fxqfix.passes import FoldBatchNorm, FreezeQParams, InsertShadows
from fxqfix.passes.insert_shadows import Probing
from fxqfix.qparams import QParams
from tests.states import run, same
from tests.strategies import Case, batch, batches, cases

# Networks take tenths of a second to prepare: few examples, none thrown away as too slow, and
# none shrunk: a failing plan has six steps at most, and shrinking it would take minutes.
few = settings(
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)


# Torch's conversion leaves cat with inputs of several grids where relu6, dropout and the like drop
# theirs, and warns of it once.
pytestmark = pytest.mark.filterwarnings("ignore:All inputs of this cat operator:UserWarning")


def examples(count: int) -> settings:
    return settings(few, max_examples=count)


def freely_converted(case: Case, frozen: fx.GraphModule) -> fx.GraphModule:
    """Torch's int8 conversion; onednn refuses the zero points of one-signed weight channels."""
    if case.recipe.engine == "onednn":
        weights = [t.site.used for t in read(frozen).weights]
        assume(all(not any(w.zero_points) for w in weights if w is not None))
    return case.int8(frozen)


# --- freeze --------------------------------------------------------------------------------------


@pytest.mark.slow
@given(cases(lowers=False))
@examples(32)
def test_frozen_equals_decomposed(case: Case) -> None:
    """Every output bit, on inputs beyond the calibrated range."""
    prepared = case.prepared()
    frozen, decomposed = freeze(prepared), to_decomposed(prepared)
    for x in batches(2):
        assert same(run(frozen, x), run(decomposed, x))


@pytest.mark.slow
@given(cases(lowers=False))
@examples(15)
def test_freezing_keeps_the_qparams_in_use_and_twice_changes_nothing(case: Case) -> None:
    prepared = case.prepared()
    once = freeze(prepared)
    twice = freeze(once)
    mine, theirs, again = inspect(prepared), inspect(once), inspect(twice)
    assert [(s.name, s.used) for s in mine] == [(s.name, s.used) for s in theirs]
    assert all(s.baked == s.used and s.quantizes for s in theirs)
    assert [(s.name, s.used) for s in again] == [(s.name, s.used) for s in theirs]
    for x in batches(2):
        assert same(run(once, x), run(twice, x))


@given(cases())
@examples(20)
def test_conversion_bakes_the_frozen_qparams(case: Case) -> None:
    """Torch's own int8 conversion of the frozen model: grids and weight codes.

    But where a kernel has no qparams of its own (dropout, relu6, x * 0.5): those keep or move
    their input's grid, whatever was prepared.
    """
    frozen = freeze(case.prepared())
    found = pair(read(frozen), read(freely_converted(case, frozen)))
    assert [t.site.name for t, side, _ in found.unpaired if side == "prepared"] == []
    for p in found.pairs:
        mine, theirs = p.prepared.site.used, p.converted.site.used
        assert mine is not None
        assert theirs is not None
        assert mine.same_grid(theirs) or p.converted.inherited, p.prepared.site.name
        if p.prepared.weight is not None and p.converted.weight is not None:
            own, other = p.prepared.weight().codes, p.converted.weight().codes
            assert torch.equal(own.int(), other.int()), p.prepared.site.name


@given(cases(lowers=False))
@examples(10)
def test_reference_conversion_bakes_the_frozen_qparams(case: Case) -> None:
    """Of any network: what torch's lowering drops, its reference form still has."""
    frozen = freeze(case.prepared())
    with case.engine(), quiet():
        reference = quantize_fx.convert_to_reference_fx(copy.deepcopy(frozen))
    found = pair(read(frozen), read(reference))
    assert found.unpaired == ()
    for p in found.pairs:
        assert p.prepared.site.used is not None
        assert p.prepared.site.used.same_grid(p.converted.site.used), p.prepared.site.name


@given(cases())
@examples(10)
def test_baked_is_what_conversion_bakes(case: Case) -> None:
    """Of the prepared model as it stands: `baked` foretells torch's conversion."""
    prepared = case.prepared()
    with case.engine(), quiet():
        reference = quantize_fx.convert_to_reference_fx(copy.deepcopy(prepared))
    for p in pair(read(prepared), read(reference)).pairs:
        baked, found = p.prepared.site.baked, p.converted.site.used
        assert baked is not None
        assert found is not None
        assert baked.same_grid(found), p.prepared.site.name


@given(cases())
@examples(8)
def test_conversion_gives_what_was_overwritten_to_its_readers(case: Case) -> None:
    """Of the frozen model no op reads an old value; before, `inplace-lost` says so, all of it."""
    plain = FoldBatchNorm()(FreezeQParams()(case.prepared()).graph_module).graph_module
    frozen = freeze(plain)
    assert same(run(plain, batch(100, 2.0)), run(frozen, batch(100, 2.0)))
    for model in (plain, frozen):
        converted = freely_converted(case, model)
        with case.engine() as engine:
            report = compare(plain, converted, batches(1), engine=engine, noise_floor=False)
        assert report.unexplained == 0, str(report)
        assert model is plain or "inplace-lost" not in report.causes


# --- to_decomposed -------------------------------------------------------------------------------


@given(cases())
@examples(20)
def test_decomposed_from_every_dialect(case: Case) -> None:
    """The frozen model's reference and int8 forms, ranges from it, compute its very bits."""
    frozen = freeze(case.prepared())
    with case.engine(), quiet():
        reference = quantize_fx.convert_to_reference_fx(copy.deepcopy(frozen))
    wanted = run(frozen, batch(100, 2.0))
    assert same(wanted, run(to_decomposed(reference, ranges_from=frozen), batch(100, 2.0)))
    int8 = freely_converted(case, frozen)
    grids = [(p.prepared.site, p.converted.site) for p in pair(read(frozen), read(int8)).pairs]
    assume(all(a.used.same_grid(b.used) for a, b in grids))  # torch kept every grid
    assert same(wanted, run(to_decomposed(int8, ranges_from=frozen), batch(100, 2.0)))


@given(cases())
@examples(10)
def test_pinned_ranges_change_no_bit(case: Case) -> None:
    prepared = case.prepared()
    pinned, plain = (to_decomposed(prepared, pin_ranges=pin) for pin in (True, False))
    wanted = run(plain, batch(5, 3.0))
    assert same(run(pinned, batch(5, 3.0)), wanted)
    for node in pinned.graph.nodes:  # as exporters drop them: the clamps alone hold the ranges
        if "quantized_decomposed.quantize_per_tensor" in str(node.target):
            limits = torch.iinfo(node.args[-1])
            node.args = (*node.args[:3], limits.min, limits.max, node.args[-1])
    pinned.recompile()
    assert same(run(pinned, batch(5, 3.0)), wanted)


@given(cases())
@examples(15)
def test_comparing_frozen_with_decomposed_is_exact(case: Case) -> None:
    frozen = freeze(case.prepared())
    report = compare(frozen, to_decomposed(frozen), batches(2), noise_floor=False)
    assert report.exact, str(report)
    assert report.causes == {}
    sites = {r.name for r in report.rows if r.kind != "output"}
    assert sites == {s.name for s in inspect(frozen)}
    assert all(r.cumulative.elements > 0 for r in report.rows)


# --- reports -------------------------------------------------------------------------------------


def on_grid(codes: Tensor, own: QParams, grid: QParams) -> np.ndarray:
    """Codes of one grid as codes of another, in NumPy."""
    values = codes.numpy().astype(np.float64)
    if (own.scale, own.zero_point) == (grid.scale, grid.zero_point):
        return values
    real = (values - own.zero_point) * np.float64(np.float32(own.scale))
    return np.rint(real / np.float64(np.float32(grid.scale))) + grid.zero_point


class Counter(nn.Module):
    """An independent probe: counts, with NumPy, what the report's numbers should add up to."""

    def __init__(self, probing: Probing) -> None:
        super().__init__()
        self.probing = (probing,)
        self.elements = self.local = self.cumulative = self.either = self.outside = 0

    def forward(self, local: object, converted: Tensor, prepared: Tensor, *_: Tensor) -> None:
        (probing,) = self.probing
        grid = probing.pair.prepared.site.used
        assert grid is not None
        codes = on_grid(converted, probing.converted.qparams, grid)
        expected = local.expected.numpy().astype(np.float64)
        own = prepared.numpy().astype(np.float64)
        self.elements += codes.size
        self.local += int((codes != expected).sum())
        self.cumulative += int((codes != own).sum())
        self.either += int(((codes != expected) | (codes != own)).sum())
        raw = converted.numpy().astype(np.int64)
        self.outside += int(((raw < grid.quant_min) | (raw > grid.quant_max)).sum())


@given(cases(most=4), st.booleans())
@examples(14)
def test_report_adds_up(case: Case, frozen: bool) -> None:
    """Every number of every row against an independent count; causes share out all of it."""
    prepared = freeze(case.prepared()) if frozen else case.prepared()
    converted = freely_converted(case, prepared) if frozen else case.int8(prepared)
    counters: dict[str, Counter] = {}

    def probe(probing: Probing) -> nn.Module:
        name = probing.pair.prepared.site.name
        return counters.setdefault(name, Counter(probing))

    with case.engine() as engine, torch.no_grad():
        twin = InsertShadows(prepared, probe)(converted).graph_module
        for x in batches(2):
            twin(x)
        report = compare(prepared, converted, batches(2), engine=engine)
    rows = [r for r in report.rows if r.kind == "activation"]
    assert {r.name for r in rows} == counters.keys()
    for row in rows:
        own = counters[row.name]
        assert row.local is not None
        assert row.cumulative.elements == row.local.elements == own.elements
        assert row.local.differing == own.local
        assert row.cumulative.differing == own.cumulative
        assert row.local.out_of_range == row.cumulative.out_of_range == own.outside
        assert sum(row.causes.values()) == row.differing == own.either
        assert all(count > 0 for count in row.causes.values())
        assert row.evidence.keys() == row.causes.keys()
        assert row.exact == (own.either == 0 and row.local.noise == row.cumulative.noise == 0)
    for row in report.rows:
        if row.kind == "weight":
            assert sum(row.causes.values()) == row.cumulative.differing
    assert sum(report.causes.values()) == sum(r.differing for r in report.rows)
    assert report.unexplained == sum(r.causes.get("unexplained", 0) for r in report.rows)


def assert_same_numbers(a: Report, b: Report) -> None:
    """Equal counts, and energies up to the order in which float64 sums were added."""
    assert [r.name for r in a.rows] == [r.name for r in b.rows]
    for mine, theirs in zip(a.rows, b.rows, strict=True):
        assert mine.causes == theirs.causes
        assert (mine.prepared, mine.converted) == (theirs.prepared, theirs.converted)
        for kind in ("local", "cumulative", "noise_floor"):
            one, other = getattr(mine, kind), getattr(theirs, kind)
            assert (one is None) == (other is None)
            if one is None:
                continue
            counts = ("elements", "differing", "max_lsb", "sum_lsb", "out_of_range", "max_abs")
            for name in (*counts, "saturated_low", "saturated_high"):
                assert getattr(one, name) == getattr(other, name), (mine.name, kind, name)
            for name in ("signal", "noise", "energy", "product"):
                x, y = getattr(one, name), getattr(other, name)
                assert abs(x - y) <= 1e-9 * max(abs(x), abs(y)), (mine.name, kind, name)


@given(cases(most=3), st.integers(0, 100))
@examples(7)
def test_merged_halves_are_the_whole(case: Case, seed: int) -> None:
    """Also of shuffled batches."""
    prepared = case.prepared()
    converted = case.int8(prepared)
    data = batches(4)
    shuffled = random.Random(seed).sample(data, 4)
    with case.engine() as engine:
        options = {"engine": engine, "noise_floor": "all"}
        whole = compare(prepared, converted, data, **options)
        halves = [
            compare(prepared, converted, half, **options) for half in (shuffled[:2], shuffled[2:])
        ]
    merged = halves[0].merge(halves[1])
    assert merged.batches == whole.batches == 4
    assert_same_numbers(merged, whole)
    assert_same_numbers(halves[1].merge(halves[0]), whole)


@given(cases(most=3))
@examples(8)
def test_one_pass_over_the_data_is_repeatable_and_survives_json(case: Case) -> None:
    """Two comparisons of the same models on the same batches are one report, to the last bit."""
    prepared = case.prepared()
    converted = case.int8(prepared)
    with case.engine() as engine:
        first, second = (compare(prepared, converted, batches(2), engine=engine) for _ in "ab")
    assert first == second
    assert Report.from_json(first.to_json()) == first

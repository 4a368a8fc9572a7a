"""What a cause says repairs it does: planted, repaired, compared again."""

from __future__ import annotations

import pytest

import fxqfix
from fxqfix._torch import quantized_engine, quiet
from fxqfix.causes import registry
from tests.faults.benchmark import OWN
from tests.faults.plants import PLANTS, Plot
from tests.faults.zoo import base

REPAIRS = {cause.name: cause.repair for cause in registry()}
# Repaired by converting anew, from a frozen model (to_decomposed freezes on the way).
BY_CONVERSION = (
    *("stale-qparams", "stale-buffers", "moving-observer", "moving-weight", "scale-formula"),
    *("shared-qparams", "not-lowered", "weight-not-lowered"),
)
# Repaired in the prepared model: it then computes what was converted.
BY_FREEZING = ("fake-quant-off", "weight-fake-quant-off", "observer-only", "bn-folding")


def planted(name: str, engine: str | None = None) -> Plot:
    plot = Plot(base("Residual", shifted=PLANTS[name].shifted), engine)
    PLANTS[name].put(plot, 0 if name == "bn-folding" else 1)  # where folding moves a code
    return plot


@pytest.mark.parametrize("name", BY_CONVERSION)
def test_converting_what_is_frozen_repairs(name: str) -> None:
    plot = planted(name)
    assert not fxqfix.compare(plot.prepared, plot.converted(), [plot.batch]).exact
    again = fxqfix.compare(plot.prepared, fxqfix.to_decomposed(plot.prepared), [plot.batch])
    assert again.exact
    assert again.causes == {}
    assert REPAIRS[PLANTS[name].cause] in ("freeze-qparams", "to_decomposed")


# An op is left in float by editing the decomposed graph.
MENDED = [(name, None) for name in BY_CONVERSION if "not-lowered" in name]
MENDED += [
    (name, engine)
    for name in ("range-lost", *BY_CONVERSION)
    for engine in (None, "fbgemm", "qnnpack")
    if "not-lowered" not in name
]


@pytest.mark.parametrize(("name", "engine"), MENDED)
def test_repair_mends_the_converted_model(name: str, engine: str | None) -> None:
    with quantized_engine(engine), quiet():
        plot = planted(name, engine)
        mended = fxqfix.repair(plot.prepared, plot.converted(), data=[plot.batch])
    cause = PLANTS[name].cause
    if cause == "not-lowered":  # the graph has no such site: nothing is put in
        assert {r.cause for r in mended.refused} >= {cause}
        return
    assert mended.before.causes[cause] > 0
    assert mended.modified
    assert set(mended.after.causes) <= (OWN - {"range-lost"} | {"upstream", "rounding"})
    if engine is None:
        assert mended.after.exact


@pytest.mark.parametrize("name", BY_FREEZING)
def test_what_is_the_prepared_model_s_is_left_to_it(name: str) -> None:
    plot = planted(name)
    mended = fxqfix.repair(plot.prepared, plot.converted(), data=[plot.batch])
    assert not mended.modified
    (left,) = (r for r in mended.refused if r.cause == PLANTS[name].cause)
    assert left.reason.startswith(f"{mended.after.causes[left.cause]} codes")
    assert mended.after.row(left.site).causes[left.cause] > 0


@pytest.mark.parametrize("name", BY_FREEZING)
def test_freezing_the_prepared_model_repairs(name: str) -> None:
    plot = planted(name)
    converted = plot.converted()
    assert not fxqfix.compare(plot.prepared, converted, [plot.batch]).exact
    again = fxqfix.compare(fxqfix.freeze(plot.prepared), converted, [plot.batch])
    assert again.exact
    assert again.causes == {}
    assert REPAIRS[PLANTS[name].cause] in ("freeze-qparams", "fold-batchnorm")


@pytest.mark.parametrize(
    "name", ["stale-qparams", "moving-observer", "uncalibrated", "fake-quant-off"]
)
def test_lint_tells_the_same_without_data(name: str) -> None:
    plot = planted(name)
    found = {(f.code, f.site) for f in fxqfix.lint(plot.prepared).findings}
    sites = plot.touched
    if name == "moving-observer":  # found on the module
        taps = [t for t in plot.base.reading.activations if t.site.name in plot.touched]
        sites = {str(tap.node.target) for tap in taps}
    assert {(name, site) for site in sites} <= found

"""Every op of the table in a model: frozen == decomposed, and every way back, to the bit.

The samples and the limits of what holds for them stand in `tests/op_samples.py`. Limits are
strict: one that no longer limits anything fails here.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxqfix import Report, causes, compare, freeze, inspect, ops, to_decomposed, trace
from fxqfix._torch import quantized_engine
from fxqfix.dialects import Reading, read
from fxqfix.dialects._base import modules_of
from fxqfix.pairing import Pairing, pair
from fxqfix.qparams import QParams
from tests.op_calls import CALLS, Handwritten
from tests.op_flows import batches, convert, mapping, prepare
from tests.op_samples import SAMPLES, Limit, Sample

CASES = [(sample, setting) for sample in SAMPLES for setting in sample.settings]

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:UserWarning")
    for message in (
        # From torch's conversion: FloatFunctionals and PReLUs whose observers nothing ran,
        "must run observer before calling calculate_qparams",
        # dequantize nodes that its lowering of PReLU erases twice,
        r"erase_node\(dequantize",
        # and copies of packed embeddings and LSTMs.
        "TypedStorage is deprecated",
        # From int8 kernels: cat behind shape ops, 3-D pools on qnnpack.
        "All inputs of this cat operator must share the same quantization parameters",
        "Quantized Adaptive Average Pool 3D is not implemented for QNNPACK",
    )
]

each_case = pytest.mark.parametrize(
    ("sample", "setting"),
    CASES,
    ids=[f"{sample.name}-{setting}" for sample, setting in CASES],
)


# ------------------------------------------------------------------------------ helpers


@functools.cache
def frozen_model(sample: Sample, setting: str) -> nn.Module:
    return freeze(prepare(sample, setting))


@functools.cache
def int8_model(sample: Sample, setting: str) -> nn.Module:
    with engine_of(sample):
        return convert(sample, setting, frozen_model(sample, setting))


def engine_of(sample: Sample) -> Any:
    return quantized_engine("onednn" if sample.backend == "onednn" else None)


def limit_of(sample: Sample, setting: str, what: str) -> Limit | None:
    for limit in sample.limits:
        if limit.what == what and setting.startswith(limit.settings):
            return limit
    return None


def expect(sample: Sample, setting: str, what: str, holds: Callable[[], bool]) -> None:
    """Assert that something holds, or that its limit is still one."""
    limit = limit_of(sample, setting, what)
    if limit is None:
        assert holds()
    elif limit.error:
        with pytest.raises(Exception, match=re.escape(limit.error)):
            holds()
    else:
        assert not holds(), f"no limit any more: {limit.reason}"


def outputs(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    # Functional dropout, traced in train mode, draws; torch.manual_seed costs more than the model.
    torch.default_generator.manual_seed(3)
    with torch.no_grad():
        out = model(*(x.clone(memory_format=torch.preserve_format) for x in batch))
    assert isinstance(out, Tensor)
    return out


@functools.cache
def frozen_outputs(sample: Sample, setting: str) -> tuple[Tensor, ...]:
    """What every way back has to compute."""
    frozen = frozen_model(sample, setting)
    return tuple(outputs(frozen, batch) for batch in batches(sample))


def computes_frozen(model: nn.Module, sample: Sample, setting: str) -> bool:
    pairs = zip(frozen_outputs(sample, setting), batches(sample), strict=True)
    return all(torch.equal(wanted, outputs(model, batch)) for wanted, batch in pairs)


def grid_of(qparams: QParams | None) -> tuple[Any, ...]:
    assert qparams is not None
    return qparams.scales, qparams.zero_points, qparams.quant_min, qparams.quant_max


def float_ops(sample: Sample) -> bool:
    """Whether a sample's ops have limits on what int8 does, so that sites may have no partner."""
    return any(limit.what in ("baked", "int8") for limit in sample.limits)


# ------------------------------------------------------------------- frozen == decomposed


@each_case
def test_frozen_equals_decomposed(sample: Sample, setting: str) -> None:
    prepared, frozen = prepare(sample, setting), frozen_model(sample, setting)
    decomposed = to_decomposed(prepared)
    assert computes_frozen(decomposed, sample, setting)
    # Every site of the frozen model is a quantize op with its grid and range, no more, no fewer.
    wanted = Counter(grid_of(tap.site.used) for tap in _quantizing(read(frozen)))
    assert wanted
    assert Counter(grid_of(tap.site.used) for tap in read(decomposed).activations) == wanted


def _quantizing(reading: Reading) -> list[Any]:
    return [tap for tap in reading.activations if tap.site.quantizes]


@pytest.mark.parametrize(
    ("name", "quantized"),
    [
        # Of each row of float ops only the last is observed, for the op behind it.
        ("float_activations", ["input", "conv2d", "threshold", "conv2d"]),
        # F.group_norm is observed, though no lowering takes it; the module is not.
        ("float_norms", ["input", "conv2d", "batch_norm1d", "group_norm", "conv1d"]),
        ("adaptive_max_pool2d", ["input", "conv2d", "adaptive_max_pool2d", "conv2d"]),
    ],
)
@pytest.mark.parametrize("setting", ["fx-ptq", "fx-qat"])
def test_what_torch_can_not_quantize_stays_float(
    name: str, quantized: list[str], setting: str
) -> None:
    sample = next(sample for sample in SAMPLES if sample.name == name)
    sites = [site.op for site in inspect(prepare(sample, setting)) if site.kind == "activation"]
    assert sites == quantized


# ------------------------------------------------------------------------ and back again


@each_case
def test_int8_and_reference_lead_back(sample: Sample, setting: str) -> None:
    frozen = frozen_model(sample, setting)

    def converts() -> bool:
        return isinstance(int8_model(sample, setting), nn.Module)

    def leads_back(model: nn.Module, ranges_from: Any) -> bool:
        found = to_decomposed(model, ranges_from=ranges_from)
        return computes_frozen(found, sample, setting)

    prepared, qconfigs = prepare(sample, setting), mapping(sample, setting)
    expect(sample, setting, "convert", converts)
    if limit_of(sample, setting, "convert") is None:
        int8 = int8_model(sample, setting)
        expect(sample, setting, "int8", lambda: leads_back(int8, prepared))
        expect(sample, setting, "int8", lambda: leads_back(int8, qconfigs))
    if setting.startswith("fx"):
        reference = convert(sample, setting, frozen, reference=True)
        expect(sample, setting, "reference", lambda: leads_back(reference, qconfigs))


@each_case
def test_conversion_bakes_the_frozen_qparams(sample: Sample, setting: str) -> None:
    if limit_of(sample, setting, "convert") is not None:
        pytest.skip("torch does not convert it: test_int8_and_reference_lead_back")
    frozen = frozen_model(sample, setting)
    found = pair(read(frozen), read(int8_model(sample, setting)))
    assert all(reason for _, _, reason in found.unpaired)
    assert _weights_equal(found)
    expect(sample, setting, "baked", lambda: _grids_equal(found))


def _weights_equal(found: Pairing) -> bool:
    weights = [p for p in found.pairs if p.prepared.site.kind == "weight"]
    codes = [
        (p.prepared.weight().codes, p.converted.weight().codes)
        for p in weights
        if p.prepared.weight is not None and p.converted.weight is not None
    ]
    return len(codes) == len(weights) and all(torch.equal(a.int(), b.int()) for a, b in codes)


def _grids_equal(found: Pairing) -> bool:
    sites = [(p.prepared.site.used, p.converted.site.used) for p in found.pairs]
    return all(a is not None and b is not None and a.same_grid(b) for a, b in sites)


# ---------------------------------------------------------------------------- compare


def _engine_cases() -> Iterator[Any]:
    """All engines of a sample for one setting, QAT where it can; x86 for its first eager one."""
    for sample in SAMPLES:
        main = next((s for s in sample.settings if s == "fx-qat"), sample.settings[0])
        eager = next((s for s in sample.settings if s.startswith("eager") and s != main), None)
        engines = sample.engines if sample.backend == "native" else ("onednn",)
        cases = [(main, engine) for engine in engines] + ([(eager, "x86")] if eager else [])
        for setting, engine in cases:
            yield pytest.param(sample, setting, engine, id=f"{sample.name}-{setting}-{engine}")


@pytest.mark.parametrize(("sample", "setting", "engine"), list(_engine_cases()))
def test_compare_accounts_for_every_code(sample: Sample, setting: str, engine: str) -> None:
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no such engine")
    if limit_of(sample, setting, "convert") is not None:
        pytest.skip("torch does not convert it: test_int8_and_reference_lead_back")
    prepared = prepare(sample, setting)

    def accounted() -> bool:
        converted = None
        if sample.backend != "native":  # torch's convert_fx has to be told
            with quantized_engine(engine):
                converted = convert(sample, setting, prepared)
        data = list(batches(sample))[-2:]
        report = compare(prepared, converted, data, engine=engine, noise_floor=False)
        _check_coverage(report, prepared)
        _check_causes(report)
        return True

    expect(sample, setting, engine, accounted)


def _check_coverage(report: Report, prepared: nn.Module) -> None:
    rows = {row.name for row in report.rows if row.kind != "output"}
    listed = {u.name for u in (*report.coverage.unpaired, *report.coverage.unsupported)}
    assert all(u.reason for u in (*report.coverage.unpaired, *report.coverage.unsupported))
    assert rows
    float_ones = "placeholder for torch.float32"  # nothing becomes quantized there
    sites = {s.name for s in inspect(prepared).sites if not s.source.startswith(float_ones)}
    assert sites <= rows | listed
    assert not rows & {u.name for u in report.coverage.unpaired if u.side == "prepared"}


_NOT_LOCAL = {cause.name for cause in causes.registry() if not cause.local} - {"unexplained"}


def _check_causes(report: Report) -> None:
    for row in report.rows:
        shares = sum(row.causes.values())
        most = max(row.local.differing, row.cumulative.differing)
        both = row.local.differing + row.cumulative.differing
        assert most <= shares <= both, (row.name, dict(row.causes))
        local = {name: n for name, n in row.causes.items() if name not in _NOT_LOCAL}
        assert sum(local.values()) <= row.local.differing, (row.name, dict(row.causes))
    assert report.unexplained == sum(row.causes.get("unexplained", 0) for row in report.rows)


# --------------------------------------------------------------------------- coverage

# (row, column) that neither a sample nor a call by hand spells -> why.
UNCOVERED = {
    **{
        (f"conv{kind}{d}d", "dynamic"): "no flow makes it: tests/test_op_dynamic.py, by hand"
        for kind in ("", "_transpose")
        for d in (1, 2, 3)
    },
    **{
        (row, "dynamic"): "its qparams are chosen at run time: tests/test_op_dynamic.py"
        for row in ("linear", "lstm", "gru", "rnn_cell")
    },
    **{
        (row, "spelled"): "torch quantizes it dynamically only: tests/test_op_dynamic.py"
        for row in ("gru", "rnn_cell")
    },
    ("hold_range", "int8"): "fxqfix's own: tests/passes/test_restore_range.py",
    ("addmm", "spelled"): "only TensorRT's backend config has it, which torch itself can't run",
}


def _columns(model: nn.Module) -> set[tuple[str, str]]:
    graph_module = trace(model)
    modules = modules_of(graph_module)
    found = [ops.match_node(node, modules) for node in graph_module.graph.nodes]
    return {(m.spec.key, m.column + ("_relu" if m.relu else "")) for m in found if m is not None}


def test_every_row_has_a_sample() -> None:
    """Each row's every column stands in a graph that the tests above judge, or has a reason."""
    spelled = set[tuple[str, str]]()
    for sample, setting in CASES:
        spelled |= _columns(prepare(sample, setting))
        if limit_of(sample, setting, "convert") is None:
            spelled |= _columns(int8_model(sample, setting))
    for call in CALLS:
        spelled |= _columns(Handwritten(call))
    wanted = {(row.key, column) for row in ops.TABLE for column, _ in ops.spellings(row)}
    assert wanted - spelled == UNCOVERED.keys()

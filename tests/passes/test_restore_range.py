"""restore-range: where it puts a clamp and where not, and that everything sees through it."""

from __future__ import annotations

import copy
import functools
import io
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import (
    convert_fx,
    convert_to_reference_fx,
    prepare_qat_fx,
)

import fxqfix
from fxqfix import dialects
from fxqfix.engines import intervals
from fxqfix.errors import DialectError, RangeUnknownError
from fxqfix.flows.decompose import declared_ranges
from fxqfix.inserted import hold_range
from fxqfix.passes import RestoreRange
from tests.engines.nets import NETS, SHAPES
from tests.states import fingerprint

ENGINES = [e for e in torch.backends.quantized.supported_engines if e != "none"]


@functools.cache
def models(name: str) -> tuple[fx.GraphModule, fx.GraphModule, Tensor]:
    """A frozen prepared net, its conversion by torch, and what it was calibrated on."""
    torch.manual_seed(0)
    x = torch.randn(SHAPES.get(name, (4, 3, 16, 16)))
    with torch.random.fork_rng():
        mapping = get_default_qat_qconfig_mapping("fbgemm")
        prepared = prepare_qat_fx(NETS[name]().train(), mapping, (x,))
    prepared(x)
    frozen = fxqfix.freeze(prepared.eval())
    return frozen, convert_fx(copy.deepcopy(frozen)), x


@pytest.fixture(autouse=True)
def engine() -> Any:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    yield
    torch.backends.quantized.engine = before


def ranges(name: str) -> dict[str, tuple[int, int]]:
    frozen, converted, _ = models(name)
    return declared_ranges(dialects.read(converted), frozen)


def restored(name: str) -> fx.GraphModule:
    _, converted, _ = models(name)
    found: fx.GraphModule = RestoreRange(ranges(name))(converted).graph_module
    return found


def holds(model: fx.GraphModule) -> list[str]:
    nodes = [n for n in model.graph.nodes if n.target is hold_range]
    return [n.args[0].name for n in nodes]


def codes_of(model: fx.GraphModule, x: Tensor) -> dict[str, Tensor]:
    """The codes of every quantized value, by node."""
    seen: dict[str, Tensor] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and value.is_quantized:
                seen[n.name] = value.int_repr()
            return value

    Watch(model).run(x)
    return seen


# --------------------------------------------------------------------------- the rewrite


def test_clamps_only_where_codes_can_leave() -> None:
    _, converted, _ = models("Mobile")
    before = fingerprint(converted)
    result = RestoreRange(ranges("Mobile"))(converted)
    assert fingerprint(converted) == before
    assert result.edits == (
        "x: held in [0,127], quantize can give 0..255",
        "stem_0: held in [0,127], conv2d can give 0..255",
        "expand_0: held in [0,127], conv2d can give 0..255",
        "depth_0: held in [0,127], conv2d with relu is requantized, up to 255",
        "project: held in [0,127], conv2d can give 0..255",
        "add_1: held in [0,127], add can give 0..255",
        "squeeze_1: held in [0,127], conv2d with relu is requantized, up to 255",
        "squeeze_3: held in [0,127], conv2d can give 0..255",
        "mul_1: held in [0,127], mul can give 0..255",
        "head: held in [0,127], linear can give 0..255",
    )
    assert [remark.split(":")[0] for remark in result.remarks] == [
        *("stem_2", "expand_1", "squeeze_0", "gate", "mean")
    ]
    assert "it stays between its inputs' codes, on their grid" in result.remarks[-1]
    assert "hardswish of these codes gives" in result.remarks[0]


def test_twice_is_once() -> None:
    once = RestoreRange(ranges("Residual"))
    first = once(models("Residual")[1])
    second = once(first.graph_module)
    assert first.modified
    assert not second.modified
    assert str(second.graph_module.graph) == str(first.graph_module.graph)
    assert len(second.remarks) == len(first.edits) + len(first.remarks)


def test_a_wider_clamp_is_narrowed() -> None:
    model = RestoreRange({"x": (0, 200)})(models("MLP")[1]).graph_module
    assert [str(s.used.range_text) for s in fxqfix.inspect(model) if s.name == "x"] == ["[0,200]"]
    model = RestoreRange({"x": (0, 127)})(model).graph_module
    assert [str(s.used.range_text) for s in fxqfix.inspect(model) if s.name == "x"] == ["[0,127]"]
    assert "x" in [site.name for site in fxqfix.inspect(model)]
    assert len([s for s in fxqfix.inspect(model) if "hold" in s.name]) == 0


class Shapes(nn.Module):
    """Ops on one grid, and those that leave it."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q = torch.quantize_per_tensor(x, 0.1, 20, torch.quint8)
        other = torch.quantize_per_tensor(x, 0.2, 20, torch.quint8)
        pooled = torch.nn.functional.max_pool2d(q, 2)
        averaged = torch.nn.functional.avg_pool2d(q, 3, 1, 1)
        six = torch.nn.functional.relu6(torch.relu(q))
        far = torch.nn.functional.threshold(q, 1.0, 19.0)
        both, mixed = torch.cat([q, six], 1), torch.cat([q, other], 1)
        values = pooled, averaged, six, far, both, mixed, q.flatten(1).transpose(0, 1)
        return tuple(v.dequantize() for v in values)


@pytest.mark.filterwarnings("ignore:All inputs of this cat operator:UserWarning")  # cat_1's don't
def test_ops_on_one_grid() -> None:
    model = fx.symbolic_trace(Shapes())
    names = [site.name for site in fxqfix.inspect(model).sites]
    names += ["max_pool2d", "avg_pool2d", "relu", "relu6", "_threshold", "cat", "cat_1"]
    declared = dict.fromkeys((*names, "flatten", "transpose"), (0, 127))
    result = RestoreRange(declared)(model)
    assert holds(result.graph_module) == [
        *("quantize_per_tensor", "quantize_per_tensor_1", "_threshold", "cat_1")
    ]
    x = 40 * torch.randn(2, 3, 8, 8)
    for name, codes in codes_of(result.graph_module, x).items():
        if name not in holds(result.graph_module):
            assert int(codes.max()) <= 127, name


def test_an_average_that_multiplies_is_held() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = torch.quantize_per_tensor(x, 0.1, 20, torch.quint8)
            return torch.nn.functional.avg_pool2d(q, 2, divisor_override=1).dequantize()

    declared = {"x": (0, 127), "avg_pool2d": (0, 127)}
    result = RestoreRange(declared)(fx.symbolic_trace(Net()))
    assert holds(result.graph_module) == ["quantize_per_tensor", "avg_pool2d"]


@pytest.mark.parametrize("engine", [e for e in ("fbgemm", "qnnpack") if e in ENGINES])
@pytest.mark.parametrize("name", sorted(NETS))
def test_intervals_are_sound(name: str, engine: str) -> None:
    """No code of any node, before or behind a clamp, lies outside of what the pass concludes."""
    frozen, _, x = models(name)
    model = fxqfix.to_int8(frozen, engine=engine)
    found = {node.name: interval for node, interval in intervals(model).items()}
    checked = 0
    for amplitude in (1.0, 30.0):
        for node, codes in codes_of(model, amplitude * x).items():
            low, high = int(codes.min()), int(codes.max())
            assert found[node].low <= low
            assert high <= found[node].high, (node, found[node])
            checked += 1
    assert checked >= 8


def test_reference_models_are_held_too() -> None:
    frozen, _, x = models("MLP")
    reference = convert_to_reference_fx(copy.deepcopy(frozen))
    declared = declared_ranges(dialects.read(reference), frozen)
    model = RestoreRange(declared)(reference).graph_module
    assert "int8" in fxqfix.inspect(model).dialect
    wanted = fxqfix.to_decomposed(frozen)(3 * x)
    assert torch.equal(model(3 * x), wanted)


def test_other_dialects_are_refused() -> None:
    with pytest.raises(DialectError, match="only int8 models"):
        RestoreRange()(fxqfix.to_decomposed(models("MLP")[0]))


# ------------------------------------------------------------------- seen through by all


def test_a_held_value_is_one_site() -> None:
    _, converted, _ = models("Residual")
    plain, model = fxqfix.inspect(converted), fxqfix.inspect(restored("Residual"))
    assert [s.name for s in model.sites] == [s.name for s in plain.sites]
    assert [s.op for s in model.sites] == [s.op for s in plain.sites]
    site = model.site("stem_0")
    assert site.used is not None
    assert (site.used.quant_min, site.used.quant_max) == (0, 127)
    assert plain.site("stem_0").used == site.used.with_range(0, 255)


@pytest.mark.parametrize("name", ["Residual", "Mobile", "VGGWide"])
def test_it_leads_back_without_ranges(name: str) -> None:
    frozen, converted, x = models(name)
    with pytest.raises(RangeUnknownError):
        fxqfix.to_decomposed(converted)
    decomposed = fxqfix.to_decomposed(restored(name))
    assert not holds(decomposed)
    for amplitude in (1.0, 3.0):
        assert torch.equal(decomposed(amplitude * x), frozen(amplitude * x))


def test_parameters_have_the_declared_range() -> None:
    frozen, _, _ = models("Residual")
    mine = fxqfix.extract_parameters(restored("Residual"))
    theirs = fxqfix.extract_parameters(fxqfix.to_decomposed(frozen))
    assert not [op.name for op in mine if "hold" in op.name]
    assert not [name for op in mine for name in op.inputs if "hold" in name]
    limits = {op.name: op.output.range_text for op in mine if op.output is not None}
    assert {limits[op.name] for op in theirs if op.name in limits and op.weight is not None} == {
        "[0,127]"
    }
    assert all((q.quant_min, q.quant_max) == (0, 127) for op in mine for q in op.input_qparams if q)


def test_golden_vectors_are_held() -> None:
    _, _, x = models("Residual")
    model = restored("Residual")
    golden = fxqfix.golden_vectors(model, 3 * x)
    assert "hold" not in " ".join(golden.values)
    codes = codes_of(model, 3 * x)
    assert torch.equal(golden.output_of("stem_0"), codes["stem_0_hold"])
    assert int(codes["stem_0"].max()) > 127 >= int(golden.output_of("stem_0").max())
    assert torch.equal(golden.inputs_of("one_0")[0], codes["stem_0_hold"])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["PlainCNN", "Mobile"])
def test_emulated_to_the_code(name: str, engine: str) -> None:
    frozen, _, x = models(name)
    model = fxqfix.to_int8(frozen, engine=engine)
    with fxqfix._torch.quantized_engine(engine):
        emulated = fxqfix.emulate(model, engine=engine)
        for amplitude in (1.0, 3.0):
            assert torch.equal(emulated(amplitude * x), model(amplitude * x))
    assert not holds(emulated)


def test_a_shadow_compares_what_is_held() -> None:
    frozen, converted, x = models("Residual")
    report = fxqfix.compare(frozen, converted, [3 * x], noise_floor=False)
    assert "range-lost" in report.causes
    report = fxqfix.compare(frozen, restored("Residual"), [3 * x], noise_floor=False)
    assert not any(row.local.out_of_range + row.cumulative.out_of_range for row in report.rows)
    assert "range-lost" not in report.causes
    row = report.row("stem_0")
    assert row.kernel == "quantized.conv2d_relu"
    assert row.engine == "fbgemm"
    assert row.accumulator is not None


# ---------------------------------------------------------------------- a plain module


def test_copied_saved_and_loaded() -> None:
    _, _, x = models("Residual")
    model = restored("Residual")
    wanted = model(3 * x)
    assert torch.equal(copy.deepcopy(model)(3 * x), wanted)
    other = restored("Residual")
    state = model.state_dict()  # holding adds nothing to it
    assert state.keys() == models("Residual")[1].state_dict().keys()
    other.load_state_dict(state)
    assert torch.equal(other(3 * x), wanted)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # of torch itself
def test_saved_and_loaded() -> None:
    x = torch.randn(4, 8)  # in a graph without annotated inputs: torch can't load those
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).train()
    prepared = prepare_qat_fx(net, get_default_qat_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    model = fxqfix.to_int8(prepared.eval())
    wanted = model(3 * x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(3 * x), wanted)
    assert holds(loaded) == holds(model)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of torch's own scale tensors
def test_traced_by_jit() -> None:
    _, _, x = models("Residual")
    model = restored("Residual")
    traced = torch.jit.trace(model, x)
    assert torch.equal(traced(3 * x), model(3 * x))

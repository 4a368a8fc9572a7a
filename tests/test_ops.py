"""The op table is sound, and an int8 kernel called by hand reads and rewrites as its row says."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
from torch import Tensor, fx, nn

from fxqfix import ops, to_decomposed, trace
from fxqfix._torch import resolve
from fxqfix.dialects import read
from fxqfix.dialects._base import modules_of
from fxqfix.measure import tensors_of
from tests.op_calls import CALLS, GRID, Call, Handwritten
from tests.op_samples import SAMPLES

# From torch, where a module with a quantized tensor in a buffer is copied.
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")

RANGE = (0, 100)
QCONFIG = tq.QConfig(
    activation=tq.MinMaxObserver.with_args(
        dtype=torch.quint8, quant_min=RANGE[0], quant_max=RANGE[1]
    ),
    weight=tq.default_weight_observer,
)
FAMILIES = {
    "boundary",
    "weighted",
    "embedding",
    "element-wise",
    "pool",
    "activation",
    "normalization",
    "shape",
    "recurrent",
    "attention",
}
VALUES = {"", "picked", "between", "to-zero"}
RULES = {"own", "input", "shape", "fixed", "scalar", "tuple", "float", "none"}


def fake_quant(x: Tensor, scale: float, zero_point: int) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *RANGE)


# ------------------------------------------------------------------------------ the table


def test_keys_are_unique() -> None:
    assert [key for key, n in Counter(row.key for row in ops.TABLE).items() if n > 1] == []


def test_no_spelling_stands_twice() -> None:
    found = Counter(spelling for row in ops.TABLE for _, spelling in ops.spellings(row))
    assert [spelling for spelling, n in found.items() if n > 1] == []


@pytest.mark.parametrize("row", ops.TABLE, ids=[row.key for row in ops.TABLE])
def test_row_is_sound(row: ops.OpSpec) -> None:
    assert row.family in FAMILIES
    assert row.output in RULES
    assert row.values in VALUES
    assert (row.fixed is not None) == (row.output == "fixed")
    assert any(True for _ in ops.spellings(row))
    for column, spelling in ops.spellings(row):
        method = spelling.startswith(".")
        assert method or spelling.split(".")[0] in ("torch", "operator", "builtins", "fxqfix")
        assert not (method and column != "spelled")


class Watched(fx.Interpreter):
    """Runs a float model, and holds what ops give to their value rules."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.named, self.seen = dict(module.named_modules(remove_duplicate=False)), set[str]()

    def run_node(self, n: fx.Node) -> Any:
        args = self.map_nodes_to_values(n.args, n)
        kwargs = self.map_nodes_to_values(n.kwargs, n)
        given = [t.clone() for t in tensors_of([args, kwargs]) if t.is_floating_point()]
        found, value = self.ruled(n), super().run_node(n)
        if found is not None:
            self.hold(found, value, given)
        return value

    def ruled(self, n: fx.Node) -> ops.Match | None:
        found = ops.match_node(n, self.named)
        return found if found is not None and found.spec.values else None

    def hold(self, found: ops.Match, value: Any, given: list[Tensor]) -> None:
        value = value[0] if isinstance(value, tuple) else value  # with the places of the maxima
        rule, before = found.spec.values, torch.cat([t.flatten() for t in given])
        if rule == "picked":
            assert set(value.flatten().tolist()) <= set(before.tolist())
        elif rule == "between":
            # Sums of floats round: the rule is one of exact arithmetic.
            slack = 1e-6 * float(before.abs().max())
            low, high = min(float(before.min()), 0.0), max(float(before.max()), 0.0)
            assert bool(((value >= low - slack) & (value <= high + slack)).all())
        else:
            assert bool((value.abs() <= given[0].abs()).all())
            assert bool((value * given[0] >= 0).all())
        self.seen.add(found.spec.key)


@torch.no_grad()
def test_value_rules_hold() -> None:
    """On every sample with such an op, in float, on both signs."""
    seen = set[str]()
    for sample in SAMPLES:
        try:
            watched = Watched(fx.symbolic_trace(sample.make().eval()))
        except fx.proxy.TraceError:  # for eager mode only
            continue
        if any(watched.ruled(node) for node in watched.module.graph.nodes):
            watched.run(*(torch.randn(shape) for shape in sample.shapes))
            seen |= watched.seen
    assert seen == {row.key for row in ops.TABLE if row.values}


def test_row_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ops.TABLE[0].key = "other"  # type: ignore[misc]


# -------------------------------------------------------------------------------- matching


class OwnConv(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    ("target", "key", "column"),
    [
        (nn.Conv2d, "conv2d", "spelled"),
        (OwnConv, "conv2d", "spelled"),
        (torch.ao.nn.intrinsic.ConvReLU2d, "conv2d_relu", "spelled"),
        (torch.ao.nn.intrinsic.qat.ConvBnReLU2d, "conv2d_relu", "spelled"),
        (torch.ao.nn.quantized.Conv2d, "conv2d", "int8"),
        (torch.ao.nn.quantized.dynamic.Linear, "linear", "dynamic"),
        (torch.ops.quantized.add_relu, "add_relu", "int8"),
        (torch.ops.aten.conv2d.default, "conv2d", "spelled"),
        (torch.nn.functional.relu, "relu", "spelled"),
        ("permute", "permute", "spelled"),
    ],
)
def test_match(target: Any, key: str, column: str) -> None:
    found = ops.match(target)
    assert found is not None
    assert (found.key, found.column) == (key, column)


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self) -> None: ...


@pytest.mark.parametrize("target", [print, nn.Module, "no_such_method", Unhashable()])
def test_no_match(target: Any) -> None:
    assert ops.match(target) is None


def test_a_missing_spelling_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    row = ops.OpSpec("future", "activation", spelled=("torch.nn.NoSuchModule", "torch.relu"))
    monkeypatch.setattr(ops, "TABLE", (row,))
    ops._index.cache_clear()
    try:
        assert ops.match(torch.relu) == ops.Match(row, relu=False, column="spelled")
        assert ops.match(torch.nn.ReLU) is None
    finally:
        ops._index.cache_clear()


# -------------------------------------------------------------------- int8 calls by hand

each_call = pytest.mark.parametrize("call", CALLS, ids=[call.name for call in CALLS])


@each_call
def test_row_of_an_int8_call(call: Call) -> None:
    graph_module = trace(Handwritten(call))
    modules = modules_of(graph_module)
    found = [ops.match_node(node, modules) for node in graph_module.graph.nodes]
    assert call.row in {match.key for match in found if match is not None}


@each_call
def test_grid_of_an_int8_call(call: Call) -> None:
    """What `inspect` reads off the graph is what the kernel's output really has."""
    model = Handwritten(call)
    x = torch.randn(call.shape)
    out = call.kernel(model, torch.quantize_per_tensor(x, *GRID, torch.quint8))
    graph_module = trace(model)
    last = graph_module.graph.output_node().all_input_nodes[0].all_input_nodes[0]
    used = read(graph_module).tap(last.name).site.used
    assert used is not None
    assert (used.scale, used.zero_point) == (out.q_scale(), out.q_zero_point())


@each_call
def test_decomposed_int8_call(call: Call) -> None:
    """The decomposed graph is what the kernel stands for, with the declared range, to the bit."""
    model = Handwritten(call)
    decomposed = to_decomposed(model, ranges_from=QCONFIG)
    x = 2.0 * torch.randn(call.shape)
    out = call.kernel(model, torch.quantize_per_tensor(x, *GRID, torch.quint8))
    wanted = fake_quant(x, *GRID)
    wanted = call.meaning(model, wanted)
    if call.name != "dropout":
        wanted = fake_quant(wanted, out.q_scale(), out.q_zero_point())
    assert torch.equal(decomposed(x), wanted)
    kinds = {str(node.target) for node in decomposed.graph.nodes}
    assert not any("ops.quantized." in kind or kind.startswith("quantized.") for kind in kinds)


_CODES = torch.quantize_per_tensor(torch.rand(2, 4, 8, 8), 0.01, 3, torch.quint8)
_WITH = {  # what else the float spelling of a row takes
    "add": (_CODES,),
    "mul": (_CODES,),
    "matmul": (_CODES,),
    "sub": (_CODES,),
    "div": (_CODES,),
    "softmax": (1,),
    "prelu": (torch.ones(1),),
    "adaptive_max_pool2d": (2,),
}
_RUNS = [
    "relu",
    "relu6",
    "hardtanh",
    "sigmoid",
    "tanh",
    "gelu",
    "leaky_relu",
    "hardsigmoid",
    "interpolate",
]


def _float_form(key: str) -> Any:
    spelled = next(row for row in ops.TABLE if row.key == key).spelled
    return next(f for s in spelled if isinstance(f := resolve(s), type(len) | type(_float_form)))


@pytest.mark.parametrize("key", [*_WITH, "silu", "hardswish", "elu", "celu"])
def test_what_refuses_codes_raises_on_them(key: str) -> None:
    assert not next(row for row in ops.TABLE if row.key == key).takes_codes
    with pytest.raises((NotImplementedError, RuntimeError)):
        _float_form(key)(_CODES, *_WITH.get(key, ()))


@pytest.mark.parametrize("key", _RUNS)
def test_what_takes_codes_runs_on_them(key: str) -> None:
    assert next(row for row in ops.TABLE if row.key == key).takes_codes
    extra = (16,) if key == "interpolate" else ()
    assert _float_form(key)(_CODES, *extra).is_quantized


def test_columns_say_what_the_keys_say() -> None:
    for row in ops.TABLE:
        named = re.search(r"([123])d(_add)?$", row.key)
        if row.family in ("weighted", "pool"):
            assert row.dims == (int(named.group(1)) if named else 0), row.key
        assert row.transposed == ("transpose" in row.key and row.family == "weighted"), row.key
        assert row.averages == ("avg" in row.key or row.key == "mean"), row.key
        assert all(part in ops.OPS for part in row.parts), row.key


def test_a_fused_op_is_its_parts_and_any_other_is_itself() -> None:
    made = {row.key: ops.parts(row.key) for row in ops.TABLE if row.parts}
    assert made["linear_leaky_relu"] == ("linear", "leaky_relu")
    assert made["conv2d_add"] == ("conv2d", "add")
    assert {key for key in made if len(made[key]) == 1} == {
        "add_scalar",
        "mul_scalar",
        "relu6",
        "hardtanh",
    }
    assert ops.parts("conv2d") == ("conv2d",)
    assert ops.parts("no_such_op") == ("no_such_op",)


@pytest.mark.parametrize("row", [r for r in ops.TABLE if r.pointwise], ids=lambda r: r.key)
def test_a_pointwise_op_computes_each_element_by_itself(row: ops.OpSpec) -> None:
    target: Any = resolve(row.spelled[0])
    function = target() if isinstance(target, type) else target
    x = torch.linspace(-3.0, 3.0, 61)
    other = (x.flip(0) + 0.05,) if row.pointwise == "arithmetic" else ()
    more = {"min": -1.0, "max": 2.0} if row.key == "clamp" else {}
    whole, moved = function(x, *other, **more), x.clone()
    moved[40] = 0.1
    changed = function(moved, *other, **more) != whole
    assert changed.nonzero().flatten().tolist() == [40]
    if row.pointwise == "clamp":  # what is no bound is the input
        inside = (whole > whole.min()) & (whole < whole.max())
        assert torch.equal(whole[inside], x[inside])
    if row.pointwise == "same":
        assert torch.equal(whole, x)

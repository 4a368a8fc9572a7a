"""bfloat16 and float16 models: PT2E's are taken to the bit, what torch can't convert is refused."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
from torch import Tensor, fx, nn
from torch.ao.quantization.quantize_fx import prepare_fx, prepare_qat_fx

import fxqfix
from fxqfix.dialects._dtypes import HALVES
from fxqfix.errors import UnsupportedError
from fxqfix.passes import PinRanges

Q = torch.ops.quantized_decomposed
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)

# --- what torch's kernels compute ----------------------------------------------------------------


def every(dtype: torch.dtype) -> Tensor:
    """Every finite value of a half precision."""
    found = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    return found[found.isfinite()]


@halves
@pytest.mark.parametrize(
    "grid", [(0.02, 98, 0, 255), (1 / 3, -128, -128, 127), (3.0, 0, -127, 127)]
)
def test_fake_quant_computes_in_float32_and_rounds_once(
    dtype: torch.dtype, grid: tuple[float, int, int, int]
) -> None:
    scale, point, low, high = grid
    storage, x = (torch.int8 if low else torch.uint8), every(dtype)
    scale = float(torch.tensor(scale))
    found = torch.fake_quantize_per_tensor_affine(x, scale, point, low, high)
    wide = torch.fake_quantize_per_tensor_affine(x.float(), scale, point, low, high)
    assert torch.equal(found, wide.to(dtype))
    codes = Q.quantize_per_tensor.default(x, scale, point, low, high, storage)
    given = (codes, scale, point, low, high, storage)
    assert torch.equal(found, Q.dequantize_per_tensor.default(*given, out_dtype=dtype))


# --- PT2E ----------------------------------------------------------------------------------------


@functools.cache
def _prepared(mode: str, net: str, dtype: torch.dtype) -> fx.GraphModule:
    nets = _nets()
    torch.manual_seed(0)
    model = nets.NETS[net]().to(dtype).eval()
    quantizer = _wide(nets, -32767) if mode == "int16" else nets.MODES[mode].make()
    with nets.quiet(), torch.no_grad():
        program = torch.export.export(model, (nets.image().to(dtype),)).module()
        found: fx.GraphModule = nets.prepare_pt2e(program, quantizer)
        for seed in range(2):
            found(nets.image(seed=seed).to(dtype))
    return found


def _nets() -> Any:
    pytest.importorskip("torchao", reason="PT2E needs torchao")
    from tests.dialects import pt2e_nets

    return pt2e_nets


def _wide(nets: Any, low: int) -> Any:
    observer = nets.pt2e.MinMaxObserver.with_args(eps=2**-16)
    spec = nets.tq.QuantizationSpec(torch.int16, observer, low, 32767, torch.per_tensor_symmetric)
    return nets.Tiny(nets.weight_spec(), spec)


def _data(dtype: torch.dtype) -> list[Tensor]:
    nets = _nets()
    return [nets.image(seed=2).to(dtype), nets.image(seed=3, gain=3.0).to(dtype)]


CASES = [
    ("x86", "mobile"),
    ("x86-reduced", "residual"),
    ("xnnpack", "attention"),
    ("xnnpack-tensor", "branches"),
    ("embedding", "words"),
    ("bias-int32", "mlp"),
    ("sub-8-bit", "residual"),
    ("int16", "residual"),
]


@halves
@pytest.mark.parametrize(("mode", "net"), CASES)
def test_frozen_is_decomposed(mode: str, net: str, dtype: torch.dtype) -> None:
    """To the bit; compare, export and the route float64 agree that it is."""
    prepared, data = _prepared(mode, net, dtype), _data(dtype)
    frozen, decomposed = fxqfix.freeze(prepared), fxqfix.to_decomposed(prepared)
    with torch.no_grad():
        for x in data:
            assert frozen(x).dtype == dtype
            assert torch.equal(frozen(x), decomposed(x))
    report = fxqfix.compare(frozen, decomposed, data)
    assert report.exact, str(report)
    assert report.rows
    assert fxqfix.certify(prepared, "export", data).exact
    own = fxqfix.compare(prepared, decomposed, data[:1])
    assert not own.unexplained, str(own)


@halves
def test_float64_counts_what_half_precision_rounds(dtype: torch.dtype) -> None:
    """Counted by hand: the first linear in float64 on the graph's own inputs."""
    prepared, nets = _prepared("xnnpack", "mlp", dtype), _nets()
    data = [nets.image(seed=seed).to(dtype) for seed in range(12)]
    graph, seen = fxqfix.to_decomposed(prepared), dict[fx.Node, Any]()
    linear = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0]
    (relu,) = linear.users
    (quantize,) = relu.users
    _, scale, point, low, high, _ = quantize.args

    class Keeping(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            seen[n] = super().run_node(n)
            return seen[n]

    wrong = 0
    for x in data:
        with torch.no_grad():
            Keeping(graph).run(x)
            exact = nn.functional.linear(*(seen[a].double() for a in linear.args)).relu().float()
        wanted = (exact * (1.0 / scale)).round().add(point).clamp(low, high)
        wrong += int((wanted != seen[quantize].float()).sum())
    found = fxqfix.certify(prepared, "float64", data)
    row = next(site for site in found.sites if site.name == relu.name)
    assert row.found.differing == wrong
    assert not found.exact
    assert found.unexplained == 0


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(("bits", "scale"), [(16, 0.0003), (16, 0.5), (8, 0.03)])
def test_bounds_that_half_precision_does_not_hold_are_set_on_codes(
    bits: int, scale: float, dtype: torch.dtype
) -> None:
    most = 2 ** (bits - 1) - 1
    given = (scale, 0, -most, most, {8: torch.int8, 16: torch.int16}[bits])

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Any:
            codes = Q.quantize_per_tensor.default(x, *given)
            return Q.dequantize_per_tensor.default(codes, *given, out_dtype=dtype)

    x = torch.tensor([-1.0, -0.999, 0.0, 0.5, 0.999, 1.0, 3.0]) * most * scale
    graph = PinRanges()(fx.symbolic_trace(Net())).graph_module
    (clamp,) = (n for n in graph.graph.nodes if n.name.endswith("_clamp"))
    held = torch.tensor(most * scale, dtype=dtype).double().div(scale).round() == most
    assert (clamp.args[0].op == "placeholder") == bool(held)
    assert bool(held) or (bits == 16 and dtype != torch.float32)
    assert torch.equal(graph(x.to(dtype)), Net()(x.to(dtype)))


def test_inductor_takes_bfloat16() -> None:
    found = fxqfix.certify(_prepared("x86", "mlp", HALVES[1]), "inductor:lowered", _data(HALVES[1]))
    assert found.ok, str(found)
    assert found.integer_kernels


# --- FX and eager --------------------------------------------------------------------------------


def _fx(make: Callable[..., Any], mapping: Any, x: Tensor) -> nn.Module:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).to(x.dtype)
    model: nn.Module = make(net.train(make is prepare_qat_fx), mapping, (x,))
    return model


def _eager(x: Tensor) -> nn.Module:
    net = nn.Sequential(tq.QuantStub(), nn.Linear(8, 4), tq.DeQuantStub()).to(x.dtype).eval()
    net.qconfig = tq.get_default_qconfig("fbgemm")
    model: nn.Module = tq.prepare(net)
    return model


# torch's fused QAT fake-quants don't run in half precision.
PLAIN = tq.QConfigMapping().set_global(tq.get_default_qat_qconfig("fbgemm", version=0))
MAKERS: dict[str, Callable[[Tensor], nn.Module]] = {
    "fx": lambda x: _fx(prepare_fx, tq.get_default_qconfig_mapping("fbgemm"), x),
    "fx-qat": lambda x: _fx(prepare_qat_fx, PLAIN, x),
    "eager": _eager,
}


# Nor do its fake-quants in float64.
REFUSED = [
    (m, d) for m in MAKERS for d in (*HALVES, torch.float64) if (m, d.itemsize) != ("fx-qat", 8)
]


@pytest.mark.parametrize(("maker", "dtype"), REFUSED, ids=str)
def test_what_torch_can_not_convert_is_refused(
    maker: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """By every function that converts; with the remedy that is named they work."""
    torch.backends.quantized.engine = "fbgemm"
    torch.manual_seed(0)
    x = torch.randn(16, 8).to(dtype)
    prepared = MAKERS[maker](x)
    if dtype == torch.float64:
        prepared = prepared.to(dtype)
    prepared(x)
    prepared.eval()
    own = copy.deepcopy(prepared).float()
    int8 = fxqfix.to_int8(own, engine="fbgemm")
    calls: dict[str, Callable[[nn.Module, Tensor], Any]] = {
        "to_int8": lambda m, x: fxqfix.to_int8(m, engine="fbgemm"),
        "to_decomposed": lambda m, x: fxqfix.to_decomposed(m),
        "compare": lambda m, x: fxqfix.compare(m, None, [x]),
        "repair": lambda m, x: fxqfix.repair(m, int8, data=[x]),
        "certify export": lambda m, x: fxqfix.certify(m, "export", [x]),
        "certify int8": lambda m, x: fxqfix.certify(m, "int8:fbgemm", [x]),
        "migrate": lambda m, x: fxqfix.migrate(m, [x], tmp_path / "model.pt2"),
    }
    name = str(dtype).removeprefix("torch.")
    for call in calls.values():
        with pytest.raises(UnsupportedError, match=rf"in {name}, .*\.float\(\), and batches"):
            call(prepared, x)
        if maker != "eager" or call is not calls["certify int8"]:
            call(own, x.float())
    assert fxqfix.freeze(prepared)(x).dtype == dtype  # nothing is converted

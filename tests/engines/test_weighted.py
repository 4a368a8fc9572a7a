"""Convolution, transposed convolution and linear against the kernels, code for code."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn

from fxqfix._torch import quantized_engine
from fxqfix.dialects.weights import WeightView
from fxqfix.engines import Call, dispatch, isa_of, saturation_possible, table
from fxqfix.engines._accumulate import Accumulator
from fxqfix.engines._lost import Lost, Walk
from fxqfix.engines.dispatch import check_packed
from fxqfix.errors import UnsupportedError
from fxqfix.flows.emulate import emulate
from fxqfix.qparams import QParams
from tests.engines.harness import AT_THIS_LEVEL, ENGINES, differing, values

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# (inputs, outputs, groups): vector bodies and tails, grouped, depthwise, with a multiplier.
CHANNELS = [
    (3, 8, 1),
    (17, 5, 1),
    (32, 33, 1),
    (16, 16, 16),
    (6, 6, 6),
    (8, 16, 8),
    (16, 16, 4),
    (10, 15, 5),
]
SQUARE = [(8, 8, 1), (16, 16, 16), (5, 5, 1), (16, 16, 4), (1, 9, 1)]
ROWS = [
    (engine, op)
    for engine in ENGINES
    for op in ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d")
    if (engine, op) != ("qnnpack", "conv3d")  # torch can't unpack its weights
] + [("fbgemm", "conv_transpose3d"), ("onednn", "conv_transpose3d")]


class Layer(nn.Module):
    """Quantize, then one int8 op on a packed weight."""

    def __init__(self, op: str, packed: Any, source: QParams, scale: float, point: int) -> None:
        super().__init__()
        self.op, self.packed, self.source = op, packed, source
        self.scale, self.point = scale, point

    def forward(self, x: Tensor) -> Tensor:
        s = self.source
        q = torch.quantize_per_tensor(x, s.scale, s.zero_point, s.dtype)
        return getattr(torch.ops.quantized, self.op)(q, self.packed, self.scale, self.point)


class Wrapped(nn.Module):
    """Quantize, then a module."""

    def __init__(self, inner: nn.Module, scale: float = 0.0371, point: int = 3) -> None:
        super().__init__()
        self.inner, self.scale, self.point = inner, scale, point

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.quantize_per_tensor(x, self.scale, self.point, torch.quint8))


def skip_without(engine: str) -> None:
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this torch has no engine {engine}")


def scales(rng: random.Random, count: int, ties: bool) -> Tensor:
    pick = [2.0 ** -rng.randint(6, 9) if ties else rng.uniform(1e-3, 1e-2) for _ in range(count)]
    return torch.tensor(pick, dtype=torch.float64)


def weight(
    rng: random.Random, shape: list[int], axis: int | None, engine: str, ties: bool
) -> Tensor:
    """Full-range codes; zero points too, where the engine takes them."""
    generator = torch.Generator().manual_seed(rng.randrange(2**30))
    codes = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
    points = [0, 0, -5, 4] if engine != "onednn" else [0]
    if axis is None:
        scale = scales(rng, 1, ties).item()
        return torch._make_per_tensor_quantized_tensor(codes, scale, rng.choice(points))
    zero = torch.tensor([rng.choice(points) for _ in range(shape[axis])])
    scale = scales(rng, shape[axis], ties)
    return torch._make_per_channel_quantized_tensor(codes, scale, zero, axis)


def layer(
    op: str, engine: str, seed: int, dtype: torch.dtype = torch.quint8
) -> tuple[Layer, Tensor]:
    """A layer with an input, every option drawn at random."""
    rng = random.Random(seed)
    dims, transposed = (0 if op == "linear" else int(op[-2])), "transpose" in op
    inputs, outputs, groups = rng.choice(SQUARE if transposed else CHANNELS)
    if engine == "fbgemm" and transposed:
        groups = 1 if inputs != outputs else groups
    kernel = [rng.choice([1, 2, 3, 3, 5])] * dims if rng.random() < 0.7 else [3, 1, 2][:dims]
    stride = [rng.choice([1, 1, 2, 3]) for _ in range(dims)]
    dilation = [rng.choice([1, 1, 2]) for _ in range(dims)]
    padding = [rng.choice([0, 1, k // 2]) for k in kernel]
    if rng.random() < 0.5:  # what the fast paths ask for
        stride, dilation, padding = [1] * dims, [1] * dims, [k // 2 for k in kernel]
    ties, per_channel = rng.random() < 0.3, rng.random() < 0.5
    axis = (1 if transposed else 0) if per_channel else None
    if transposed and (engine != "qnnpack" or groups > 1):
        axis = None  # not taken
    shape = [outputs, inputs // groups, *kernel]
    if transposed:
        shape = [inputs, outputs // groups, *kernel]
    if op == "linear":
        shape = [outputs, inputs]
    packed_weight = weight(rng, shape, axis, engine, ties)
    bias = torch.tensor([rng.randint(-99, 99) / 64 for _ in range(outputs)])
    if not ties:
        bias = bias * rng.uniform(0.5, 1.5)
    last = [padding, dilation, groups]
    if transposed:
        more = [rng.choice([0, 1]) if s > 1 and engine != "onednn" else 0 for s in stride]
        last = [padding, more, dilation, groups]
    options = [stride, *last] if dims else []
    with quantized_engine(engine):
        prepack = getattr(torch.ops.quantized, f"{op}_prepack")
        packed = prepack(packed_weight, bias if rng.random() < 0.7 else None, *options)
    low, high = (0, 255) if dtype == torch.quint8 else (-128, 127)
    high = rng.choice([high, 127])  # hot, and as reduce_range has it
    xs = scales(rng, 1, ties).item() * 8
    source = QParams(xs, rng.choice([0, 3, 64, high] if low == 0 else [0, -5]), low, high, dtype)
    taps = packed_weight.numel() / outputs
    scale = 2.0 ** rng.randint(-3, 0) if ties else rng.uniform(0.02, 0.1) * taps**0.5
    size = {0: [400], 1: [300], 2: [19, 22], 3: [9, 9, 10]}[dims]
    batch = rng.choice([1, 4]) if dims != 1 else 9
    generator = torch.Generator().manual_seed(seed)
    where = (batch * 320, *size[1:], inputs) if dims == 0 else (batch, inputs, *size)
    codes = torch.randint(low, high + 1, where, generator=generator)
    x = values(codes, xs, int(source.zero_points[0]), dtype)
    if dims > 1 and rng.random() < 0.5:
        x = x.contiguous(memory_format=CHANNELS_LAST[x.dim()])
    elif rng.random() < 0.3:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    relu = "_relu" if not transposed and rng.random() < 0.3 else ""
    return Layer(op + relu, packed, source, scale, rng.choice([0, 10, 101])), x


@pytest.mark.parametrize(("engine", "op"), ROWS)
def test_layers_are_the_kernels(engine: str, op: str) -> None:
    skip_without(engine)
    bad = total = seed = refused = 0
    while total < 1_000_000 and seed < 160:
        model, x = layer(op, engine, seed)
        seed += 1
        try:
            found = differing(model, x, engine=engine)
        except UnsupportedError as error:
            known = ("kernel is wrong in", *AT_THIS_LEVEL)  # nothing else is refused
            assert any(text in str(error) for text in known)  # noqa: PT017
            refused += 1
            continue
        bad, total = bad + found[0], total + found[1]
    assert bad == 0, f"{bad} of {total}"
    assert total > 40_000
    assert refused < seed / 2


@pytest.mark.parametrize("seed", range(6))
def test_linear_of_qint8_is_onednn_s(seed: int) -> None:
    skip_without("onednn")
    model, x = layer("linear", "onednn", seed, torch.qint8)
    try:
        with quantized_engine("onednn"):
            model(x)
    except RuntimeError as error:
        assert "should be QUint8" in str(error)  # noqa: PT017  # older builds of torch
        pytest.skip(f"onednn's linear takes no qint8 in torch {torch.__version__}")
    assert differing(model, x, engine="onednn")[0] == 0


def _module(kind: Any, engine: str, per_channel: bool, **options: Any) -> nn.Module:
    """A module of torch.ao.nn with random weights and output qparams."""
    linear = issubclass(kind, nnq.Linear)
    with quantized_engine(engine):
        module = kind(8, 16) if linear else kind(8, 16, 3, **options)
        shape = tuple(module.weight().shape)
        axis = (0 if linear or "Transpose" not in kind.__name__ else 1) if per_channel else None
        found = weight(random.Random(7), list(shape), axis, engine, ties=False)
        module.set_weight_bias(found, torch.linspace(-1, 1, 16))
    module.scale, module.zero_point = 0.21, 57
    return module


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize(
    ("kind", "dims"),
    [
        (nnq.Conv1d, 1),
        (nniq.ConvReLU1d, 1),
        (nnq.Conv2d, 2),
        (nniq.ConvReLU2d, 2),
        (nnq.Conv3d, 3),
        (nniq.ConvReLU3d, 3),
    ],
)
def test_modules_of_convolutions(engine: str, mode: str, kind: Any, dims: int) -> None:
    skip_without(engine)
    if dims == 3 and (engine == "qnnpack" or mode != "zeros"):
        pytest.skip("torch has no such kernel")
    more: dict[str, Any] = {"stride": 2} if mode == "zeros" else {}
    module = _module(kind, engine, True, padding=1, padding_mode=mode, **more)
    x = values(torch.randint(0, 256, (2, 8, 9, 11, 6)[: dims + 2]), 0.0371, 3)
    assert differing(Wrapped(module), x, engine=engine)[0] == 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [nnq.Linear, nniq.LinearReLU])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 3, 4), (0,), (1,)])
def test_modules_of_linear(engine: str, kind: Any, lead: tuple[int, ...]) -> None:
    skip_without(engine)
    if not lead and engine != "onednn":
        pytest.skip("the kernel takes no vectors")
    module = _module(kind, engine, True)
    x = values(torch.randint(0, 256, (*lead, 8)), 0.0371, 3)
    assert differing(Wrapped(module), x, engine=engine)[0] == 0


@pytest.mark.parametrize("kind", [nnq.ConvTranspose1d, nnq.ConvTranspose2d])
def test_modules_of_transposed_convolutions(kind: Any) -> None:
    module = _module(kind, "qnnpack", True, stride=2, padding=1, output_padding=1)
    x = values(torch.randint(0, 256, (2, 8, 9, 11)[: 3 if "1d" in kind.__name__ else 4]), 0.0371, 3)
    assert differing(Wrapped(module), x, engine="qnnpack")[0] == 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    ("ws", "xs", "scale", "bias"),
    [
        (1.0, 1.0, 1e-4, 1.0),
        (1e3, 1e3, 1e-3, 1.0),  # products beyond int32
        (1e-3, 1e-3, 1e3, 1.0),
        (1e-3, 1e-2, 0.1, 1e4),
        (1e-12, 1e-12, 1e-24, 1e-20),
    ],
)
def test_extreme_scales(
    engine: str, conv: bool, per_channel: bool, ws: float, xs: float, scale: float, bias: float
) -> None:
    skip_without(engine)
    rng, op = random.Random(5), "conv2d" if conv else "linear"
    shape = [17, 33, 1, 1] if conv else [17, 33]
    found = weight(rng, shape, 0 if per_channel else None, engine, ties=False).int_repr()
    full, none = torch.full((17,), ws, dtype=torch.float64), torch.zeros(17, dtype=torch.long)
    make = torch._make_per_channel_quantized_tensor
    packed_weight = make(found, full, none, 0)
    if not per_channel:
        packed_weight = torch._make_per_tensor_quantized_tensor(found, ws, 0)
    options = [[1, 1], [0, 0], [1, 1], 1] if conv else []
    with quantized_engine(engine):
        prepack = getattr(torch.ops.quantized, f"{op}_prepack")
        packed = prepack(packed_weight, torch.linspace(-1, 1, 17) * bias, *options)
    codes = torch.randint(0, 256, (3, 33, 9, 9) if conv else (300, 33))
    model = Layer(op, packed, QParams(xs, 3, 0, 255, torch.quint8), scale, 7)
    assert differing(model, values(codes, xs, 3), engine=engine)[0] == 0


class Added(nn.Module):
    """A convolution that adds a second input."""

    def __init__(self, packed: Any, op: str) -> None:
        super().__init__()
        self.packed, self.op = packed, op

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a = torch.quantize_per_tensor(x, 0.0371, 3, torch.quint8)
        b = torch.quantize_per_tensor(y, 0.0153, 77, torch.quint8)
        return getattr(torch.ops.quantized, self.op)(a, b, self.packed, 0.41, 66)


@pytest.mark.parametrize("op", ["conv2d_add", "conv2d_add_relu"])
@pytest.mark.parametrize("groups", [1, 2, 12])
@pytest.mark.parametrize("last", [False, True])
def test_convolution_that_adds(op: str, groups: int, last: bool) -> None:
    skip_without("onednn")
    with quantized_engine("onednn"):
        packed = torch.ops.quantized.conv2d_prepack(
            weight(random.Random(1), [12, 12 // groups, 3, 3], 0, "onednn", ties=False),
            torch.linspace(-2, 2, 12),
            *([1, 1], [1, 1], [1, 1], groups),
        )
    x, y = torch.randint(0, 256, (2, 20, 12, 20, 20)).unbind()
    x, y = values(x, 0.0371, 3), values(y, 0.0153, 77)
    if last:
        x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
    assert differing(Added(packed, op), x, y, engine="onednn")[0] == 0


class Fused(nn.Module):
    """Linear with an activation that only onednn fuses."""

    def __init__(self, packed: Any, op: str, rest: tuple[float, ...]) -> None:
        super().__init__()
        self.packed, self.op, self.rest = packed, op, rest

    def forward(self, x: Tensor) -> Tensor:
        q = torch.quantize_per_tensor(x, 0.0371, 3, torch.quint8)
        return getattr(torch.ops.quantized, self.op)(q, self.packed, *self.rest)


@pytest.mark.parametrize(
    ("op", "rest"), [("linear_leaky_relu", (0.25, 66, 0.0123)), ("linear_tanh", (0.00784, 128))]
)
def test_linear_with_an_activation(op: str, rest: tuple[float, ...]) -> None:
    skip_without("onednn")
    with quantized_engine("onednn"):
        found = weight(random.Random(2), [33, 24], 0, "onednn", ties=False)
        packed = torch.ops.quantized.linear_prepack(found, torch.linspace(-1, 1, 33))
    x = values(torch.randint(0, 256 if "relu" in op else 6, (30_000, 24)), 0.0371, 3)
    assert differing(Fused(packed, op, rest), x, engine="onednn")[0] == 0


# ------------------------------------------------------------------------- saturation


def _call(
    engine: str, codes: Tensor, isa: str = "avx2", key: str = "linear", **options: Any
) -> Call:
    grid = QParams(0.5, 0, 0, 255, torch.quint8)
    view = WeightView(codes, QParams(0.5, 0, -128, 127, torch.qint8))
    return Call(
        "n",
        engine,
        key,
        arguments=options,
        qparams=(grid,),
        output=grid,
        weight=view,
        isa=isa_of(isa),
    )


def test_the_static_bound_is_sound_and_tight() -> None:
    for first, second, possible in [(127, 1, 0), (127, 2, 1), (-128, 0, 0), (-128, -1, 1)]:
        codes = torch.tensor([[first, second]], dtype=torch.int8)
        assert saturation_possible(_call("fbgemm", codes)) == possible
        lost = Lost(codes, 0, 0, Walk(), order="flat")
        activations = torch.cartesian_prod(torch.arange(256), torch.arange(256))
        assert bool(lost(activations).any()) == bool(possible)
        assert saturation_possible(_call("fbgemm", codes), highest=127) == 0


@pytest.mark.parametrize(
    ("engine", "isa", "options", "shape", "key", "possible"),
    [
        ("qnnpack", "avx2", {}, (8, 8), "linear", False),
        ("fbgemm", "vnni", {}, (8, 8), "linear", False),
        ("onednn", "vnni", {}, (8, 8), "linear", False),
        ("onednn", "avx2", {}, (8, 8), "linear", True),
        ("onednn", "avx2", {"groups": 8}, (8, 1, 3, 3), "conv2d", False),
        ("onednn", "avx2", {"groups": 2}, (8, 6, 3, 3), "conv2d", False),
        ("fbgemm", "vnni", {"groups": 8}, (8, 1, 3, 3), "conv2d", True),
        ("fbgemm", "vnni", {"groups": 7}, (7, 1, 3, 3), "conv2d", False),
    ],
)
def test_which_kernels_saturate(
    engine: str, isa: str, options: Any, shape: Any, key: str, possible: bool
) -> None:
    steps = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]} if key == "conv2d" else {}
    codes = torch.full(shape, 127, dtype=torch.int8)
    call = _call(engine, codes, isa, key, **steps, **options)
    assert bool(saturation_possible(call)) == possible


@pytest.mark.parametrize("engine", ["fbgemm", "x86"])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_depthwise_of_fbgemm_saturates_on_any_cpu(engine: str, kernel: int) -> None:
    skip_without(engine)
    with quantized_engine("fbgemm"):
        found = weight(random.Random(3), [16, 1, kernel, kernel], 0, "fbgemm", ties=False)
        packed = torch.ops.quantized.conv2d_prepack(
            found, None, [1, 1], [kernel // 2] * 2, [1, 1], 16
        )
    model = Layer("conv2d", packed, QParams(0.0371, 200, 0, 255, torch.quint8), 0.4, 120)
    x = values(torch.randint(150, 256, (2, 16, 30, 30)), 0.0371, 200)
    for isa in ("avx2", None):
        assert differing(model, x, engine="fbgemm", isa=isa)[0] == 0
    with quantized_engine("fbgemm"):
        exact = emulate(model, engine="fbgemm", isa="vnni")
    losing = [m for m in exact.modules() if isinstance(m, Lost)]
    assert len(losing) == 1
    assert losing[0]((x / 0.0371 + 200).round().int()).any()


# --------------------------------------------------------------------------- refusals


def test_sums_that_may_overflow_are_refused() -> None:
    call = _call("qnnpack", torch.full((1, 70_000), 127, dtype=torch.int8))
    with pytest.raises(UnsupportedError, match="overflow int32"):
        _build(call)
    _build(replace(call, weight=WeightView(call.weight.codes[:, :60_000], call.weight.qparams)))


def _build(call: Call) -> nn.Module:
    return table()[call.engine, call.key].build(call)


def test_per_channel_groups_of_transposed_convolutions_are_refused() -> None:
    codes = torch.ones(8, 4, 3, dtype=torch.int8)
    grid = QParams((0.5,) * 4, (0,) * 4, -128, 127, torch.qint8, 1)
    call = replace(
        _call("qnnpack", codes, key="conv_transpose1d", groups=2), weight=WeightView(codes, grid)
    )
    with pytest.raises(UnsupportedError, match="per-channel weights in groups"):
        _build(call)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("op", ["linear", "conv1d", "conv2d", "conv_transpose2d"])
def test_a_weight_tells_its_engine(engine: str, op: str) -> None:
    skip_without(engine)
    found = torch.quantize_per_tensor(
        torch.ones([4] * (2 if op == "linear" else 3)), 1.0, 0, torch.qint8
    )
    if "2d" in op:
        found = torch.quantize_per_tensor(torch.ones(4, 4, 3, 3), 1.0, 0, torch.qint8)
    ones = [1] * (1 if "1d" in op else 2)
    zeros = [0] * len(ones)
    more = [ones, zeros, *([zeros] if "transpose" in op else []), ones, 1] if op != "linear" else []
    with quantized_engine(engine):
        packed = getattr(torch.ops.quantized, f"{op}_prepack")(found, None, *more)
    check_packed(Call("n", engine, op, arguments={"packed": packed}), engine)
    for other in {"fbgemm", "onednn", "qnnpack"} - {engine}:
        if engine == "x86" and other != "qnnpack":
            continue
        with pytest.raises(
            UnsupportedError, match=f"packed for {engine if engine != 'x86' else ''}"
        ):
            check_packed(Call("n", other, op, arguments={"packed": packed}), other)


def test_dispatch_of_x86() -> None:
    codes = torch.zeros(4, 4, 3, 3, dtype=torch.int8)
    call = _call("x86", codes, "vnni", "conv2d")
    assert dispatch(call) == "onednn"
    assert dispatch(replace(call, isa=isa_of("avx2"))) == "fbgemm"
    assert dispatch(replace(call, key="linear")) == "fbgemm"
    assert dispatch(replace(call, arguments={"groups": 101})) == "fbgemm"
    assert dispatch(replace(call, engine="qnnpack")) == "qnnpack"


def test_wide_sums_are_split_or_float64() -> None:
    grid = QParams(1.0, 0, 0, 255, torch.quint8)
    wide = torch.full((3, 2000), 127, dtype=torch.int32)
    x = torch.full((2, 2000), 255, dtype=torch.uint8)
    accumulate = Accumulator(nn.functional.linear, wide, grid, input_axis=-1)
    assert len(accumulate.sizes) > 1
    assert (accumulate(x) == 2000 * 255 * 127).all()
    grouped = Accumulator(nn.functional.linear, wide, grid, groups=2)
    assert grouped.weight.dtype == torch.float64
    assert (grouped(x) == 2000 * 255 * 127).all()


@pytest.mark.parametrize(
    ("engine", "op", "seed"),
    [
        ("qnnpack", "conv2d", 1108),
        ("qnnpack", "conv_transpose1d", 1015),
        ("onednn", "conv_transpose1d", 1062),
        ("onednn", "conv_transpose2d", 5108),
        ("onednn", "conv_transpose1d", 5140),
        ("onednn", "conv_transpose1d", 5228),
    ],
)
def test_layers_that_other_orders_of_rounding_miss(engine: str, op: str, seed: int) -> None:
    skip_without(engine)
    model, x = layer(op, engine, seed)
    assert differing(model, x, engine=engine)[0] == 0

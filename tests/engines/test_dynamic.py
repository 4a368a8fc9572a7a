"""Dynamic linear and convolution against the kernels: equal floats, counted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.ao.nn.quantized.dynamic as nnqd
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping, quantize_dynamic
from torch.ao.quantization.qconfig import default_dynamic_qconfig, float16_dynamic_qconfig
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from fxqfix._torch import quantized_engine, quiet
from fxqfix.engines import table
from fxqfix.errors import NonFiniteError, UnsupportedError
from fxqfix.flows.emulate import emulate
from tests.engines.harness import ENGINES, differing

# Rows, inputs, outputs: one row, tails of every vector, several blocks.
SIZES = [(1, 300, 70), (37, 17, 9), (512, 64, 128), (301, 33, 71), (64, 257, 40)]


def batches(shape: tuple[int, ...], seed: int) -> Iterator[Tensor]:
    """Normal values, exact ties, one sign only, huge and tiny ones, zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    yield x
    yield torch.randint(-255, 256, shape, generator=generator) / 64
    yield x.abs()
    yield -x.abs()
    for gain in (1e-4, 1e6, 1e-30, 1e-39, 0.0):
        yield x * gain


def quantized_weight(shape: tuple[int, ...], *, per_channel: bool, point: int, seed: int) -> Tensor:
    """A qint8 weight that uses its whole range."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if not per_channel:
        return torch.quantize_per_tensor(
            weight, float(weight.abs().max()) / 127, point, torch.qint8
        )
    scales = weight.abs().flatten(1).amax(1).double() / 127
    points = torch.full((shape[0],), point)
    return torch.quantize_per_channel(weight, scales, points, 0, torch.qint8)


class Linear(nn.Module):
    """One functional dynamic linear."""

    def __init__(self, packed: Any, *, reduce_range: bool, relu: bool) -> None:
        super().__init__()
        self.packed, self.reduce_range, self.relu = packed, reduce_range, relu

    def forward(self, x: Tensor) -> Tensor:
        op = torch.ops.quantized
        function = op.linear_relu_dynamic if self.relu else op.linear_dynamic
        return function(x, self.packed, self.reduce_range)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_linear(engine: str, per_channel: bool) -> None:
    bad = total = 0
    options = itertools.product(SIZES, (False, True), (False, True), (False, True), (0, 3))
    # Every third: all pairs of options come, in a third of the time.
    options = itertools.islice(options, int(per_channel), None, 3)
    for seed, ((rows, inputs, outputs), bias, reduce_range, relu, point) in enumerate(options):
        if point and engine == "onednn":  # it takes no other zero point
            continue
        weight = quantized_weight(
            (outputs, inputs), per_channel=per_channel, point=point, seed=seed
        )
        added = torch.randn(outputs, generator=torch.Generator().manual_seed(seed))
        with quantized_engine(engine):
            packed = torch.ops.quantized.linear_prepack(weight, added if bias else None)
        model = Linear(packed, reduce_range=reduce_range, relu=relu)
        for x in batches((rows, inputs), seed):
            wrong, count = differing(model, x, engine=engine)
            bad, total = bad + wrong, total + count
    assert total > 1_000_000
    assert bad == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_every_tie_of_the_input(engine: str) -> None:
    """The identity as weight shows the codes that the kernel quantizes to."""
    bad = total = 0
    weight = torch.quantize_per_tensor(torch.eye(67), 1.0, 0, torch.qint8)
    with quantized_engine(engine):
        packed = torch.ops.quantized.linear_prepack(weight, None)
    models = [Linear(packed, reduce_range=narrow, relu=False) for narrow in (True, False)]
    for seed in range(60):
        model = models[seed % 2]
        generator = torch.Generator().manual_seed(seed)
        steps = torch.randint(-300, 300 - 9 * seed, (301, 67), generator=generator)
        wrong, count = differing(model, steps * (0.5 + seed % 7), engine=engine)
        bad, total = bad + wrong, total + count
    assert total > 1_000_000
    assert bad == 0


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(24, 40), nn.ReLU())
        self.two, self.weight = nn.Linear(40, 16), nn.Parameter(torch.randn(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.linear(self.two(self.one(x)), self.weight))


@pytest.mark.parametrize("engine", ENGINES)
def test_pairs_of_many_inputs(engine: str) -> None:
    """onednn halves the inputs, and an odd half shifts the pairs behind it; hot on purpose."""
    bad = total = 0
    sizes = (255, 257, 258, 261, 385, 511, 601, 767, 769, 773, 1025, 1537, 2049)
    for inputs, (rows, outputs) in itertools.product(sizes, [(1, 64), (64, 9), (300, 65)]):
        generator = torch.Generator().manual_seed(inputs)
        codes = torch.randint(-128, 128, (outputs, inputs), generator=generator)
        weight = torch._make_per_tensor_quantized_tensor(codes.to(torch.int8), 1.0, 0)
        with quantized_engine(engine):
            packed = torch.ops.quantized.linear_prepack(weight, None)
        x = torch.rand(rows, inputs, generator=generator)
        wrong, count = differing(Linear(packed, reduce_range=False, relu=False), x, engine=engine)
        bad, total = bad + wrong, total + count
    assert total > 250_000
    assert bad == 0


@pytest.mark.parametrize("shape", [(7, 24), (5, 3, 24), (2, 3, 4, 24), (0, 24)])
@pytest.mark.parametrize("flow", ["fx", "eager"])
@pytest.mark.parametrize("engine", ENGINES)
def test_flows(engine: str, flow: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    with quantized_engine(engine), quiet():
        if flow == "fx":
            mapping = QConfigMapping().set_global(default_dynamic_qconfig)
            model: Any = convert_fx(prepare_fx(Stack().eval(), mapping, (x,)))
        else:
            model = quantize_dynamic(Stack().eval(), {nn.Linear}, dtype=torch.qint8)
    bad, total = differing(model, x, engine=engine)
    assert total == x.numel() // 3
    assert bad == 0


KINDS = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
SHAPES = {1: (31, 8, 131), 2: (5, 8, 53, 37), 3: (4, 8, 13, 14, 11)}


class Conv(nn.Module):
    def __init__(self, inner: nn.Module, *, reduce_range: bool) -> None:
        super().__init__()
        self.inner, self.reduce_range = inner, reduce_range

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, self.reduce_range)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_conv(engine: str, kind: str) -> None:
    if kind.endswith("3d") and engine == "qnnpack":
        pytest.skip("torch can't unpack its weights")
    dims, bad, total = int(kind[-2]), 0, 0
    options = itertools.product(("zeros", "reflect"), (1, 2), (False, True))
    for seed, (mode, groups, reduce_range) in enumerate(options):
        if mode != "zeros" and (kind.startswith("ConvT") or dims == 3):
            continue
        with quantized_engine(engine), quiet():
            inner = getattr(nnqd, kind)(
                8, 8, 3, 2, 1, groups=1 if "Tr" in kind else groups, padding_mode=mode
            )
            shape = tuple(inner.weight().shape)
            weight = quantized_weight(shape, per_channel=False, point=0, seed=seed)
            bias = 40 * torch.randn(8)
        model = Conv(inner, reduce_range=reduce_range)
        for x in batches(SHAPES[dims], seed):
            with quantized_engine(engine):  # anew: qnnpack's padding keeps an old zero point
                inner.set_weight_bias(weight, bias)
            wrong, count = differing(model, x, engine=engine)
            bad, total = bad + wrong, total + count
    assert total > 180_000
    assert bad == 0


def test_fbgemm_reads_min_and_max_from_memory() -> None:
    """Of an input with gaps it takes what stands in memory, gaps included; others don't."""
    big = torch.randn(2, 8, 9, 16)
    big[..., 1::2] *= 50
    for engine in ENGINES:
        with quantized_engine(engine), quiet():
            inner = nnqd.Conv2d(8, 8, 3)
        assert differing(Conv(inner, reduce_range=True), big[..., ::2], engine=engine) == (
            0,
            2 * 8 * 7 * 6,
        )


def test_the_model_still_runs_after_its_engine_was_asked_for() -> None:
    """onednn's dynamic linear crashes where a static one of the same shape ran on its weight."""
    for engine in ENGINES:
        with quantized_engine(engine), quiet():
            x = torch.randn(1, 24)
            mapping = QConfigMapping().set_global(default_dynamic_qconfig)
            model: Any = convert_fx(prepare_fx(Stack().eval(), mapping, (x,)))
            emulated = emulate(model)
            assert torch.equal(emulated(x), model(x))


def test_refused() -> None:
    x = torch.randn(2, 24)
    with quiet():
        half = quantize_dynamic(Stack(), {nn.Linear: float16_dynamic_qconfig}, dtype=torch.float16)
    with quantized_engine("fbgemm"), pytest.raises(UnsupportedError, match="not qint8"):
        emulate(half, engine="fbgemm")
    with quantized_engine("fbgemm"), quiet():
        model = quantize_dynamic(Stack(), {nn.Linear}, dtype=torch.qint8)
        emulated = emulate(model, engine="fbgemm")
    x[0, 0] = torch.inf
    with pytest.raises(NonFiniteError):
        emulated(x)


def test_rows() -> None:
    """Every engine has dynamic linear and convolutions, exact."""
    for engine in ("fbgemm", "onednn", "qnnpack"):
        assert table()[engine, "linear_dynamic"].native is False
        assert table()[engine, "conv2d_dynamic"].native is False

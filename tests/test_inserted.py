"""What stands in the graphs of to_int8, by itself: exact on every engine, in every layout."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fxqfix import QParams
from fxqfix._torch import quantized_engine
from fxqfix.inserted import FloatIsland, InMemoryOrder, QuantizedIsland, hold_range, round_to_grid

ENGINES = [e for e in torch.backends.quantized.supported_engines if e != "none"]
CODES = {torch.quint8: torch.arange(256), torch.qint8: torch.arange(-128, 128)}
STORAGE = {torch.quint8: torch.uint8, torch.qint8: torch.int8}
RANGES = {
    torch.quint8: [(0, 127), (0, 255), (1, 254), (0, 15), (3, 3), (100, 200)],
    torch.qint8: [(-64, 63), (-128, 127), (-127, 127), (-8, 7), (0, 0), (-100, 20)],
}
SCALES = [1e-30, 6.1e-5, 1.1920929e-7, 0.0123456789, 1 / 255, 0.1, 1.0, 3.3333333, 1e4, 1e30]


def quantized(codes: Tensor, scale: float, point: int, dtype: torch.dtype) -> Tensor:
    return torch._make_per_tensor_quantized_tensor(codes.to(STORAGE[dtype]), scale, point)


def layouts(codes: Tensor) -> dict[str, Tensor]:
    """The same 256 codes, shaped and laid out in each way that kernels give."""
    image, volume = codes.reshape(2, 8, 4, 4), codes.reshape(1, 4, 4, 4, 4)
    return {
        "flat": codes,
        "contiguous": image,
        "channels-last": image.contiguous(memory_format=torch.channels_last),
        "one pixel": codes.reshape(8, 32, 1, 1).contiguous(memory_format=torch.channels_last),
        "one channel": codes.reshape(4, 1, 8, 8).contiguous(memory_format=torch.channels_last),
        "volume": volume.contiguous(memory_format=torch.channels_last_3d),
        "transposed": codes.reshape(16, 16).t(),
        "sliced": image.contiguous(memory_format=torch.channels_last)[:, 1:7],
        "strided": image[:, :, ::2, 1:],
    }


@pytest.mark.parametrize("dtype", [torch.quint8, torch.qint8], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_all_codes_on_every_grid(engine: str, dtype: torch.dtype) -> None:
    codes = CODES[dtype]
    points = [int(codes[i]) for i in (0, 1, 63, 64, 127, 128, 200, 255)]
    with quantized_engine(engine):
        for scale in SCALES:
            for point in points:
                x = quantized(codes, scale, point, dtype)
                for low, high in RANGES[dtype]:
                    found = hold_range(x, low, high)
                    assert torch.equal(found.int_repr().long(), codes.clamp(low, high))
                    assert (found.q_scale(), found.q_zero_point()) == (x.q_scale(), point)
                assert torch.equal(x.int_repr().long(), codes)  # the input is as it was


@pytest.mark.parametrize("dtype", [torch.quint8, torch.qint8], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_layout(engine: str, dtype: torch.dtype) -> None:
    with quantized_engine(engine):
        codes = layouts(CODES[dtype])
        for name, x in layouts(quantized(CODES[dtype], 0.05, 3, dtype)).items():
            assert x.stride() == codes[name].stride()
            found = hold_range(x, 2, 99)
            assert torch.equal(found.int_repr().long(), codes[name].clamp(2, 99)), name
            if name not in ("transposed", "sliced", "strided"):
                assert found.stride() == x.stride(), name


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # strides are constants, on qnnpack
@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_traced_as_a_clamp(engine: str) -> None:
    x = layouts(quantized(CODES[torch.quint8], 0.05, 3, torch.quint8))["channels-last"]

    class Held(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return hold_range(x, 0, 127)

    with quantized_engine(engine):
        traced = torch.jit.trace(Held(), x)
        assert "aten::clamp" in str(traced.graph)
        other = x.flip(0)
        wanted = other.int_repr().clamp(0, 127)
        assert torch.equal(traced(other).int_repr(), wanted)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("inner", [nn.ReLU6(), nn.Hardtanh(-1.0, 2.0)], ids=str)
def test_memory_order_is_right_where_the_kernel_permutes(inner: nn.Module, engine: str) -> None:
    grid = QParams(0.05, 60, 0, 255, torch.quint8)
    limits = (60, 180) if isinstance(inner, nn.ReLU6) else (40, 100)
    with quantized_engine(engine):
        every = layouts(quantized(CODES[torch.quint8], grid.scales[0], 60, torch.quint8))
        for name in ("flat", "contiguous", "channels-last", "one pixel", "volume"):
            codes, x = layouts(CODES[torch.quint8])[name], every[name]
            found = InMemoryOrder(inner, "a test")(x)
            assert torch.equal(found.int_repr().long(), codes.clamp(*limits)), name
            assert found.stride() == x.stride(), name


def test_an_island_computes_its_float_op() -> None:
    grid = QParams(0.05, 3, 0, 255, torch.quint8)
    inner = nn.Linear(4, 4)
    island = FloatIsland(inner, QParams(0.1, 0, -128, 127, torch.qint8), "a test")
    x = quantized(torch.arange(12).reshape(3, 4), 0.5, 3, torch.quint8)
    wanted = inner(x.dequantize())
    assert torch.equal(island(x.dequantize()), wanted)
    closed = copy.deepcopy(QuantizedIsland(island, grid))
    found = closed(x)
    assert torch.equal(
        found.int_repr(), torch.quantize_per_tensor(wanted, 0.05, 3, torch.quint8).int_repr()
    )
    assert torch.equal(QuantizedIsland(island, None)(x.dequantize()), wanted)


@pytest.mark.parametrize("dtype", [torch.quint8, torch.qint8], ids=str)
def test_rounding_is_fake_quantize(dtype: torch.dtype) -> None:
    """Ties, near ties, values beyond the range: the bits of torch's fake-quantize."""
    codes = CODES[dtype]
    halves = torch.arange(-600, 600) / 2
    for scale in SCALES:
        if not 1e-12 < scale < 1e12:
            continue  # the float values leave float32's normal numbers
        exact = float(torch.tensor(scale))
        ties = halves * exact
        x = torch.cat([ties, ties.nextafter(ties + 1), ties.nextafter(ties - 1), 90 * ties])
        for point in (int(codes[i]) for i in (0, 1, 64, 127, 128, 255)):
            for low, high in RANGES[dtype]:
                if not low <= point <= high:
                    continue  # fake-quantize refuses it
                wanted = torch.fake_quantize_per_tensor_affine(x, scale, point, low, high)
                found = round_to_grid(x, exact, point, low, high)
                assert torch.equal(found, wanted)
                steps = (wanted.double() / exact).round().long() + point
                assert torch.equal(
                    torch.quantize_per_tensor(found, scale, point, dtype).int_repr().long(), steps
                )

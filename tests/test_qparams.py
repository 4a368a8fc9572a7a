"""The quantize / dequantize arithmetic against torch's own kernels, code for code.

The kernels are the reference everywhere; the package's functions are only ever the thing tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxqfix import QParams
from fxqfix._regrid import regrid
from fxqfix._torch import decomposed
from fxqfix.errors import NonFiniteError
from fxqfix.qparams import (
    container_range,
    dequantize,
    quantize,
    quantize_native,
    zero_point_first,
)

INF = torch.tensor(math.inf)

# (dtype, quant_min, quant_max): whole containers, reduce_range, sub-8-bit in an 8-bit container.
RANGES = [
    (torch.quint8, 0, 255),
    (torch.quint8, 0, 127),
    (torch.quint8, 0, 15),
    (torch.quint8, 1, 1),
    (torch.qint8, -128, 127),
    (torch.qint8, -127, 127),
    (torch.qint8, -64, 63),
    (torch.qint8, -8, 7),
    (torch.qint32, -(2**31), 2**31 - 1),
]
SCALES = [1.0, 0.5, 2.0**-7, 1 / 255, 2 / 255, 0.1, 1.1920929e-07, 6.1035156e-05, 3e4]


def exact(scale: float) -> float:
    """The float32 nearest to a number: what every observer and fake-quant holds."""
    return float(torch.tensor(scale))


def scales(count: int, generator: torch.Generator) -> list[float]:
    spread = torch.exp(torch.empty(count).uniform_(-16, 8, generator=generator))
    return [*spread.tolist(), *map(exact, SCALES)]


def values(scale: Tensor, low: int, high: int, count: int, generator: torch.Generator) -> Tensor:
    """Noise, ties, the floats right beside ties, grid points and extremes, for one scale."""
    low, high = max(low, -128) - 300, min(high, 255) + 300
    codes = torch.randint(low, high, (count,), generator=generator)
    ties = ((codes.double() + 0.5) * scale.double()).float()
    extremes = torch.tensor([0.0, -0.0, 1e-45, 1e-38, -1e-30, 65504.0])
    return torch.cat(
        [
            torch.randn(count, generator=generator) * scale * 100,
            ties,
            torch.nextafter(ties, INF),
            torch.nextafter(ties, -INF),
            (codes * scale).float(),
            extremes,
            torch.tensor([2.0**31, 2.0**33, -(2.0**33), 2.0**60, -(2.0**60)]) * scale,
        ]
    )


def point(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(max(low, -128), min(high, 255) + 1, (1,), generator=generator))


def differing(a: Tensor, b: Tensor) -> int:
    assert a.shape == b.shape
    return 0 if torch.equal(a, b) else int((a != b).sum())


# --- per tensor ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "low", "high"), RANGES)
def test_per_tensor_kernels(dtype: torch.dtype, low: int, high: int) -> None:
    """Fake-quantize (both forms), the decomposed ops and the native kernel, on millions of values.

    Sizes are no multiple of a vector, so that the kernels' scalar tails are in.
    """
    ops, generator, count = decomposed(), torch.Generator().manual_seed(1), 0
    for scale in scales(60, generator):
        zero_point = point(low, high, generator)
        q = QParams(scale, zero_point, low, high, dtype)
        x = values(torch.tensor(scale), low, high, 1999, generator)
        codes = quantize(x, q)
        given = (scale, zero_point, low, high, q.storage)
        assert differing(codes, ops.quantize_per_tensor(x, *given).int()) == 0
        held = torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)
        tensors = (*held, low, high, q.storage)
        assert differing(codes, ops.quantize_per_tensor.tensor(x, *tensors).int()) == 0
        if dtype != torch.qint32:  # int32 codes don't fit float32
            fake = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)
            assert differing(dequantize(codes, q), fake) == 0
            fake = torch.fake_quantize_per_tensor_affine(x, *held, low, high)
            assert differing(dequantize(codes, q), fake) == 0
            integers = codes.to(q.storage)
            assert differing(dequantize(codes, q), ops.dequantize_per_tensor(integers, *given)) == 0
        native = torch.quantize_per_tensor(x, scale, zero_point, dtype)
        assert differing(quantize_native(x, q), native.int_repr().int()) == 0
        # At int32's very ends code - zp wraps in the kernel.
        held = native.int_repr().double().abs() < 2.0**31 - 256
        assert differing(dequantize(native.int_repr(), q)[held], native.dequantize()[held]) == 0
        count += x.numel()
    assert count > 600_000


@pytest.mark.parametrize("size", [*range(1, 40), 64, 65])
def test_native_kernel_at_every_size(size: int) -> None:
    """The vector body and the scalar tail of torch.quantize_per_tensor round alike."""
    generator = torch.Generator().manual_seed(size)
    for _ in range(40):
        scale = exact(float(torch.exp(torch.empty(1).uniform_(-8, 4, generator=generator))))
        q = QParams(scale, point(0, 255, generator), 0, 255, torch.quint8)
        x = values(torch.tensor(scale), 0, 255, size, generator)[size : 2 * size]
        native = torch.quantize_per_tensor(x, scale, int(q.zero_points[0]), torch.quint8)
        assert torch.equal(quantize_native(x, q), native.int_repr().int())


def test_native_kernel_rounds_once() -> None:
    """The kernel is an fma: found by search, the one input where float64 and float32 both round."""
    x, scale, zero_point = -0.8857303261756897, 1.7714877128601074, 129
    q = QParams(scale, zero_point, 0, 255, torch.quint8)
    given = torch.tensor([x])
    product = given.double() * (1.0 / torch.tensor(scale)).double()
    twice = torch.round((product + zero_point).float())
    native = torch.quantize_per_tensor(given, scale, zero_point, torch.quint8).int_repr()
    assert (int(twice), int(native), int(quantize_native(given, q))) == (128, 129, 129)


def test_fake_and_native_quantize_differ_on_ties_only() -> None:
    """By one code, where an odd zero point flips the parity of the tie, in some builds of torch."""
    q = QParams(1.0, 1, 0, 255, torch.quint8)
    ties = torch.arange(200) + 0.5
    gap = quantize_native(ties, q) - quantize(ties, q)
    if not zero_point_first():
        assert int((gap != 0).sum()) == 0
        return
    assert gap.abs().max() == 1
    assert int((gap != 0).sum()) == 200
    beside = torch.cat([torch.nextafter(ties, INF), torch.nextafter(ties, -INF)])[2:]
    near = quantize_native(beside, q) - quantize(beside, q)
    assert int((near != 0).sum()) < 200  # float32 can't hold every neighbour plus the zero point


@pytest.mark.parametrize("first", [True, False])
def test_both_builds_rules(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """This torch's build follows one; the figures of the other were read off that other."""
    monkeypatch.setattr("fxqfix.qparams.zero_point_first", lambda: first)
    q = QParams(1.0, 1, 0, 255, torch.quint8)
    x = torch.tensor([0.5, 1.5, 2.5, 1e19, -1e19])
    wanted = [2, 2, 4, 255, 0] if first else [1, 3, 3, 255, 0]
    assert quantize_native(x, q).tolist() == wanted
    # In vectors of int32 the zero point takes a value beyond 2^31 steps round to the other end.
    far = quantize_native(torch.tensor([1e19, 2.0**31]), replace(q, zero_point=215))
    assert far.tolist() == ([255, 255] if first else [0, 0])


def test_the_probe_does_not_depend_on_defaults() -> None:
    wanted, before = zero_point_first(), torch.get_default_dtype()
    zero_point_first.cache_clear()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            assert zero_point_first() is wanted
    finally:
        torch.set_default_dtype(before)


def test_scale_beyond_float32() -> None:
    """Of a Python scale that float32 can't hold, fake-quantize takes the float32 value first."""
    scale, ops = 1 / 255, decomposed()
    assert scale != exact(scale)
    ties = ((torch.arange(-200, 200).double() + 0.5) * scale).float()
    q = QParams(scale, 0, -128, 127, torch.qint8)
    fake = torch.fake_quantize_per_tensor_affine(ties, scale, 0, -128, 127)
    assert torch.equal(dequantize(quantize(ties, q), q), fake)
    native = torch.quantize_per_tensor(ties, scale, 0, torch.qint8)
    assert torch.equal(quantize_native(ties, q), native.int_repr().int())
    divided_first = ops.quantize_per_tensor(ties, scale, 0, -128, 127, torch.int8).int()
    gap = (divided_first - quantize(ties, q)).abs()
    assert 0 < int((gap != 0).sum()) < 400
    assert int(gap.max()) == 1


def test_wide_codes() -> None:
    """Codes that float32 can't hold: dequantize subtracts in integers, as the native kernel does.

    The decomposed op converts to float first; they agree up to 2**24.
    """
    q = QParams(0.25, 7, *container_range(torch.qint32), torch.qint32)
    codes = torch.randint(-(2**31) + 8, 2**31 - 1, (4000,)).int()
    native = torch._make_per_tensor_quantized_tensor(codes, 0.25, 7).dequantize()
    assert torch.equal(dequantize(codes, q), native)
    lowest = torch.tensor([-(2**31)], dtype=torch.int32)
    assert dequantize(lowest, q).item() == -(2.0**31) * 0.25
    ops, small = decomposed(), codes % 2**23
    given = (0.25, 7, q.quant_min, q.quant_max, torch.int32)
    assert torch.equal(dequantize(small, q), ops.dequantize_per_tensor(small, *given))


# --- per channel ---------------------------------------------------------------------------------


def channels(
    low: int, high: int, axis: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, scales, zero points) of five channels, each with its own ties."""
    scale = torch.exp(torch.empty(5).uniform_(-16, 6, generator=generator))
    points = torch.tensor([point(low, high, generator) for _ in range(5)])
    x = torch.stack([values(s, low, high, 201, generator) for s in scale])
    return (x if axis == 0 else x.t().contiguous()), scale, points


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("dtype", "low", "high"), RANGES)
def test_per_channel_kernels(dtype: torch.dtype, low: int, high: int, axis: int) -> None:
    ops, generator = decomposed(), torch.Generator().manual_seed(axis)
    for _ in range(30):
        x, scale, points = channels(low, high, axis, generator)
        q = QParams(tuple(scale.tolist()), tuple(points.tolist()), low, high, dtype, axis)
        codes = quantize(x, q)
        given = (scale, points, axis, low, high, q.storage)
        assert differing(codes, ops.quantize_per_channel(x, *given).int()) == 0
        if dtype != torch.qint32:
            fake = torch.fake_quantize_per_channel_affine(x, scale, points.int(), axis, low, high)
            assert differing(dequantize(codes, q), fake) == 0
            integers = codes.to(q.storage)
            found = ops.dequantize_per_channel(integers, *given)
            assert differing(dequantize(codes, q), found) == 0
        native = torch.quantize_per_channel(x, scale, points, axis, dtype)
        assert differing(quantize_native(x, q), native.int_repr().int()) == 0
        assert differing(dequantize(native.int_repr(), q), native.dequantize()) == 0


def test_per_channel_scale_beyond_float32() -> None:
    """torch.quantize_per_channel keeps its scales in double; per tensor they are rounded first."""
    scale = torch.tensor([1 / 255, 0.1, 1 / 3], dtype=torch.float64)
    codes = torch.arange(-128, 128, dtype=torch.int8).repeat(3, 1)
    points = torch.tensor([3, 0, -90])
    native = torch._make_per_channel_quantized_tensor(codes, scale, points, 0).dequantize()
    q = QParams(tuple(scale.tolist()), tuple(points.tolist()), -128, 127, torch.qint8, 0)
    assert torch.equal(dequantize(codes, q), native)
    rounded = (codes.int() - points[:, None]).float() * scale.float()[:, None]
    assert not torch.equal(rounded, native)


def test_float_qparams() -> None:
    """Embedding weights: the zero point is a float and is added before the rounding."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        scale = torch.exp(torch.empty(5).uniform_(-8, 4, generator=generator))
        points = torch.empty(5).uniform_(0, 255, generator=generator)
        codes = torch.randint(0, 256, (5, 301), generator=generator)
        middle = codes.double() + 0.5 - points[:, None].double()
        ties = (middle * scale[:, None].double()).float()
        noise = torch.randn(5, 301, generator=generator) * 60 * scale[:, None]
        x = torch.cat([ties, torch.nextafter(ties, INF), torch.nextafter(ties, -INF), noise], 1)
        native = torch.quantize_per_channel(x, scale, points, 0, torch.quint8)
        q = QParams(tuple(scale.tolist()), tuple(points.tolist()), 0, 255, torch.quint8, 0)
        assert differing(quantize(x, q), native.int_repr().int()) == 0
        assert differing(dequantize(native.int_repr(), q), native.dequantize()) == 0


def test_beyond_int64_the_per_channel_kernel_wraps_and_quantize_does_not() -> None:
    """A fact about torch's kernel: it casts to int64 before it clamps."""
    scale, x = torch.tensor([1e-3]), torch.tensor([[3e38, 1e17, 1e3]])
    q = QParams((exact(1e-3),), (5,), 0, 255, torch.quint8, 0)
    assert quantize(x, q).tolist() == [[255, 255, 255]]
    fake = torch.fake_quantize_per_channel_affine(
        x, scale, torch.tensor([5], dtype=torch.int32), 0, 0, 255
    )
    per_tensor = torch.fake_quantize_per_tensor_affine(x, exact(1e-3), 5, 0, 255)
    if WRAPS is not None:
        pytest.skip(f"in torch {torch.__version__} the per-tensor kernel wraps too")
    assert torch.equal(per_tensor, dequantize(quantize(x, q), q))
    assert fake[0, 0] != per_tensor[0, 0]
    assert fake[0, 2] == per_tensor[0, 2]


# Steps of the grid from which fake-quantize per tensor wraps around: it does in older builds.
_FAR = torch.fake_quantize_per_tensor_affine(torch.tensor([1e19]), 1.0, 0, 0, 255)
WRAPS = None if _FAR.item() == 255 else 2.0**62


# --- any qparams ---------------------------------------------------------------------------------


@st.composite
def grids(draw: st.DrawFn) -> QParams:
    dtype = draw(st.sampled_from([torch.quint8, torch.qint8]))
    bottom, top = container_range(dtype)
    low = draw(st.integers(bottom, top))
    high = draw(st.integers(low, top))
    scale = draw(st.floats(exact(1e-30), exact(1e30), width=32))
    return QParams(scale, draw(st.integers(low, high)), low, high, dtype)


@st.composite
def grids_with_values(draw: st.DrawFn) -> tuple[QParams, Tensor]:
    """A grid, and values that lie anywhere, on its ties and beside them."""
    q = draw(grids())
    scale = torch.tensor(q.scales[0])
    halves = draw(st.lists(st.integers(-1200, 1200), min_size=1, max_size=40))
    ties = (torch.tensor(halves).double() * 0.5 * scale.double()).float()
    anywhere = draw(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), max_size=20))
    x = torch.cat([ties, torch.nextafter(ties, INF), torch.nextafter(ties, -INF)])
    return q, torch.cat([x, torch.tensor(anywhere, dtype=torch.float32)])


@given(grids_with_values())
@settings(max_examples=300)
def test_any_qparams(case: tuple[QParams, Tensor]) -> None:
    q, x = case
    scale, zero_point = q.scales[0], int(q.zero_points[0])
    codes = quantize(x, q)
    assert int(codes.min()) >= q.quant_min
    assert int(codes.max()) <= q.quant_max
    given = (scale, zero_point, q.quant_min, q.quant_max)
    assert torch.equal(codes, decomposed().quantize_per_tensor(x, *given, q.storage).int())
    fake = torch.fake_quantize_per_tensor_affine(x, *given)
    inside = x.double().abs() < (INF if WRAPS is None else WRAPS * scale)
    assert torch.equal(dequantize(codes, q)[inside], fake[inside])
    native = torch.quantize_per_tensor(x, scale, zero_point, q.dtype)
    assert torch.equal(quantize_native(x, q), native.int_repr().int())


@given(grids(), grids(), st.data())
@settings(max_examples=200)
def test_regrid_is_the_nearest_point(a: QParams, b: QParams, data: st.DataObject) -> None:
    """Against exact rational arithmetic: no other point of the target grid is nearer."""
    from fractions import Fraction

    code = data.draw(st.integers(*a.container))
    found = int(regrid(torch.tensor([code]), a, b))
    if a.same_grid(b):
        assert found == code
        return
    value = Fraction(a.scales[0]) * (code - int(a.zero_points[0]))
    step = Fraction(b.scales[0])
    if abs(value / step) > 2**29:  # held at the end of the int32 range
        assert abs(found) >= 2**29
        return
    gap = abs(value - step * (found - int(b.zero_points[0])))
    assert gap <= step / 2 * (1 + Fraction(1, 2**20))


def test_regrid_of_equal_grids_keeps_codes() -> None:
    q = QParams(0.1, 3, 0, 127, torch.quint8)
    codes = torch.arange(256).to(torch.uint8)
    assert regrid(codes, q, q.with_range(0, 255)).tolist() == list(range(256))
    other = QParams(0.1, 4, 0, 255, torch.quint8)
    assert regrid(codes, q, other).tolist() == list(range(1, 257))  # 256 is not clamped


def test_regrid_far_apart_saturates() -> None:
    """The difference of two codes must not overflow int32."""
    coarse = QParams(1e9, 0, -128, 127, torch.qint8)
    fine = QParams(1e-9, 0, -128, 127, torch.qint8)
    assert regrid(torch.tensor([127, -128]), coarse, fine).tolist() == [2**30, -(2**30)]


# --- the record ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: QParams(math.nan, 0, 0, 255, torch.quint8),
        lambda: QParams(math.inf, 0, 0, 255, torch.quint8),
        lambda: QParams(0.0, 0, 0, 255, torch.quint8),
        lambda: QParams(-0.5, 0, 0, 255, torch.quint8),
        lambda: QParams(0.5, math.nan, 0, 255, torch.quint8),
        lambda: QParams(0.5, math.inf, 0, 255, torch.quint8),
        lambda: QParams((0.5, math.nan), (0, 0), 0, 255, torch.quint8, 0),
        lambda: QParams((0.5, 0.5), (0, math.nan), 0, 255, torch.quint8, 0),
    ],
)
def test_qparams_refuse_what_no_kernel_can_use(make: Callable[[], QParams]) -> None:
    with pytest.raises(NonFiniteError, match=r"not finite and positive.*To do: reset") as info:
        make()
    assert isinstance(info.value, ValueError)


@pytest.mark.parametrize(
    ("dtype", "storage", "low", "high"),
    [
        (torch.quint8, torch.uint8, 0, 255),
        (torch.uint8, torch.uint8, 0, 255),
        (torch.qint8, torch.int8, -128, 127),
        (torch.int8, torch.int8, -128, 127),
        (torch.qint32, torch.int32, -(2**31), 2**31 - 1),
        (torch.int16, torch.int16, -(2**15), 2**15 - 1),
    ],
)
def test_containers(dtype: torch.dtype, storage: torch.dtype, low: int, high: int) -> None:
    q = QParams(1.0, 0, low, high, dtype)
    assert (q.container, q.storage, q.is_narrow) == ((low, high), storage, False)
    assert q.with_range(low, high - 1).is_narrow
    assert q.with_range(low + 1, high).is_narrow
    assert q.with_range(0, 1) == QParams(1.0, 0, 0, 1, dtype)


def test_text() -> None:
    q = QParams((0.25, 2 / 3), (0, 0), -8, 7, torch.qint8, axis=1)
    assert str(q) == "scale=0.25..0.666667 zp=0 [-8,7] qint8"
    assert str(QParams(1 / 255, -128, -128, 127, torch.int8)) == (
        "scale=0.00392157 zp=-128 [-128,127] int8"
    )


def test_same_grid() -> None:
    q = QParams(0.5, 3, 0, 127, torch.quint8)
    assert q.same_grid(QParams(0.5, 3, 0, 255, torch.quint8))
    assert q.same_grid(QParams((0.5,), (3,), 0, 255, torch.quint8, axis=1))
    assert not q.same_grid(QParams(exact(0.5000001), 3, 0, 127, torch.quint8))
    assert not q.same_grid(QParams(0.5, 4, 0, 127, torch.quint8))
    channel = QParams((0.5, 0.25), (3, 3), 0, 127, torch.quint8, axis=0)
    assert not channel.same_grid(QParams((0.5, 0.25), (3, 3), 0, 127, torch.quint8, axis=1))
    assert not q.same_grid(QParams((0.5, 0.5), (3, 3), 0, 127, torch.quint8, axis=0))


def test_hash_and_equality() -> None:
    make = lambda: QParams((0.5, 0.25), (0, 0), -128, 127, torch.qint8, 0)  # noqa: E731
    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != QParams((0.5, 0.25), (0, 0), -127, 127, torch.qint8, 0)

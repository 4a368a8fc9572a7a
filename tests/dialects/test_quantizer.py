"""`read_quantizer(m).used` is what m's forward does: decided by running a copy of m.

Every observer and fake-quant class of torch.ao, per tensor and per channel, symmetric and affine,
of every range. The forward's outputs have to be torch.equal to `used` applied by hand.
"""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.quantization import observer as tobs
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

from fxqfix import QParams
from fxqfix._torch import quiet
from fxqfix.dialects.quantizer import QuantizerState, read_quantizer
from fxqfix.errors import NonFiniteError
from fxqfix.qparams import container_range, dequantize, quantize
from tests.states import fingerprint

AFFINE, SYMMETRIC = torch.per_tensor_affine, torch.per_tensor_symmetric
CHANNEL_AFFINE, CHANNEL_SYMMETRIC = torch.per_channel_affine, torch.per_channel_symmetric

# (dtype, quant_min, quant_max); None means the observer's default range.
RANGES = [
    (torch.quint8, None, None),
    (torch.qint8, None, None),
    (torch.quint8, 0, 127),
    (torch.quint8, 0, 255),
    (torch.qint8, -128, 127),
    (torch.qint8, -127, 127),
    (torch.quint8, 0, 15),
    (torch.qint8, -8, 7),
    (torch.qint8, -2, 1),
]

# What is observed: both signs, one sign each, a tiny range, a channel of zeros.
DATA = {
    "both signs": torch.linspace(-2.3, 3.1, 6 * 4 * 3).reshape(6, 4, 3).sin() * 2,
    "positive": torch.linspace(0.2, 3.1, 6 * 4 * 3).reshape(6, 4, 3),
    "negative": -torch.linspace(0.2, 3.1, 6 * 4 * 3).reshape(6, 4, 3),
    "tiny": torch.linspace(-1e-7, 2e-7, 6 * 4 * 3).reshape(6, 4, 3),
    "zeros": torch.zeros(6, 4, 3),
}


def dense(used: QParams) -> Tensor:
    """Values over twice the range of a grid, its ties and their neighbours, in each channel."""
    low, high = used.container
    steps = torch.arange(2 * (low - 40), 2 * (high + 40)).double() / 2
    scale, _ = used.tensors(torch.zeros(6, 4, 1))
    ties = (steps * scale.double()).float().expand(6, 4, -1)
    top = torch.tensor(math.inf)
    return torch.cat([ties, torch.nextafter(ties, top), torch.nextafter(ties, -top)], 2)


def held(module: nn.Module) -> nn.Module:
    """A copy whose observer stands still."""
    own = copy.deepcopy(module)
    if hasattr(own, "disable_observer"):
        own.disable_observer()
    return own


def assert_used(module: nn.Module, state: QuantizerState) -> None:
    used, own = state.used, held(module)
    assert used is not None
    x = dense(used)
    with torch.no_grad():
        assert torch.equal(own(x), dequantize(quantize(x, used), used))


def observed(module: nn.Module, *batches: Tensor) -> nn.Module:
    with quiet():
        for batch in batches:
            module(batch)
    return module


def read(module: nn.Module) -> QuantizerState:
    """Read a module, asserting that it is left alone."""
    before = fingerprint(module)
    state = read_quantizer(module)
    assert fingerprint(module) == before
    return state


def options(dtype: torch.dtype, low: int | None, high: int | None) -> dict[str, object]:
    given = {"dtype": dtype}
    return given if low is None else {**given, "quant_min": low, "quant_max": high}


# --- observers -----------------------------------------------------------------------------------

PER_TENSOR_OBSERVERS = [
    tq.MinMaxObserver,
    tq.MovingAverageMinMaxObserver,
    functools.partial(tq.HistogramObserver, bins=64),
]
PER_CHANNEL_OBSERVERS = [tq.PerChannelMinMaxObserver, tq.MovingAveragePerChannelMinMaxObserver]
OBSERVERS = [
    *itertools.product(PER_TENSOR_OBSERVERS, (AFFINE, SYMMETRIC), (-1,)),
    *itertools.product(PER_CHANNEL_OBSERVERS, (CHANNEL_AFFINE, CHANNEL_SYMMETRIC), (0, 1)),
]


def observer_name(value: object) -> str | None:
    inner = getattr(value, "func", value)
    return getattr(inner, "__name__", None)


def make_observer(
    kind: Callable[..., nn.Module], scheme: torch.qscheme, axis: int, **given: object
) -> nn.Module:
    with quiet():
        if axis >= 0:
            given["ch_axis"] = axis
        return kind(qscheme=scheme, **given)


@pytest.mark.parametrize(("dtype", "low", "high"), RANGES)
@pytest.mark.parametrize(("kind", "scheme", "axis"), OBSERVERS, ids=observer_name)
def test_observer(
    kind: Callable[..., nn.Module],
    scheme: torch.qscheme,
    axis: int,
    dtype: torch.dtype,
    low: int | None,
    high: int | None,
) -> None:
    """An observer computes in float; `used` is what conversion would bake, on its own range."""
    module = make_observer(kind, scheme, axis, **options(dtype, low, high))
    assert_observed(module, axis, dtype)
    used = read(module).used
    assert used is not None
    if low is not None:
        assert (used.quant_min, used.quant_max) == (low, high)
    else:
        assert not used.is_narrow


@pytest.mark.parametrize("kind", [tq.MinMaxObserver, tq.PerChannelMinMaxObserver])
def test_observer_of_32_bits(kind: Callable[..., nn.Module]) -> None:
    """The only observers of torch that take qint32."""
    axis = 0 if kind is tq.PerChannelMinMaxObserver else -1
    scheme = SYMMETRIC if axis < 0 else CHANNEL_SYMMETRIC
    module = make_observer(kind, scheme, axis, dtype=torch.qint32)
    assert_observed(module, axis, torch.qint32)


def assert_observed(module: nn.Module, axis: int, dtype: torch.dtype) -> None:
    observed(module, DATA["both signs"], DATA["positive"])
    state = read(module)
    with quiet():
        scale, zero_point = copy.deepcopy(module).calculate_qparams()
    assert state.used is not None
    assert state.used == state.baked
    assert list(state.used.scales) == scale.tolist()
    assert list(state.used.zero_points) == zero_point.tolist()
    assert state.used.axis == (axis if axis >= 0 else None)
    assert (state.quantizes, state.calibrated, state.observing) == (False, True, True)
    assert state.used.dtype == dtype


# torch has no reduced range for symmetric quint8.
REDUCED = [(*o, torch.qint8, -64, 63) for o in OBSERVERS]
REDUCED += [(*o, torch.quint8, 0, 127) for o in OBSERVERS if o[1] in (AFFINE, CHANNEL_AFFINE)]


@pytest.mark.parametrize(
    ("kind", "scheme", "axis", "dtype", "low", "high"), REDUCED, ids=observer_name
)
def test_reduce_range(
    kind: Callable[..., nn.Module],
    scheme: torch.qscheme,
    axis: int,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> None:
    module = make_observer(kind, scheme, axis, dtype=dtype, reduce_range=True)
    state = read(observed(module, DATA["both signs"]))
    assert state.used is not None
    assert (state.used.quant_min, state.used.quant_max) == (low, high)
    assert state.used.is_narrow


@pytest.mark.parametrize(("kind", "scheme", "axis"), OBSERVERS, ids=observer_name)
def test_observer_that_never_saw_data(
    kind: Callable[..., nn.Module], scheme: torch.qscheme, axis: int
) -> None:
    module = make_observer(kind, scheme, axis)
    assert not read(module).calibrated
    observed(module, DATA["both signs"])
    assert read(module).calibrated
    if not isinstance(module, tq.HistogramObserver):  # torch can't reset this one
        module.reset_min_max_vals()
        assert not read(module).calibrated


def test_fixed_qparams_observer() -> None:
    module = tq.FixedQParamsObserver(1 / 256, 0)
    state = read(module)
    assert state.used == QParams(1 / 256, 0, 0, 255, torch.quint8)
    assert (state.quantizes, state.calibrated) == (False, True)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (tq.PlaceholderObserver(dtype=torch.float16), "placeholder for torch.float16"),
        (tq.default_placeholder_observer(), "placeholder for torch.float32"),
        (tq.default_dynamic_quant_observer(), "dynamic"),
        (tq.MovingAverageMinMaxObserver(averaging_constant=1.0, is_dynamic=True), "dynamic"),
        (tq.NoopObserver(), "placeholder"),
        (tobs.ReuseInputObserver(), "placeholder"),
        (tq.RecordingObserver(), "placeholder"),
        (tq.default_dynamic_fake_quant(), "dynamic"),
    ],
)
def test_without_static_qparams(module: nn.Module, source: str) -> None:
    """Marked as such, before and after data."""
    for _ in range(2):
        state = read(module)
        assert (state.used, state.baked, state.quantizes) == (None, None, False)
        assert source in state.source
        assert type(module).__name__ in state.source
        observed(module, DATA["both signs"])


def test_four_bit_weights() -> None:
    """quint4x2 packs two codes into a byte; its container is [0, 15]."""
    state = read(observed(tq.default_float_qparams_observer_4bit(), DATA["both signs"]))
    assert state.used is not None
    assert state.used.container == (0, 15)
    assert (state.used.bits, state.used.is_narrow) == (4, False)
    assert container_range(torch.quint2x4) == (0, 3)


# --- fake-quants ---------------------------------------------------------------------------------


def plain(
    scheme: torch.qscheme, axis: int, dtype: torch.dtype, low: int, high: int
) -> tq.FakeQuantize:
    kind = tq.MovingAverageMinMaxObserver if axis < 0 else tq.MovingAveragePerChannelMinMaxObserver
    given = {"ch_axis": axis} if axis >= 0 else {}
    return tq.FakeQuantize(kind, low, high, dtype=dtype, qscheme=scheme, **given)


def fused(
    scheme: torch.qscheme, axis: int, dtype: torch.dtype, low: int, high: int
) -> tq.FakeQuantize:
    kind = tq.MovingAverageMinMaxObserver if axis < 0 else tq.MovingAveragePerChannelMinMaxObserver
    given = {"ch_axis": axis} if axis >= 0 else {}
    return tq.FusedMovingAvgObsFakeQuantize(kind, low, high, dtype=dtype, qscheme=scheme, **given)


def learnable(
    scheme: torch.qscheme, axis: int, dtype: torch.dtype, low: int, high: int
) -> nn.Module:
    kind = tq.MovingAverageMinMaxObserver if axis < 0 else tq.MovingAveragePerChannelMinMaxObserver
    given = {"ch_axis": axis, "channel_len": (6, 4)[axis]} if axis >= 0 else {}
    return _LearnableFakeQuantize(kind, low, high, dtype=dtype, qscheme=scheme, **given)


SCHEMES = [
    (AFFINE, -1),
    (SYMMETRIC, -1),
    (CHANNEL_AFFINE, 0),
    (CHANNEL_SYMMETRIC, 0),
    (CHANNEL_SYMMETRIC, 1),
]
GIVEN_RANGES = [r for r in RANGES if r[1] is not None]
# torch's fused kernel has channels on axis 0 only.
FAKE_QUANTS = [
    (make, scheme, axis)
    for make, (scheme, axis) in itertools.product((plain, fused, learnable), SCHEMES)
    if not (make is fused and axis == 1)
]
FakeQuant = Callable[[torch.qscheme, int, torch.dtype, int, int], nn.Module]


@pytest.mark.parametrize("seen", DATA)
@pytest.mark.parametrize(("dtype", "low", "high"), GIVEN_RANGES)
@pytest.mark.parametrize(("make", "scheme", "axis"), FAKE_QUANTS, ids=observer_name)
def test_fake_quant(
    make: FakeQuant,
    scheme: torch.qscheme,
    axis: int,
    dtype: torch.dtype,
    low: int,
    high: int,
    seen: str,
) -> None:
    """Observing, then frozen by the user: both times the forward does what `used` says."""
    module = observed(make(scheme, axis, dtype, low, high), DATA[seen], DATA[seen] * 0.9)
    state = read(module)
    assert (state.quantizes, state.calibrated, state.observing) == (True, True, True)
    assert state.used is not None
    assert (state.used.quant_min, state.used.quant_max, state.used.dtype) == (low, high, dtype)
    assert_used(module, state)
    module.disable_observer()
    still = read(module)
    assert (still.used, still.observing) == (state.used, False)


@pytest.mark.parametrize("make", [plain, fused, learnable])
@pytest.mark.parametrize(("scheme", "axis"), SCHEMES[:4])
def test_switches(make: FakeQuant, scheme: torch.qscheme, axis: int) -> None:
    """Fake-quant off: the forward computes in float, and conversion would ask the observer."""
    module = make(scheme, axis, torch.qint8, -128, 127)
    module.disable_fake_quant()
    observed(module, DATA["both signs"])
    state = read(module)
    assert state.quantizes is False
    assert "switched off" in state.source
    assert state.used == state.baked
    assert torch.equal(held(module)(DATA["positive"]), DATA["positive"])
    # After an observe-only phase the buffers of a fused one are stale; the kernel's are not.
    module.enable_fake_quant()
    state = read(module)
    assert state.quantizes
    assert_used(module, state)


def test_stale_buffers_of_the_fused_fake_quant() -> None:
    """Its kernel writes the buffers only while it fake-quantizes: they must not be trusted."""
    module = fused(AFFINE, -1, torch.quint8, 0, 255)
    module.disable_fake_quant()
    observed(module, DATA["both signs"])
    module.enable_fake_quant()
    module.disable_observer()
    assert module.scale.item() == 1.0  # the buffer's start value
    state = read(module)
    assert state.used is not None
    assert state.used.scale != 1.0
    assert_used(module, state)


@pytest.mark.parametrize("make", [plain, learnable])
def test_qparams_set_by_hand(make: FakeQuant) -> None:
    """No observer ran: what was written is what the forward uses, and it counts as calibrated."""
    module = make(AFFINE, -1, torch.quint8, 0, 255)
    module.disable_observer()
    assert not read(module).calibrated
    with torch.no_grad():
        module.scale.fill_(0.125)
        module.zero_point.fill_(3)
    state = read(module)
    assert state.calibrated
    assert state.used == QParams(0.125, 3, 0, 255, torch.quint8)
    assert_used(module, state)


@pytest.mark.parametrize("make", [plain, fused, learnable])
@pytest.mark.parametrize(("scheme", "axis"), SCHEMES[:4])
def test_uncalibrated_is_flagged(make: FakeQuant, scheme: torch.qscheme, axis: int) -> None:
    assert not read(make(scheme, axis, torch.qint8, -128, 127)).calibrated


def test_buffers_after_the_user_moved_the_observer() -> None:
    """Observer off: a plain fake-quant reads its buffers, whatever the observer says by now."""
    module = observed(plain(AFFINE, -1, torch.quint8, 0, 255), DATA["both signs"])
    module.disable_observer()
    module.activation_post_process.max_val.fill_(50.0)
    state = read(module)
    assert state.used != state.baked
    assert_used(module, state)


def test_learned_parameters() -> None:
    """Trained scale and zero point: a float zero point is rounded, symmetric ones are zero."""
    for zero_point in (7.3, 7.5, 8.5, -4.0, 300.0):
        module = observed(learnable(AFFINE, -1, torch.quint8, 0, 255), DATA["both signs"])
        module.enable_param_learning()
        with torch.no_grad():
            module.scale.fill_(0.037)
            module.zero_point.fill_(zero_point)
        state = read(module)
        assert not state.observing
        assert_used(module, state)
    module = observed(learnable(SYMMETRIC, -1, torch.qint8, -128, 127), DATA["both signs"])
    module.enable_param_learning()
    with torch.no_grad():
        module.zero_point.fill_(5.0)
    state = read(module)
    assert state.used is not None
    assert state.used.zero_point == 0
    assert_used(module, state)


def test_learnable_fake_quant_keeps_its_own_range() -> None:
    """Its forward takes its own quant_max, not that of its observer, which halves the range."""
    module = _LearnableFakeQuantize(tq.MinMaxObserver, 0, 255, reduce_range=True)
    state = read(observed(module, DATA["both signs"]))
    assert module.activation_post_process.quant_max == 127
    assert state.used is not None
    assert state.used.quant_max == 255
    assert_used(module, state)


def test_reduce_range_of_a_fake_quant() -> None:
    """A plain or fused one takes its observer's halved range."""
    for kind in (tq.FakeQuantize, tq.FusedMovingAvgObsFakeQuantize):
        module = kind(tq.MovingAverageMinMaxObserver, 0, 255, dtype=torch.quint8, reduce_range=True)
        state = read(observed(module, DATA["both signs"]))
        assert state.used is not None
        assert (state.used.quant_min, state.used.quant_max) == (0, 127)
        assert_used(module, state)


@pytest.mark.parametrize(
    "make",
    [
        tq.default_fixed_qparams_range_0to1_fake_quant,
        tq.default_fixed_qparams_range_neg1to1_fake_quant,
    ],
)
def test_fixed_qparams_fake_quant(make: Callable[[], nn.Module]) -> None:
    module = make()
    for _ in range(2):  # before and after a forward
        state = read(module)
        assert (state.quantizes, state.calibrated, state.observing) == (True, True, False)
        assert_used(module, state)
        module(DATA["both signs"])


@pytest.mark.parametrize(
    "name",
    [
        "default_fake_quant",
        "default_weight_fake_quant",
        "default_per_channel_weight_fake_quant",
        "default_histogram_fake_quant",
        "default_fused_act_fake_quant",
        "default_fused_wt_fake_quant",
        "default_fused_per_channel_wt_fake_quant",
        "fused_wt_fake_quant_range_neg_127_to_127",
        "fused_per_channel_wt_fake_quant_range_neg_127_to_127",
    ],
)
@pytest.mark.parametrize("seen", DATA)
def test_defaults_of_torch(name: str, seen: str) -> None:
    module = observed(getattr(tq.fake_quantize, name)(), DATA[seen])
    assert_used(module, read(module))


def test_float_zero_points() -> None:
    """Embedding weights: the codes are the forward's; its last float bit is its kernel's own."""
    module = observed(tq.default_embedding_fake_quant(), DATA["both signs"])
    state = read(module)
    assert state.used is not None
    assert any(not float(z).is_integer() for z in state.used.zero_points)
    x = torch.randn(6, 4, 300)
    assert torch.equal(quantize(held(module)(x), state.used), quantize(x, state.used))


# --- the fused kernel's formula (ENGINE_ARITHMETIC.md, section 2), written down independently -----

SMALL = float(torch.tensor(6.1e-5))


def kernel_formula(
    low: float, high: float, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[float, int]:
    """Scale and zero point as the kernel picks them, from min and max in float32."""
    f = lambda v: float(torch.tensor(v, dtype=torch.float32))  # noqa: E731
    centred = symmetric and low < 0 < high
    if centred:
        bottom, top = -((quant_max - quant_min) // 2 + 1), (quant_max - quant_min) // 2
        step = max(abs(f(low / bottom)), abs(f(high / top)))
        low, high = f(step * bottom), f(step * top)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (quant_max - quant_min)
    if f(scale) == 0.0 or math.isinf(f(1.0 / f(scale))):
        scale = 0.1
    if scale < SMALL:
        before, scale = f(scale), SMALL
        if low == 0.0:
            high = f(SMALL * (quant_max - quant_min))
        elif high == 0.0:
            low = f(-SMALL * (quant_max - quant_min))
        else:
            amplifier = f(SMALL / before)
            low, high = f(low * amplifier), f(high * amplifier)
    scale = f(scale)  # the zero point is computed from the float32 scale
    if centred:
        return scale, round((quant_min + quant_max) / 2)
    from_low, from_high = quant_min - low / scale, quant_max - high / scale
    low_error = abs(quant_min) - abs(low / scale)
    high_error = abs(quant_max) - abs(high / scale)
    zero_point = from_low if low_error < high_error else from_high
    return scale, round(min(max(zero_point, quant_min), quant_max))


def kernel(low: float, high: float, module: tq.FakeQuantize) -> tuple[float, int]:
    module = copy.deepcopy(module)
    module.activation_post_process.min_val.fill_(low)
    module.activation_post_process.max_val.fill_(high)
    module.disable_observer()
    module(torch.zeros(1))
    return module.scale.item(), int(module.zero_point.item())


finite = st.floats(-1e6, 1e6, width=32)


@given(finite, finite, st.sampled_from(GIVEN_RANGES), st.booleans())
@settings(max_examples=300)
def test_the_kernels_formula(
    a: float, b: float, span: tuple[torch.dtype, int, int], symmetric: bool
) -> None:
    """And `read_quantizer` gives what the kernel gives, by asking it."""
    dtype, low, high = span
    module = fused(SYMMETRIC if symmetric else AFFINE, -1, dtype, low, high)
    bottom, top = min(a, b), max(a, b)
    found = kernel(bottom, top, module)
    assert found == kernel_formula(bottom, top, low, high, symmetric)
    module.activation_post_process.min_val.fill_(bottom)
    module.activation_post_process.max_val.fill_(top)
    used = read(module).used
    assert used is not None
    assert (used.scale, used.zero_point) == found


@pytest.mark.parametrize(
    ("low", "high", "case"),
    [
        (-1.0, 3.0, "min < 0 < max"),
        (0.25, 1.0, "min >= 0"),
        (-1.0, -0.25, "max <= 0"),
        (0.0, 1.0, "min == 0"),
        (-1e-9, 1e-9, "tiny"),
        (0.0, 1e-9, "tiny, one side"),
        (-1e-9, 0.0, "tiny, other side"),
        (0.0, 0.0, "nothing"),
        (1e-38, 1e-38, "denormal scale"),
    ],
)
def test_the_kernel_against_the_observer(low: float, high: float, case: str) -> None:
    """The documented rules of symmetric int8 weights, and where they leave the Python observer."""
    module = fused(SYMMETRIC, -1, torch.qint8, -128, 127)
    scale, zero_point = found = kernel(low, high, module)
    assert found == kernel_formula(low, high, -128, 127, True)
    module.activation_post_process.min_val.fill_(low)
    module.activation_post_process.max_val.fill_(high)
    state = read(module)
    assert state.used is not None
    assert state.baked is not None
    assert (state.used.scale, state.used.zero_point) == found
    if case == "min < 0 < max":
        # reason: the formulas are in double here, and in float32 in the kernel and the observer
        assert scale == pytest.approx(max(abs(low / -128), abs(high / 127)), rel=1e-6)
        assert zero_point == 0
        # reason: as above
        assert state.baked.scale == pytest.approx(max(-low, high) / 127.5, rel=1e-6)
    elif case == "min >= 0":  # user report 000: 1/255 and -128 against 2/255 and 0
        assert (scale, zero_point) == (float(torch.tensor(1 / 255)), -128)
        # reason: as above
        assert state.baked.scale == pytest.approx(2 / 255, rel=1e-6)
        assert state.baked.zero_point == 0
    elif case == "max <= 0":
        assert (scale, zero_point) == (float(torch.tensor(1 / 255)), 127)
        assert state.baked.zero_point == 0
    elif case.startswith("tiny"):
        assert scale == SMALL
        assert state.baked.scale < 2e-7


# --- NaN and inf ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["min_val", "max_val"])
@pytest.mark.parametrize(
    "make",
    [
        tq.MinMaxObserver,
        tq.MovingAverageMinMaxObserver,
        tq.PerChannelMinMaxObserver,
        tq.MovingAveragePerChannelMinMaxObserver,
        tq.FakeQuantize,
        tq.default_fused_act_fake_quant,
        tq.default_fused_per_channel_wt_fake_quant,
    ],
)
def test_range_that_is_none(make: Callable[[], nn.Module], which: str, value: float) -> None:
    """One error with the module's place in it, whatever torch itself would say."""
    module = observed(make(), DATA["both signs"])
    getattr(getattr(module, "activation_post_process", module), which).fill_(value)
    before = fingerprint(module)
    with pytest.raises(NonFiniteError, match="To do: reset the observer") as info:
        read_quantizer(module, "layer1.0.conv")
    assert str(info.value).startswith("layer1.0.conv: ")
    assert type(module).__name__ in str(info.value)
    assert fingerprint(module) == before


@pytest.mark.parametrize("home", ["torch.ao.quantization", "torchao.quantization.pt2e"])
def test_a_histogram_is_searched_once_and_anew_when_it_changed(
    home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is kept by all that it depends on: torch's, of the present state, every time."""
    if home.startswith("torchao"):
        pytest.importorskip("torchao", reason='the extra "pt2e" is not installed')
    kind: Any = importlib.import_module(home).HistogramObserver
    searches = 0
    search = kind._non_linear_param_search

    def counted(self: Any) -> tuple[Tensor, Tensor]:
        nonlocal searches
        searches += 1
        return search(self)

    module: Any = observed(
        kind(bins=53, dtype=torch.quint8 if home.startswith("torch.") else torch.uint8),
        DATA["both signs"],
    )
    monkeypatch.setattr(kind, "_non_linear_param_search", counted)

    def changes() -> Iterator[None]:
        yield
        module.histogram[50] += 9.0
        yield
        module.max_val.mul_(2.0)
        yield
        module.quant_max = 100
        yield
        module.dst_nbins = 32
        yield
        module.dtype = torch.qint8 if home.startswith("torch.") else torch.int8
        module.quant_min, module.quant_max = -128, 127
        yield

    for number, _ in enumerate(changes(), 1):
        scale, point = told_by_torch(module)
        for model in (module, copy.deepcopy(module)):
            used = read_quantizer(model).used
            assert used is not None
            assert (used.scale, used.zero_point) == (scale, point)
        assert searches == 2 * number  # one of them is the question just above


def told_by_torch(module: Any) -> tuple[float, int]:
    with quiet():
        scale, point = copy.deepcopy(module).calculate_qparams()
    return float(scale), int(point)


def test_histogram_without_a_range() -> None:
    module = observed(tq.HistogramObserver(bins=32), DATA["both signs"])
    module.min_val.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="not finite and positive"):
        read_quantizer(module)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_buffers_that_are_none(value: float) -> None:
    module = observed(plain(AFFINE, -1, torch.quint8, 0, 255), DATA["both signs"])
    module.disable_observer()
    module.scale.fill_(value)
    with pytest.raises(NonFiniteError, match="not finite and positive"):
        read_quantizer(module)


NAN = r"1 of 500 channels, channel 17: scale=nan|should be less th"  # or torch's own words


def test_one_bad_channel_of_many_is_named() -> None:
    module = observed(tq.PerChannelMinMaxObserver(), torch.randn(500, 3))
    module.max_val[17] = math.nan
    with pytest.raises(NonFiniteError, match=NAN) as info:
        read_quantizer(module)
    assert len(str(info.value)) < 400

"""Known-wrong kernels of convolutions: conditions beside the kernels that this process runs."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import fxqfix
from fxqfix._torch import quantized_engine, quiet
from fxqfix.dialects.weights import WeightView
from fxqfix.engines import DEFECTS, Call, defect_rows, isa_of, met
from fxqfix.engines._apart import ask
from fxqfix.errors import UnsupportedError
from fxqfix.qparams import QParams

HERE = isa_of(None)
_MEASURED = "2.13.0+cpu"


def _as_measured(name: str) -> None:
    """The conditions were found on one build; where another's kernel is right, they over-reach."""
    row = next(d for d in DEFECTS if d.name == name)
    if torch.__version__ != _MEASURED and not row.present:
        pytest.skip(f"{name}: right in torch {torch.__version__}, wrong in {_MEASURED}")


def _holds(named: bool, wrong: bool) -> bool:
    """On another build what is named may be right, but what is wrong has to be named."""
    return named is wrong or (named and torch.__version__ != _MEASURED)


def _call(
    engine: str, key: str, shape: tuple[int, ...], point: int = 64, isa: Any = None, **options: Any
) -> Call:
    """A convolution with a weight of a shape."""
    grid = QParams(1.0, point, 0, 255, torch.quint8)
    weight = WeightView(torch.ones(shape), QParams(1.0, 0, -128, 127, torch.qint8))
    dims = len(shape) - 2
    given = {"stride": 1, "padding": 0, "dilation": 1} | options
    spread = {
        k: [v] * dims if isinstance(v, int) and k != "groups" else v for k, v in given.items()
    }
    isa = HERE if isa is None else isa_of(isa)
    return Call("n", engine, key, arguments=spread, qparams=(grid,), weight=weight, isa=isa)


def _names(call: Call, shape: tuple[int, ...] | None = None) -> set[str]:
    return {d.name for d in defect_rows(call, shape)}


def _wrong(call: Call, size: tuple[int, ...], seed: int = 0) -> int:
    """Codes of the kernel that are more than one away from float64, run in this process."""
    generator = torch.Generator().manual_seed(seed)
    assert call.weight is not None
    shape, groups = call.weight.codes.shape, call.option("groups", 1)
    transposed, dims = "transpose" in call.key, len(shape) - 2
    channels = shape[0] if transposed else shape[1] * groups
    point = int(call.source.zero_points[0])
    w = torch.randint(-60, 60, shape, generator=generator).float()
    x = torch.randint(0, 128, (2, channels, *size), generator=generator).float() - point
    steps = [call.option(name) for name in ("stride", "padding", "dilation")]
    more = [[0] * dims] if transposed else []
    packing = (*steps[:2], *more, steps[2], groups)
    options: Any = dict(zip(("stride", "padding", "dilation"), steps, strict=True))
    wanted = getattr(F, call.key)(x.double(), w.double(), groups=groups, **options)
    scale = float(wanted.abs().max()) / 100 + 1
    ops: Any = torch.ops.quantized
    wanted, bad = (wanted / scale + 128).clamp(0, 255), 0
    with quantized_engine(call.engine), quiet():
        weight = torch.quantize_per_tensor(w, 1.0, 0, torch.qint8)
        packed = getattr(ops, f"{call.key}_prepack")(weight, None, *packing)
        codes = torch.quantize_per_tensor(x, 1.0, point, torch.quint8)
        for filled in range(0, 256, 30):
            before = [torch.full((wanted.numel(),), filled, dtype=torch.uint8) for _ in range(8)]
            del before  # freed memory is what the kernel gets next
            found = getattr(ops, call.key)(codes, packed, scale, 128).int_repr().double()
            bad = max(bad, int(((found - wanted).abs() > 1.1).sum()))
    return bad


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    ("inputs", "outputs", "groups"),
    [(4, 4, 2), (4, 8, 2), (4, 8, 4), (8, 4, 4), (12, 6, 3), (3, 5, 1), (1, 5, 1), (5, 1, 1)],
)
def test_weights_are_permuted_per_group(inputs: int, outputs: int, groups: int, dims: int) -> None:
    shape = (inputs, outputs // groups, *[3] * dims)
    call = _call("onednn", f"conv_transpose{dims}d", shape, groups=groups)
    assert ("transposed-permutes" in _names(call)) is (_wrong(call, (5,) * dims) > 0)


@pytest.mark.parametrize("point", [0, 64])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((1, 1), (3, 3), (0, 0), 1),
        ((1, 1), (2, 2), (0, 0), 1),
        ((3, 3), (5, 5), (1, 1), 1),
        ((1, 3), (3, 1), (0, 0), 1),
        ((3, 1), (1, 3), (0, 0), 1),  # along the width all is written
        ((2, 2), (6, 6), (0, 0), 2),  # oneDNN's reference runs
        ((1, 1), (3, 3), (1, 1), 1),
    ],
)
def test_rows_are_skipped(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: int,
    point: int,
) -> None:
    options = {"stride": list(stride), "padding": list(padding), "dilation": dilation}
    call = _call("onednn", "conv_transpose2d", (8, 8, *kernel), point, **options)
    assert _holds("transposed-skips-rows" in _names(call), _wrong(call, (9, 9)) > 0)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("shape", "groups", "padding", "dilation"),
    [
        ((8, 8, 2, 2), 1, 0, 1),
        ((16, 8, 2, 1), 1, 0, 1),
        ((8, 24, 2, 6), 1, 0, 1),
        ((8, 8, 2, 7), 1, 0, 1),
        ((8, 8, 3, 3), 1, 0, 1),
        ((8, 4, 2, 2), 1, 0, 1),
        ((16, 8, 2, 2), 2, 0, 1),
        ((8, 8, 2, 2), 1, 1, 1),
        ((8, 8, 2, 2), 1, 0, 2),
    ],
)
def test_small_transposed_kernels(
    shape: tuple[int, ...], groups: int, padding: int, dilation: int, stride: int
) -> None:
    options = {"groups": groups, "padding": padding, "dilation": dilation, "stride": stride}
    call = _call("fbgemm", "conv_transpose2d", shape, **options)
    assert _holds("transposed-2x2" in _names(call), _wrong(call, (6, 6)) > 0)


def _upsampler(channels: tuple[int, int], kernel: tuple[int, int], stride: int) -> Any:
    """A calibrated net with a transposed convolution of fbgemm, and its conversion."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, channels[0], 3, padding=1)
    net = nn.Sequential(first, nn.ConvTranspose2d(*channels, kernel, stride=stride))
    x = torch.rand(2, 3, 8, 8)
    with quantized_engine("fbgemm"), quiet():
        prepared = prepare_fx(net.eval(), get_default_qconfig_mapping("fbgemm"), (x,))
        prepared(x)
        return prepared, convert_fx(copy.deepcopy(prepared)), x


GARBLED = [((8, 8), (2, 2), 2), ((16, 8), (2, 1), 1), ((8, 16), (2, 3), 2)]


@pytest.mark.parametrize(("channels", "kernel", "stride"), GARBLED)
def test_a_weight_that_cant_be_unpacked(
    channels: tuple[int, int], kernel: tuple[int, int], stride: int
) -> None:
    _as_measured("transposed-2x2")
    prepared, converted, x = _upsampler(channels, kernel, stride)
    with pytest.raises(UnsupportedError, match="can't unpack this weight"):
        fxqfix.extract_parameters(converted)
    with pytest.raises(UnsupportedError, match="can't unpack this weight"):
        fxqfix.to_decomposed(converted, ranges_from=prepared)
    with pytest.raises(UnsupportedError, match="transposed-2x2"):
        fxqfix.emulate(converted, engine="fbgemm")
    report = fxqfix.compare(prepared, converted, [x], engine="fbgemm")
    assert report.unexplained == 0
    assert not any(row.problems and "transpose" not in row.op for row in report.rows)
    assert set(report.row("_1.weight").causes) <= {"kernel-defect"}
    assert report.row("_1").causes["kernel-defect"] > 0
    assert report.row("_1").accumulator is not None
    frozen = fxqfix.freeze(prepared)
    with quantized_engine("fbgemm"):
        repaired = fxqfix.to_int8(prepared, engine="fbgemm")
    codes = fxqfix.extract_parameters(repaired)["_1"].weight
    assert torch.equal(torch.as_tensor(codes), fxqfix.extract_parameters(frozen)["_1"].weight)
    assert "kernel-defect" not in fxqfix.compare(frozen, repaired, [x], engine="fbgemm").causes


def test_problems_are_sentences() -> None:
    """Of an op whose kernel is wrong nothing is asked that it can't answer."""
    torch.manual_seed(0)
    x = torch.rand(2, 3, 5, 5)
    with quantized_engine("onednn"), quiet():
        net = nn.Sequential(nn.ConvTranspose2d(3, 5, 3, bias=False)).eval()
        prepared = prepare_fx(net, get_default_qconfig_mapping("fbgemm"), (x,))
        prepared(x)
        converted = convert_fx(copy.deepcopy(prepared))
        report = fxqfix.compare(prepared, converted, [x, 3 * x], engine="onednn")
    assert report.row("_0").causes["kernel-defect"] > 500
    assert not any(row.problems for row in report.rows)


@pytest.mark.parametrize(
    ("channels", "groups", "isa", "struck"),
    [
        (2, 8, "vnni", False),
        (2, 9, "vnni", True),
        (2, 7, "avx512", False),  # fewer than are taken at a time: another kernel
        (2, 5, "avx2", True),
        (4, 6, "vnni", True),
        (4, 12, "vnni", False),
        (4, 3, "vnni", False),
        (4, 3, "avx2", True),
        (4, 6, "avx2", False),
        (8, 5, "vnni", False),
        (16, 3, "avx2", False),
        (3, 5, "vnni", False),
    ],
)
def test_groups_left_over(channels: int, groups: int, isa: str, struck: bool) -> None:
    for dims in (2, 3):
        shape = (channels * groups, channels, *[3] * dims)
        call = _call("fbgemm", f"conv{dims}d", shape, isa=isa, groups=groups, padding=1)
        assert ("groups-left-over" in _names(call)) is struck
        if not struck and isa == HERE.cpu:
            assert _wrong(call, (5,) * dims) == 0
    other = replace(call, arguments={**call.arguments, "dilation": [2] * dims})
    assert not _names(other)


def test_the_level_decides_where_a_row_strikes() -> None:
    """On x86, CPUs with VNNI run onednn's kernel up to 100 groups, the others fbgemm's."""
    call = _call("", "conv2d", (20, 4, 3, 3), groups=5, padding=1)
    found = {d.name: levels for d, levels in met(call, "x86").items()}
    assert found == {"groups-left-over": ("avx2", "avx2_vnni", "avx512")}
    assert len(met(call, "fbgemm")[next(iter(met(call, "x86")))]) == 5
    padded = _call("", "conv2d", (8, 8, 3, 1), padding=[1, 0])
    found = {d.name: levels for d, levels in met(padded, "x86").items()}
    assert found in ({"amx-padded-rows": ("amx",)}, {})


OUTSIDE = {"kernel_size": 2, "stride": 2, "padding": (1, 3), "dilation": 2}


def test_windows_outside_the_image() -> None:
    options = {"stride": 2, "padding": [1, 3], "dilation": 2}
    call = _call("onednn", "conv2d", (16, 16, 2, 2), isa="vnni", **options)
    assert _names(call) == {"windows-outside"}
    assert _names(call, (1, 16, 8, 1)) == {"windows-outside"}
    assert _names(call, (1, 16, 1, 1)) == set()  # all of them, along the height too
    assert _names(call, (1, 16, 8, 8)) == set()
    assert _names(replace(call, isa=isa_of("avx2"))) == set()
    same = _call("onednn", "conv2d", (16, 16, 3, 3), isa="vnni", padding=2, dilation=2)
    assert _names(same) == set()  # a window's middle is always inside


_ONE, _TWO = [1, 1], [2, 2]


@pytest.mark.parametrize(
    ("engine", "shape", "outputs", "kernel", "stride", "padding", "groups", "point"),
    [
        ("fbgemm", [1, 24, 9, 9], 24, [3, 3], _ONE, _ONE, 6, 64),
        ("fbgemm", [1, 18, 9, 9], 18, [3, 3], _TWO, _ONE, 9, 64),
        ("fbgemm", [1, 20, 9, 9], 20, [3, 3], [1, 2], _ONE, 5, 64),  # another kernel
        ("onednn", [1, 16, 8, 1], 16, [1, 1], [1, 3], [0, 2], 1, 64),
        ("onednn", [1, 16, 8, 1], 16, [1, 1], [1, 3], [0, 2], 1, 0),
        ("onednn", [1, 8, 8, 9], 4, [2, 1], [1, 3], [4, 4], 1, 64),
        ("onednn", [1, 16, 21, 3], 16, [3, 3], _TWO, [0, 0], 1, 64),
        ("onednn", [1, 16, 20, 100], 16, [3, 1], _ONE, [1, 0], 1, 64),
    ],
)
def test_kernels_that_a_process_may_die_of(
    engine: str,
    shape: list[int],
    outputs: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    groups: int,
    point: int,
) -> None:
    """Run in a process of their own: wrong where a row says so, right elsewhere."""
    options: Any = {"stride": stride, "padding": padding, "dilation": _ONE, "groups": groups}
    size = (outputs, shape[1] // groups, *kernel)
    call = _call(engine, "conv2d", size, point, **options)
    found = ask(engine=engine, shape=shape, outputs=outputs, kernel=kernel, point=point, **options)
    assert _holds(bool(_names(call, tuple(shape))), found)


class _Padded(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def _converted(net: nn.Module, x: Tensor) -> tuple[nn.Module, nn.Module]:
    with quantized_engine("onednn"), quiet():
        prepared = prepare_fx(net.eval(), get_default_qconfig_mapping("onednn"), (x,))
        prepared(x)
        return prepared, convert_fx(copy.deepcopy(prepared))


def test_sizes_that_the_kernel_gets_wrong_are_refused_at_run_time() -> None:
    _as_measured("windows-outside")
    wide, thin = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 1)
    prepared, converted = _converted(_Padded(**OUTSIDE), wide)
    with quantized_engine("onednn"):
        emulated = fxqfix.emulate(converted, engine="onednn")
        assert torch.equal(emulated(wide), converted(wide))
        there = fxqfix.emulate(converted, engine="onednn", isa="vnni")
        with pytest.raises(UnsupportedError, match=r"windows-outside.*1x4x8x1"):
            copy.deepcopy(there)(thin)
        fxqfix.emulate(converted, engine="onednn", isa="avx2")(thin)
        kept = fxqfix.to_int8(prepared, engine="onednn")
    routed = {r.reason for r in fxqfix.certificate_of(kept).routed}
    assert routed == {"windows-outside"}
    assert kept(thin).shape == emulated(wide)[..., :1].shape[:2] + kept(thin).shape[2:]


AMX = {
    "amx-narrow": (
        ("conv2d", (16, 16, 3, 3), {"stride": 2}),
        {(1, 16, 21, 3): True, (1, 16, 3, 3): False, (1, 16, 21, 21): False},
    ),
    "amx-padded-rows": (("conv2d", (16, 16, 3, 1), {"padding": [1, 0]}), {(1, 16, 20, 100): True}),
    "amx-one-plane": (
        ("conv3d", (4, 3, 3, 7, 7), {"padding": [1, 3, 3]}),
        {(1, 3, 1, 28, 28): True, (1, 3, 4, 28, 28): False},
    ),
    "amx-four-channels": (
        ("conv2d", (16, 4, 7, 7), {"stride": 2, "padding": [1, 0]}),
        {(1, 4, 7, 600): True},
    ),
}


@pytest.mark.parametrize("name", AMX)
def test_rows_of_amx(name: str) -> None:
    (key, shape, options), sizes = AMX[name]
    call = _call("onednn", key, shape, isa="amx", **options)
    assert name in _names(call)
    assert {size: name in _names(call, size) for size in sizes} == sizes
    for isa in ("avx2", "avx2_vnni", "avx512", "vnni"):
        assert not _names(replace(call, isa=isa_of(isa)))
    point = _call("onednn", key, shape, point=0, isa="amx", **options)
    assert (name in _names(point)) is (name in ("amx-narrow", "amx-one-plane"))
    depthwise = _call("onednn", key, (shape[1], 1, *shape[2:]), isa="amx", groups=shape[1])
    assert not _names(depthwise)


def test_amx_is_emulated_but_for_what_it_gets_wrong() -> None:
    narrow, square = torch.randn(1, 4, 9, 3), torch.randn(1, 4, 9, 9)
    prepared, converted = _converted(_Padded(kernel_size=3, stride=2), square)
    if HERE.onednn != "amx":  # what this process can't ask counts as wrong
        emulated = fxqfix.emulate(converted, engine="onednn", isa="amx")
        with pytest.raises(UnsupportedError, match="amx-narrow"):
            emulated(narrow)
    with quantized_engine("onednn"):
        found = fxqfix.certificate_of(fxqfix.to_int8(prepared, engine="onednn"))
    assert found.ok
    assert not found.unchecked
    assert [said.split(":")[0] for _, said in found.unless] == ["amx-narrow (at amx)"]
    assert "holds unless" in str(found)


class _Shared(nn.Module):
    """One packed weight, with and without relu."""

    def __init__(self, packed: Any, scale: float = 0.5) -> None:
        super().__init__()
        self.packed, self.scale = packed, scale

    def forward(self, x: Tensor) -> Tensor:
        q = torch.quantize_per_tensor(x, 0.1, 3, torch.quint8)
        a = torch.ops.quantized.linear(q, self.packed, 0.5, 128)
        b = torch.ops.quantized.linear_relu(q, self.packed, self.scale, 128)
        return a.dequantize() + b.dequantize()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # torch's own copy
def test_one_packed_weight_with_and_without_relu() -> None:
    weight = torch.quantize_per_tensor(torch.randn(8, 8), 0.1, 0, torch.qint8)
    x = torch.randn(4, 8)
    with quantized_engine("onednn"):
        packed = torch.ops.quantized.linear_prepack(weight, None)
        with pytest.raises(UnsupportedError, match="first-activation-stays"):
            fxqfix.emulate(_Shared(packed), engine="onednn")
        other = _Shared(torch.ops.quantized.linear_prepack(weight, None), scale=0.25)
        assert torch.equal(fxqfix.emulate(other, engine="onednn")(x), other(x))
    with quantized_engine("fbgemm"):
        third = _Shared(torch.ops.quantized.linear_prepack(weight, None))
        assert torch.equal(fxqfix.emulate(third, engine="fbgemm")(x), third(x))


@pytest.mark.parametrize("plain", ["conv2d", "conv2d_add"])
def test_the_first_activation_stays_with_a_packed_weight(plain: str) -> None:
    generator = torch.Generator().manual_seed(0)
    ops: Any = torch.ops.quantized
    w, x = (torch.randn(8, 8, 5, 5, generator=generator).clamp(-3, 3) for _ in range(2))
    weight = torch.quantize_per_tensor(w[..., :3, :3], 1 / 16, 0, torch.qint8)
    codes = torch.quantize_per_tensor(x, 1 / 16, 64, torch.quint8)
    codes = codes.contiguous(memory_format=torch.channels_last)

    def run(name: str, packed: Any, scale: float = 1.0) -> Tensor:
        more = [codes.clone(memory_format=torch.channels_last)] if "add" in name else []
        return getattr(ops, name)(codes, *more, packed, scale, 128).int_repr()

    with quantized_engine("onednn"), quiet():
        first, second, third = (
            ops.conv2d_prepack(weight, None, [1, 1], [1, 1], [1, 1], 1) for _ in range(3)
        )
        wanted = run(f"{plain}_relu", first)
        run(plain, second)
        assert not torch.equal(run(f"{plain}_relu", second), wanted)
        run(plain, third, 0.5)  # on another grid
        assert torch.equal(run(f"{plain}_relu", third), wanted)

"""oneDNN's layers on near ties, at the level that this process has: the rows against the kernels.

With an output scale of an even multiple of ``xs * ws`` a sum in some hundreds lies as near to a tie
as float32 can tell: how scales are joined, and whether a product is divided, decides the code.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_fx

import fxqfix
from fxqfix._torch import quantized_engine, quiet
from fxqfix.engines import Call, isa_of
from fxqfix.engines._geometry import Geometry, Job
from fxqfix.engines._releases import release
from fxqfix.engines.onednn import row_for
from fxqfix.errors import UnsupportedError
from fxqfix.qparams import QParams
from tests.builds import elsewhere
from tests.engines.harness import differing, values
from tests.engines.test_weighted import Layer, skip_without

of_ci = pytest.mark.skipif(
    elsewhere(), reason="rows of oneDNN 3.12; test_releases.py has what other releases change"
)

# (inputs, outputs, groups)
PLAIN = [(3, 8, 1), (17, 5, 1), (64, 64, 1), (12, 12, 12), (8, 16, 8), (16, 16, 4), (10, 15, 5)]
PLAIN += [(32, 64, 2), (1, 16, 1), (24, 48, 3)]
MIRRORED = [(8, 8, 1), (16, 16, 16), (5, 5, 1), (16, 16, 4), (1, 9, 1), (20, 20, 1), (52, 52, 1)]
MIRRORED += [(20, 20, 2), (32, 32, 2), (48, 48, 3)]
OPS = ["linear", *(f"conv{kind}{dims}d" for kind in ("", "_transpose") for dims in (1, 2, 3))]


def near_ties(op: str, seed: int, dtype: torch.dtype = torch.quint8) -> tuple[nn.Module, Tensor]:
    """A layer and its input, every option drawn at random."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dims, transposed = (0 if op == "linear" else int(op[-2])), "transpose" in op
    inputs, outputs, groups = rng.choice(MIRRORED if transposed else PLAIN)
    kernel = [rng.choice([1, 2, 3, 3, 5]) for _ in range(dims)]
    stride = [rng.choice([1, 1, 2, 3]) for _ in range(dims)]
    dilation = [rng.choice([1, 1, 2]) for _ in range(dims)]
    if rng.random() < 0.5:
        stride, dilation = [1] * dims, [1] * dims
    padding = [rng.choice([0, k // 2]) for k in kernel]
    shape = [outputs, inputs // groups, *kernel] if dims else [outputs, inputs]
    shape = [inputs, outputs // groups, *kernel] if transposed else shape
    codes = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
    xs, ws = rng.uniform(0.01, 0.1), rng.uniform(1e-3, 1e-2)
    per_channel = not transposed and rng.random() < 0.5
    if per_channel:
        scales = torch.tensor([ws * 2.0 ** rng.randint(0, 2) for _ in range(outputs)]).double()
        points = torch.zeros(outputs, dtype=torch.long)
        weight = torch._make_per_channel_quantized_tensor(codes, scales, points, 0)
    else:
        weight = torch._make_per_tensor_quantized_tensor(codes, ws, 0)
    bias = torch.randint(-99, 99, (outputs,), generator=generator) * (xs * ws)
    last = [padding, *([[0] * dims] if transposed else []), dilation, groups]
    options = [stride, *last] if dims else []
    with quantized_engine("onednn"):
        prepack = getattr(torch.ops.quantized, f"{op}_prepack")
        packed = prepack(weight, bias if rng.random() < 0.5 else None, *options)
    low = 0 if dtype == torch.quint8 else -128
    high = rng.choice([low + 255, 127])
    grid = QParams(xs, rng.choice([0, 3, 64]) + low, low, low + 255, dtype)
    taps = codes.numel() / shape[1 if transposed else 0]
    scale = xs * ws * max(2, 2 * round((high - low) ** 0.5 * taps**0.5))
    size = [rng.choice([4, 7, 9, 22]) for _ in range(dims)]
    where = (rng.choice([1, 7, 300]), inputs) if not dims else (rng.choice([1, 4]), inputs, *size)
    x = values(torch.randint(low, high + 1, where, generator=generator), xs, grid.zero_point, dtype)
    relu = "_relu" if not transposed and rng.random() < 0.3 else ""
    return Layer(op + relu, packed, grid, scale, rng.choice([0, 101])), x


def _sweep(op: str, count: int, dtype: torch.dtype = torch.quint8) -> tuple[int, int, Counter[str]]:
    """Codes that differ, codes compared, and what is refused, by kind."""
    bad = total = 0
    refused = Counter[str]()
    for seed in range(count):
        model, x = near_ties(op, seed, dtype)
        try:
            found = differing(model, x, engine="onednn")
        except UnsupportedError as error:
            known = ("kernel is wrong", "no row predicts", "no row says")
            refused[next(k for k in known if k in str(error))] += 1
            continue
        except RuntimeError as error:  # a window beyond the image
            assert "size" in str(error).lower(), error  # noqa: PT017
            continue
        bad, total = bad + found[0], total + found[1]
    return bad, total, refused


@pytest.mark.parametrize("op", OPS)
def test_rows_are_the_kernels_on_near_ties(op: str) -> None:
    skip_without("onednn")
    bad, total, refused = _sweep(op, 60)
    assert bad == 0, f"{bad} of {total}"
    assert total > 10_000
    most = {"avx512": 30, "amx": 50}.get(isa_of(None).onednn, 5)
    most = 30 if release() == "3.13" else most  # it has one kernel more
    assert refused["no row predicts"] + refused["no row says"] <= most


def test_rows_are_the_kernels_of_qint8() -> None:
    skip_without("onednn")
    if release() == "3.5":
        pytest.skip(f"onednn's linear takes no qint8 in torch {torch.__version__}")
    assert _sweep("linear", 20, torch.qint8)[0] == 0


class Sum(nn.Module):
    """A convolution that adds: a 1 of a weight, and ties of the other input's scale."""

    def __init__(self, packed: Any, other: float, scale: float) -> None:
        super().__init__()
        self.packed, self.other, self.scale = packed, other, scale

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a = torch.quantize_per_tensor(x, 0.25, 0, torch.quint8)
        b = torch.quantize_per_tensor(y, self.other, 3, torch.quint8)
        return torch.ops.quantized.conv2d_add(a, b, self.packed, self.scale, 3)


@pytest.mark.parametrize("seed", range(12))
def test_what_a_convolution_adds_is_rounded_to_single_first(seed: int) -> None:
    skip_without("onednn")
    other = random.Random(seed).uniform(1e-3, 1e-1)
    weight = torch._make_per_tensor_quantized_tensor(torch.zeros(8, 8, 1, 1).char(), 0.5, 0)
    with quantized_engine("onednn"):
        packed = torch.ops.quantized.conv2d_prepack(weight, None, [1, 1], [0, 0], [1, 1], 1)
    codes = torch.arange(8 * 16 * 16).reshape(1, 8, 16, 16) % 256
    model, y = Sum(packed, other, 2 * other), values(codes, other, 3)
    assert differing(model, torch.zeros(1, 8, 16, 16), y, engine="onednn")[0] == 0


# ------------------------------------------------------------- AMX, by its rules alone


def _amx(
    shape: Geometry, batch: int = 1, *size: int, signed: bool = False, threads: int = 1
) -> str:
    grid = QParams(1.0, 0, -128 if signed else 0, 127 if signed else 255, torch.qint8)
    call = Call("n", "onednn", shape.kind, qparams=(grid,), isa=isa_of("amx"), threads=threads)
    row = row_for(call, Job(shape, signed, threads, batch, size))
    return f"{row.scales}, tiles" if row.tiles else row.scales


@of_ci
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "signed", "scales"),
    [
        (64, 64, 64, False, "joined, tiles"),
        (1, 256, 1000, False, "separate"),
        (2, 256, 1000, False, "joined, tiles"),
        (32, 64, 8, False, "separate"),
        (33, 64, 8, False, "joined, tiles"),
        (32, 64, 9, False, "joined, tiles"),
        (64, 16, 64, False, "separate"),
        (64, 17, 64, False, "joined, tiles"),
        (64, 16, 64, True, "reference"),
        (64, 64, 64, True, "joined, tiles"),
    ],
)
def test_linear_on_amx(rows: int, inputs: int, outputs: int, signed: bool, scales: str) -> None:
    assert _amx(Geometry("linear", inputs, outputs), rows, signed=signed) == scales


def _conv(inputs: int, outputs: int, kernel: int = 3, **more: Any) -> Geometry:
    axes = {"kernel": kernel, "stride": 1, "padding": kernel // 2, "dilation": 1}
    axes |= {name: more.pop(name) for name in tuple(more) if name in axes}
    kind = more.pop("kind", "conv")
    return Geometry(kind, inputs, outputs, **more, **{k: (v, v) for k, v in axes.items()})


@of_ci
@pytest.mark.parametrize(
    ("shape", "batch", "size", "threads", "scales"),
    [
        (_conv(64, 64), 1, 56, 1, "joined, tiles"),
        (_conv(1, 1, groups=32), 1, 56, 1, "separate"),
        (_conv(64, 64, 3), 1, 2, 1, "separate"),
        (_conv(512, 512, 3), 1, 2, 1, "joined, tiles"),
        (_conv(64, 64, 1), 1, 2, 1, "separate"),
        (_conv(256, 128, 1), 1, 2, 1, "joined, tiles"),
        (_conv(66, 64, 1), 1, 14, 1, "separate"),
        (_conv(66, 64, 1, stride=2), 1, 14, 1, "separate"),
        (_conv(62, 64, 1, stride=2), 1, 14, 1, "joined, tiles"),
        (_conv(64, 64, 1), 1, 56, 1, "joined, tiles"),
        (_conv(64, 64, 1), 1, 56, 2, "separate"),
        (_conv(64, 512, 1), 1, 56, 2, "joined, tiles"),
        (_conv(64, 64, 1), 2, 56, 2, "joined, tiles"),
        (_conv(32, 32), 1, 256, 1, "separate"),
        (_conv(32, 32), 1, 255, 1, "joined, tiles"),
        (_conv(3, 32), 1, 256, 1, "joined, tiles"),
        (_conv(32, 32, padding=0), 1, 300, 1, "joined, tiles"),
        (_conv(32, 32, 1, padding=1), 1, 14, 1, "separate"),
        (_conv(64, 64, kind="transposed"), 1, 14, 1, "joined, tiles"),
        (_conv(64, 64, kind="transposed", stride=2), 1, 14, 1, "separate"),
        (_conv(3, 32, kind="transposed"), 1, 256, 1, "separate"),
    ],
)
def test_convolutions_on_amx(
    shape: Geometry, batch: int, size: int, threads: int, scales: str
) -> None:
    assert _amx(shape, batch, size, size, threads=threads) == scales


@of_ci
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        (_conv(64, 64), (1, 56)),
        (_conv(64, 64), (3, 3)),
        (replace(_conv(8, 8), kernel=(3,), stride=(1,), padding=(1,), dilation=(1,)), (56,)),
        (_conv(8, 8, kind="transposed", stride=2, dilation=2), (9, 9)),
    ],
)
def test_what_no_row_predicts_on_amx_is_refused(shape: Geometry, size: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedError, match=r"no row predicts the kernel .* at level 'amx'"):
        _amx(shape, 1, *size)


def test_tiles_take_the_zero_point_off_in_floats() -> None:
    """Sums beyond 2^24 are rounded apart; those below are what they are."""
    from fxqfix.engines._accumulate import Accumulator

    grid = QParams(1.0, 77, 0, 255, torch.quint8)
    weight = torch.randint(0, 128, (4, 2000), dtype=torch.int32)
    accumulate = Accumulator(nn.functional.linear, weight, grid, input_axis=-1)
    codes = torch.randint(0, 256, (9, 2000), dtype=torch.uint8)
    raw, inside = codes.long() @ weight.long().T, weight.sum(1)
    assert accumulate.rounds_in_tiles
    assert torch.equal(accumulate.in_tiles(codes), raw.float() - inside.float() * 77.0)
    assert not Accumulator(nn.functional.linear, weight[:, :300], grid).rounds_in_tiles


@of_ci
def test_compare_says_which_kernel_no_row_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On AMX a line is refused when it comes, by its size: its site is not judged."""
    skip_without("onednn")
    torch.manual_seed(0)
    x = torch.randn(2, 4, 1, 40)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU()).eval()
    with quantized_engine("onednn"), quiet(), torch.no_grad():
        prepared = prepare_fx(net, get_default_qconfig_mapping("onednn"), (x,))
        prepared(x)
        monkeypatch.setattr("fxqfix.engines.isa._native", lambda: isa_of("amx"))
        report = fxqfix.compare(prepared, None, [2 * x], engine="onednn", noise_floor=False)
    assert report.isa == "amx"
    said = [text for row in report.rows for text in row.problems]
    assert any("no row predicts the kernel of oneDNN" in text for text in said)
    assert report.verdict != "ok"

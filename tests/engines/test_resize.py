"""interpolate and pad against the kernels: factors and sizes, vectors and what is behind them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxqfix.errors import UnsupportedError
from tests.engines.harness import differing
from tests.engines.test_activations import Unary
from tests.engines.test_elementwise import DTYPES, Grid, given

GRIDS: tuple[Grid, ...] = ((0.1, 37), (1 / 16, 0), (0.02, 255))
FACTORS: tuple[dict[str, Any], ...] = (
    {"scale_factor": 2},
    {"scale_factor": 0.5},
    {"scale_factor": 1.7},
    {"scale_factor": (0.7, 3.3)},
    {"scale_factor": 1.7, "recompute_scale_factor": True},
    {"size": (31, 37)},
    {"size": (40, 1)},
    {"size": (17, 19)},
)
SHAPES = (
    ((2, 13, 17, 19), False),
    ((2, 13, 17, 19), True),
    ((2, 16, 16, 12), True),
    ((2, 1, 9, 11), True),
    ((2, 7, 1, 1), False),
)


def counted(
    op: Any, engine: str, dtype: torch.dtype, shapes: Any = SHAPES, grids: Any = GRIDS
) -> tuple[int, int]:
    bad = total = 0
    for seed, grid in enumerate(grids):
        model = Unary(op, grid, (), dtype)
        for shape, last in shapes:
            found = differing(model, given(shape, grid, last, seed, dtype), engine=engine)
            bad, total = bad + found[0], total + found[1]
    return bad, total


@DTYPES
@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
@pytest.mark.parametrize("align", [False, True])
def test_bilinear(align: bool, engine: str, dtype: torch.dtype) -> None:
    bad = total = 0
    for options in FACTORS:
        if align and "recompute_scale_factor" in options:
            continue

        def op(q: Tensor, options: Any = options) -> Tensor:
            return F.interpolate(q, mode="bilinear", align_corners=align, **options)

        shapes = [(s, last) for s, last in SHAPES if s[2] > 1 or "size" in options]
        found = counted(op, engine, dtype, [s for s in shapes for _ in (0, 1)])
        bad, total = bad + found[0], total + found[1]
    assert bad == 0
    assert total > 1_000_000


@DTYPES
@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_nearest(mode: str, engine: str, dtype: torch.dtype) -> None:
    bad = total = 0
    for options in FACTORS:

        def op(q: Tensor, options: Any = options) -> Tensor:
            return F.interpolate(q, mode=mode, **options)

        shapes = [(s, last) for s, last in SHAPES if s[2] > 1 or "size" in options]
        found = counted(op, engine, dtype, [s for s in shapes for _ in (0, 1)])
        bad, total = bad + found[0], total + found[1]

    def volume(q: Tensor) -> Tensor:
        return F.interpolate(q, size=(13, 7, 21), mode=mode)

    volumes = [((2, 3, 9, 10, 11), False), ((2, 3, 1, 1, 1), False)]
    found = counted(volume, engine, dtype, volumes)
    assert bad + found[0] == 0
    assert total + found[1] > 1_000_000


def test_channels_of_one_pixel_are_mixed_up() -> None:
    """The kernels' own defect: a constant image of each channel is what interpolation should be."""
    codes = torch.arange(6, dtype=torch.uint8).reshape(1, 6, 1, 1)
    q = torch._make_per_tensor_quantized_tensor(codes, 0.1, 0)
    wanted = F.interpolate(q, size=(2, 2)).int_repr()
    assert wanted.flatten().tolist() == list(range(6)) * 4
    right = F.interpolate(codes.float(), size=(2, 2)).to(torch.uint8)
    assert not torch.equal(wanted, right)


class Sized(nn.Module):
    """A size that the model computes."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = torch.quantize_per_tensor(x, 0.05, 100, torch.quint8)
        return F.interpolate(q, size=(y.shape[2], 9), mode="bilinear")


def test_spellings() -> None:
    x = torch.randn(2, 9, 8, 6)
    assert differing(Sized(), x, torch.zeros(1, 1, 13, 2), engine="fbgemm") == (0, 2106)
    modules = (nn.UpsamplingBilinear2d(scale_factor=3), nn.UpsamplingNearest2d((5, 6)))
    functions: tuple[Any, ...] = (
        nn.Upsample(scale_factor=2, mode="bilinear"),
        *modules,
        lambda q: F.upsample(q, 11),
        lambda q: F.upsample_nearest(q, scale_factor=2),
        lambda q: F.upsample_bilinear(q, (11, 3)),
    )
    for op in functions:
        bad, total = differing(Unary(op, GRIDS[0], ()), x, engine="fbgemm")
        assert bad == 0
        assert total > 500


def test_refused_modes() -> None:
    area = Unary(lambda q: F.interpolate(q, 3, mode="bicubic"), GRIDS[0], ())
    with pytest.raises(UnsupportedError, match="no exact arithmetic for mode 'bicubic'"):
        differing(area, torch.randn(1, 3, 8, 8), engine="fbgemm")
    pad = Unary(lambda q: F.pad(q, (1, 1), mode="replicate"), GRIDS[0], ())
    with pytest.raises(UnsupportedError, match="no mode 'replicate'"):
        differing(pad, torch.randn(1, 3, 8), engine="fbgemm")


PADS: dict[str, Any] = {
    "zero": lambda q: F.pad(q, (1, 2, 0, 3)),
    "constant": lambda q: F.pad(q, (1, 2, 0, 3), value=0.35),
    "below the range": lambda q: F.pad(q, (1, 2), value=-1e3),
    "cut": lambda q: F.pad(q, (1, -2), value=1.0),
    "all axes": lambda q: F.pad(q, (1, 1, 2, 2, 0, 3, 1, 0), value=0.28125),
    "reflect": lambda q: F.pad(q, (1, 2, 3, 0), mode="reflect"),
    "module": nn.ZeroPad2d(2),
    "constant module": nn.ConstantPad2d((1, 2, 3, 4), 0.6),
    "reflection module": nn.ReflectionPad2d(3),
}


@DTYPES
@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
@pytest.mark.parametrize("name", PADS)
def test_pad(name: str, engine: str, dtype: torch.dtype) -> None:
    shapes = [((5, 13, 57, 39), False), ((5, 13, 57, 39), True), ((3, 1, 9, 8), True)]
    bad, total = counted(PADS[name], engine, dtype, shapes, (*GRIDS, (1 / 16, 3)))
    assert bad == 0
    assert total > 1_000_000

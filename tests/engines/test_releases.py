"""Releases of oneDNN: told by their kernels, and what each does otherwise than the rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fxqfix.dialects.weights import WeightView
from fxqfix.engines import Call
from fxqfix.engines._geometry import Job, geometry
from fxqfix.engines._releases import release
from fxqfix.engines.onednn import row_for
from fxqfix.errors import UnsupportedError
from fxqfix.qparams import QParams

MEASURED = {"2.6": "3.5", "2.11": "3.10", "2.13": "3.12", "2.15": "3.13"}


def _row(of: str, key: str, shape: tuple[int, ...], point: int = 0, **options: object) -> str:
    """How the kernel of a release scales its sums."""
    grid = QParams(0.5, point, 0, 255, torch.quint8)
    weight = WeightView(
        torch.ones(shape, dtype=torch.int8), QParams(0.5, 0, -128, 127, torch.qint8)
    )
    call = Call("n", "onednn", key, arguments=options, qparams=(grid,), weight=weight, release=of)
    size = (19, 22) if len(shape) > 2 else ()
    return row_for(call, Job(geometry(call), False, 1, 4, size)).scales


def test_this_builds_kernels_tell_their_release() -> None:
    known = MEASURED.get(".".join(torch.__version__.split(".")[:2]))
    if known is None or "onednn" not in torch.backends.quantized.supported_engines:
        pytest.skip(f"nobody has measured torch {torch.__version__}: taken for {release()}")
    # AVX2's kernels join the scales in any release, so that some are taken for another.
    assert release() == known or torch.backends.cpu.get_cpu_capability() == "AVX2"


@pytest.mark.parametrize(
    ("of", "plain", "pointed", "convolution", "transposed", "product"),
    [
        ("3.5", "joined", "joined", "joined", "joined", "joined"),
        ("3.10", "separate", "separate", "separate", "joined", "joined"),
        ("3.12", "separate", "separate", "separate", "separate", "reference"),
        ("3.13", "separate", "reference", "separate", "separate", "reference"),
    ],
)
def test_how_each_release_scales_sums(
    of: str, plain: str, pointed: str, convolution: str, transposed: str, product: str
) -> None:
    """Read off the kernels of torch 2.6.0, 2.11.0, 2.13.0 and 2.15.0 at level "vnni"."""
    steps = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
    assert _row(of, "linear", (16, 16)) == plain
    assert _row(of, "linear", (16, 16), 3) == pointed
    assert _row(of, "conv2d", (8, 8, 3, 3), **steps) == convolution
    depthwise = {**steps, "groups": 16}
    assert _row(of, "conv_transpose2d", (16, 1, 3, 3), **depthwise) == transposed
    outside = {**steps, "padding": [1, 1]}
    assert _row(of, "conv_transpose2d", (8, 8, 3, 1), **outside) == product


def test_a_kernel_more_is_refused_by_release_and_torch() -> None:
    steps = {"stride": [2, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
    with pytest.raises(UnsupportedError, match=rf"oneDNN 3\.13 \(torch {torch.__version__[:4]}"):
        _row("3.13", "conv_transpose2d", (5, 5, 3, 1), **steps)


def test_a_call_keeps_its_release() -> None:
    assert Call("n", "onednn", "linear").release == release()
    assert replace(Call("n", "onednn", "linear"), release="3.5").release == "3.5"

"""The ways to exact sums: proved once where they run, and left where the proof fails."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxqfix._torch import set_flag
from fxqfix.engines import _paths
from tests.pretend import DEVICE, PretendedCuda

REACH = (-64, 191)

# The function, the shapes of input and weight.
CASES: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {
    "linear": (F.linear, (5, 7, 33), (19, 33)),
    "conv1d": (functools.partial(F.conv1d, stride=[2], padding=[1]), (3, 4, 17), (6, 4, 3)),
    "conv2d": (functools.partial(F.conv2d, padding=[1, 1]), (2, 8, 40, 40), (16, 8, 3, 3)),
    "strided, dilated": (
        functools.partial(F.conv2d, stride=(2, 1), padding=(2, 0), dilation=(1, 2)),
        (3, 4, 19, 23),
        (6, 4, 3, 2),
    ),
    "groups": (functools.partial(F.conv2d, groups=4, padding=0), (2, 8, 9, 9), (12, 2, 3, 3)),
    "depthwise": (functools.partial(F.conv2d, groups=8, padding=1), (2, 8, 9, 9), (8, 1, 3, 3)),
    "conv3d": (functools.partial(F.conv3d, padding=[1, 0, 1]), (2, 3, 5, 6, 7), (4, 3, 3, 2, 3)),
}


@pytest.fixture(autouse=True)
def on_the_pretended_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_paths, "_FAST", {torch.device(DEVICE).type})
    monkeypatch.setattr(_paths, "_PROVEN", {})
    with PretendedCuda(), torch.no_grad():
        yield


def _given(case: str) -> tuple[Any, Tensor, Tensor]:
    function, shape, size = CASES[case]
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(REACH[0], REACH[1] + 1, shape, generator=generator).float()
    weight = torch.randint(-127, 128, size, generator=generator).float()
    return function, x, weight


@pytest.mark.parametrize("case", CASES)
def test_a_right_way_is_proved_once_and_taken(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, x, weight = _given(case)
    taken: list[tuple[int, ...]] = []
    fast = _paths._fast

    def counted(f: Any, a: Tensor, w: Tensor) -> Tensor:
        taken.append(tuple(a.shape))
        return fast(f, a, w)

    monkeypatch.setattr(_paths, "_fast", counted)
    there = x.to(DEVICE), weight.to(DEVICE)
    for _ in range(3):
        found = _paths.sums_of(function, *there, REACH)
        assert torch.equal(found.cpu().double(), function(x.double(), weight.double()))
    assert len(taken) == 4  # a proof, and three forwards
    assert list(_paths._PROVEN.values()) == [True]
    _paths.sums_of(function, there[0][:1], there[1], REACH)
    set_flag(torch.backends.cudnn, "benchmark", True)
    try:
        _paths.sums_of(function, *there, REACH)
    finally:
        set_flag(torch.backends.cudnn, "benchmark", False)
    assert len(_paths._PROVEN) == 3  # another shape, and another switch


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", [1.0, 0.01])
def test_a_wrong_way_is_not_taken(case: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One output in a hundred, off by one, is seen by a sample of thousands."""
    function, x, weight = _given(case)
    fast = _paths._fast

    def wrong(f: Any, a: Tensor, w: Tensor) -> Tensor:
        found = fast(f, a, w)
        every = max(1, round(1 / share))
        flat = torch.arange(found.numel()).reshape(found.shape) % every == every - 1
        return found + flat.to(DEVICE)

    monkeypatch.setattr(_paths, "_fast", wrong)
    found = _paths.sums_of(function, x.to(DEVICE), weight.to(DEVICE), REACH)
    assert list(_paths._PROVEN.values()) == [False]
    assert torch.equal(found.cpu().double(), function(x.double(), weight.double()))


def test_the_sample_is_as_large_as_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    function, x, weight = _given("conv2d")
    seen: list[Tensor] = []
    wanted = _paths._wanted

    def kept(*args: Any) -> Tensor:
        seen.append(wanted(*args))
        return seen[-1]

    monkeypatch.setattr(_paths, "_wanted", kept)
    _paths.sums_of(function, x.to(DEVICE), weight.to(DEVICE), REACH)
    assert seen[0].numel() >= _paths.SAMPLED
    assert seen[0].dtype == torch.int64
    assert seen[0].abs().max() > 2**15  # extreme codes


@pytest.mark.parametrize("reason", ["transposed", "padded by a mode", "float64", "wide codes"])
def test_what_has_no_proof_runs_as_before(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, x, weight = _given("conv2d")
    reach = REACH
    if reason == "transposed":
        function, weight = functools.partial(F.conv_transpose2d, stride=2), weight.transpose(0, 1)
    elif reason == "padded by a mode":
        function = functools.partial(_reflected, functools.partial(F.conv2d))
    elif reason == "float64":
        x, weight = x.double(), weight.double()
    else:
        reach = (-(2**15), 2**15)
    monkeypatch.setattr(_paths, "_fast", None)
    found = _paths.sums_of(function, x.to(DEVICE), weight.to(DEVICE), reach)
    assert not _paths._PROVEN
    assert torch.equal(found.cpu().double(), function(x.double(), weight.double()))


def _reflected(function: Any, x: Tensor, weight: Tensor) -> Tensor:
    return function(F.pad(x, (1, 1, 1, 1), mode="reflect"), weight)

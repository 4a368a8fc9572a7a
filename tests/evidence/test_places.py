"""Causes see the same at single places as everywhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

import fxqfix
from fxqfix._regrid import regrid
from fxqfix.evidence import places as module
from fxqfix.evidence.places import Places
from fxqfix.evidence.recompute import Recompute
from fxqfix.qparams import QParams, quantize
from tests.faults.injectors import INJECTORS

SHAPES = [(2, 3, 4, 5), (2, 3, 1, 1), (7, 3), (3, 5, 2)]
CHANNELS = QParams((0.1, 0.25, 0.5), (0, 3, -2), -128, 127, torch.qint8, 1)
OTHER = QParams((0.1, 0.2, 0.75), (0, 3, 5), -128, 127, torch.qint8, 1)


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**16), share=st.floats(0, 1))
def test_grids_per_channel_are_those_of_the_whole_tensor(
    shape: tuple[int, ...], seed: int, share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    at = (torch.rand(shape, generator=generator) < share).flatten().nonzero().squeeze(1)
    channels = shape[1]
    grids = [
        QParams(g.scales[:channels], g.zero_points[:channels], -128, 127, torch.qint8, 1)
        if channels == 3
        else QParams((0.5,) * channels, tuple(range(channels)), -128, 127, torch.qint8, 1)
        for g in (CHANNELS, OTHER)
    ]
    values = 20 * torch.randn(shape, generator=generator)
    codes = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    for places in (
        Places(torch.Size(shape), values.device, at),
        Places(torch.Size(shape), at.device),
    ):
        whole = quantize(values, grids[0])
        assert torch.equal(places.quantize(places.take(values), grids[0]), places.take(whole))
        wanted = places.take(regrid(codes, *grids))
        assert torch.equal(places.regrid(places.take(codes), *grids), wanted)


@pytest.mark.parametrize("cause", sorted(INJECTORS))
def test_shares_are_those_of_all_places(cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers and causes don't depend on how many places are looked at beside those that differ.

    The sample is as small as a test can have it: a site has some hundred codes.
    """
    fault = INJECTORS[cause]()
    given = fault.prepared, fault.converted, fault.batches
    whole = fxqfix.compare(*given, engine=fault.engine)
    monkeypatch.setattr(module, "SAMPLE", 64)
    part = fxqfix.compare(*given, engine=fault.engine)
    for row, mine in zip(whole.rows, part.rows, strict=True):
        assert dict(mine.causes) == dict(row.causes)
        assert (mine.local, mine.cumulative) == (row.local, row.cumulative)


@pytest.mark.parametrize("relu", [False, True])
def test_convolutions_are_not_computed_as_a_whole(relu: bool, monkeypatch: Any) -> None:
    """A fused relu is no reason to: float64 is for the places that differ."""
    torch.manual_seed(0)
    x = torch.rand(4, 3, 16, 16)
    layers: list[nn.Module] = [
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        *([nn.ReLU()] if relu else []),
    ]
    mapping = get_default_qat_qconfig_mapping("fbgemm")
    prepared = prepare_qat_fx(nn.Sequential(*layers).train(), mapping, (x,))
    prepared(x)
    prepared.eval()
    converted, whole = convert_fx(copy.deepcopy(prepared)), Recompute.exact
    computed = list[str]()

    def exact(self: Recompute, *args: Any, **options: Any) -> torch.Tensor:
        computed.append(self.end.name)
        return whole(self, *args, **options)

    monkeypatch.setattr(Recompute, "exact", exact)
    report = fxqfix.compare(prepared, converted, [3 * x], engine="fbgemm")
    assert report.causes
    assert computed == []

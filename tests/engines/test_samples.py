"""The op table's own models, emulated: what a converted model gives is what its emulation gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fxqfix
from fxqfix.errors import UnsupportedError
from fxqfix.flows.convert import quantized_engine
from tests.engines.harness import native_isa
from tests.op_flows import batches, convert, prepare
from tests.op_samples import SAMPLES, Sample

# (sample, engine or "" for all) -> why it is refused. A sample that is emulated all the same fails.
REFUSED: dict[tuple[str, str], str] = {}


def _cases() -> Iterator[Any]:
    for sample in SAMPLES:
        setting = next((s for s in sample.settings if s == "fx-qat"), sample.settings[0])
        if "convert" in str(sample.limits) or sample.backend != "native":
            continue
        for engine in sample.engines:
            yield pytest.param(sample, setting, engine, id=f"{sample.name}-{engine}")


def _codes(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found.int_repr() if found.is_quantized else found]
    return [t for part in found for t in _codes(part)]


@pytest.mark.parametrize(("sample", "setting", "engine"), list(_cases()))
def test_emulated_is_the_int8_model(sample: Sample, setting: str, engine: str) -> None:
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no such engine")
    with quantized_engine(engine), torch.no_grad():
        converted = convert(sample, setting, prepare(sample, setting))
        reason = REFUSED.get((sample.name, engine)) or REFUSED.get((sample.name, ""))
        if reason is not None:
            with pytest.raises(UnsupportedError, match=reason):
                fxqfix.emulate(converted, isa=native_isa())
            return
        emulated = fxqfix.emulate(converted, isa=native_isa())
        for batch in batches(sample):
            wanted, found = _codes(converted(*batch)), _codes(emulated(*batch))
            assert len(wanted) == len(found)
            for a, b in zip(wanted, found, strict=True):
                assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} differ"

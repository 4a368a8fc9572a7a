"""The op table's own models, emulated: what a converted model gives is what its emulation gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fxqfix
from fxqfix._torch import quantized_engine, quiet
from fxqfix.errors import UnsupportedError
from tests.op_flows import batches, convert, prepare
from tests.op_samples import SAMPLES, Sample

# Samples that are refused, by what the error says. One that is emulated all the same fails.
REFUSED: dict[str, tuple[str, ...]] = {
    "can't be copied": (  # torch packs 3-D weights for qnnpack, and can't unpack them
        "conv3d-qnnpack",
        "conv3d_bn-qnnpack",
        "conv_transpose3d-qnnpack",
        "conv_transpose3d_bn-qnnpack",
        "functional_conv3d-qnnpack",
        "adaptive_max_pool3d-qnnpack",
    ),
}


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
def test_emulated_is_the_int8_model(
    sample: Sample, setting: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no such engine")
    with quantized_engine(engine), torch.no_grad(), quiet():
        try:
            converted = convert(sample, setting, prepare(sample, setting))
            data = list(batches(sample))
            wanted = [_codes(converted(*batch)) for batch in data]
        except RuntimeError as error:
            pytest.skip(f"torch does not convert or run it: {str(error).splitlines()[0]}")
        name = f"{sample.name}-{engine}"
        reason = next((text for text, names in REFUSED.items() if name in names), None)
        if reason is not None:
            with pytest.raises(UnsupportedError, match=reason):
                fxqfix.emulate(converted)
            return
        emulated = fxqfix.emulate(converted)
        # An emulated model keeps the rules of the build that made it: it asks for none.
        monkeypatch.setattr("fxqfix.qparams.zero_point_first", None)
        for batch, codes in zip(data, wanted, strict=True):
            for a, b in zip(codes, _codes(emulated(*batch)), strict=True):
                assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} differ"

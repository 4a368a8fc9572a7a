"""Every row of the known-wrong kernels, run against the kernel."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.ao.nn import quantized as nnq
from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import fxqfix
from fxqfix._torch import quantized_engine
from fxqfix.dialects.weights import int8_weight
from fxqfix.engines import DEFECTS, Call, find_defect, isa_of
from fxqfix.engines.calls import calls
from fxqfix.engines.listing import coverage, known_wrong
from fxqfix.ops import TABLE
from fxqfix.qparams import QParams

_MEASURED = "2.13.0+cpu"  # other builds of torch are shown, not judged
_BUILT_OTHERWISE = {"signed-add", "signed-mul", "points-outside"}  # XNNPACK, oneDNN 3.5
_BY_CHANCE = {"amx-four-channels"}  # corrupted memory


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.name)
def test_the_kernel_is_still_wrong(defect) -> None:
    """A torch that repairs one fails here: give the row its end, or drop it."""
    known = torch.backends.quantized.supported_engines
    if not any(engine in known for engine in defect.engines):
        pytest.skip(f"this torch has none of the engines {defect.engines}")
    runs = defect.levels is None or defect.levels(isa_of(None))
    wanted = defect.name not in _BUILT_OTHERWISE if runs else None
    if defect.present is not wanted and torch.__version__ != _MEASURED:
        pytest.skip(f"{defect.name}: wrong here: {defect.present}; in torch {_MEASURED}: {wanted}")
    assert defect.present is wanted or (runs and defect.name in _BY_CHANCE)


def test_rows_name_ops_and_engines_that_exist() -> None:
    keys = {row.key for row in TABLE}
    assert all({op.removesuffix("_dynamic") for op in d.ops} <= keys for d in DEFECTS)
    assert all(set(d.engines) <= {"fbgemm", "onednn", "qnnpack"} for d in DEFECTS)
    assert len({d.name for d in DEFECTS}) == len(DEFECTS)


def test_a_call_finds_its_row() -> None:
    options: dict[str, object] = {"count_include_pad": False, "padding": 1}
    pool = {"node": "pool", "key": "avg_pool2d", "arguments": options}
    found = find_defect(Call(engine="qnnpack", **pool))
    assert found is not None
    assert found.name == "average-counts-padding"
    assert find_defect(Call(engine="fbgemm", **pool)) is None
    options["padding"] = 0
    assert find_defect(Call(engine="qnnpack", **pool)) is None  # nothing is padded


def test_one_packed_weight_on_two_zero_points() -> None:
    """Only qnnpack, and only where the scale is the same: a new one sets its kernel up again."""
    grid = QParams(0.5, 3, 0, 255, torch.quint8)
    other = replace(grid, zero_point=9)
    call = Call("conv", "qnnpack", "conv2d", qparams=(grid,), others=(other,))
    found = find_defect(call)
    assert found is not None
    assert found.name == "padding-remembers"
    assert find_defect(replace(call, others=(grid,))) is None
    assert find_defect(replace(call, others=(replace(other, scale=0.25),))) is None
    assert find_defect(replace(call, engine="fbgemm")) is None


def test_a_shared_module_tells_its_calls_of_each_other() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.conv(x))

    x = torch.randn(1, 2, 3, 3)
    prepared = prepare_fx(Twice().eval(), get_default_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    made = calls(convert_fx(prepared), "fbgemm")
    first, second = (call for call in made.values() if call.key == "conv2d")
    assert first.others == second.qparams[:1]
    assert second.others == first.qparams[:1]


def test_slopes_are_clipped_where_a_converted_module_shows_it() -> None:
    def row(slopes: list[float], scale: float, point: int = 0) -> str:
        module = nnq.PReLU(0.1, 0, len(slopes))
        weight = torch.quantize_per_tensor(torch.tensor(slopes), scale, point, torch.quint8)
        module.set_weight(weight)
        found = find_defect(Call("p", "fbgemm", "prelu", module=module))
        return found.name if found is not None else ""

    assert row([0.25], 0.25 / 255) == "slopes-clipped"  # 1 is code 1020
    assert row([-0.25], 0.25 / 255, 255) == "slopes-clipped"
    assert row([-0.75, 0.75], 0.75 / 127.5) == "slopes-clipped"  # on a qint8 grid
    assert row([0.0, 1.25], 1.25 / 255) == ""  # a slope of 0 that is meant
    assert row([-0.5, 1.5], 2.0 / 255, 64) == ""


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # torch's own copy
@pytest.mark.parametrize("slope", [0.25, -0.25])
def test_compare_names_clipped_slopes(slope: float) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(4, 4, 3), nn.PReLU(init=slope)), torch.randn(2, 4, 6, 6)
    prepared = prepare_qat_fx(net.train(), get_default_qat_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    frozen = fxqfix.freeze(prepared.eval())
    with quantized_engine("fbgemm"):  # x86, torch's default, may pack the convolution for onednn
        converted = convert_fx(copy.deepcopy(frozen))
    report = fxqfix.compare(frozen, converted, [x], engine="fbgemm")
    causes = next(row.causes for row in report.rows if row.op == "prelu")
    assert causes["kernel-defect"] > 0
    assert report.unexplained == 0
    assert torch.equal(fxqfix.emulate(converted, engine="fbgemm")(x), converted(x))


def test_listings() -> None:
    headers, rows = coverage()
    assert all(len(row) == len(headers) for row in rows)
    headers, rows = known_wrong()
    assert [row[0] for row in rows] == [d.name for d in DEFECTS]
    assert all(len(row) == len(headers) for row in rows)


@pytest.mark.parametrize(("axis", "name"), [(0, "transposed-input-scales"), (1, None)])
def test_scales_of_input_channels_on_qnnpack(axis: int, name: str | None) -> None:
    """Of a transposed convolution: the kernel takes scale i for output channel i."""
    if "qnnpack" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no engine qnnpack")
    scales, points = torch.rand(4) + 0.01, torch.zeros(4, dtype=torch.long)
    weight = torch.quantize_per_channel(torch.randn(4, 4, 3, 3), scales, points, axis, torch.qint8)
    with quantized_engine("qnnpack"):
        module = nnq.ConvTranspose2d(4, 4, 3)
        module.set_weight_bias(weight, None)
        call = Call("up", "qnnpack", "conv_transpose2d", module=module, weight=int8_weight(module))
    found = find_defect(call)
    assert (found.name if found is not None else None) == name

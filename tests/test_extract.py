"""extract_parameters and golden_vectors: nothing is missing, every number is exact, files too."""

from __future__ import annotations

import copy
import functools
import json
import math
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.quantization import (
    DeQuantStub,
    QuantStub,
    get_default_qconfig,
    get_default_qconfig_mapping,
)
from torch.ao.quantization import convert as eager_convert
from torch.ao.quantization import prepare as eager_prepare
from torch.ao.quantization.quantize_fx import (
    _convert_to_reference_decomposed_fx,
    convert_fx,
    convert_to_reference_fx,
    prepare_fx,
)

from fxqfix import (
    GoldenVectors,
    Parameters,
    _torch,
    extract_parameters,
    golden_vectors,
    inspect,
    to_decomposed,
)
from fxqfix._torch import quantized_engine
from fxqfix.errors import (
    DataError,
    DialectError,
    MissingDependencyError,
    ModelRunError,
    RangeUnknownError,
    UnknownNameError,
    UnsupportedError,
)
from fxqfix.export.requantize import fixed_point
from tests.engines.nets import NETS, SHAPES
from tests.states import fingerprint

SUFFIXES = (".npz", ".safetensors", ".json")


@functools.cache
def models(name: str, engine: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """(prepared, converted, input) of a small architecture."""
    torch.manual_seed(1)
    x = torch.randn(SHAPES.get(name, (4, 3, 16, 16)))
    with quantized_engine(engine):
        mapping = get_default_qconfig_mapping(engine)
        prepared = prepare_fx(NETS[name]().eval(), mapping, (x,))
        prepared(x)
        return prepared, convert_fx(copy.deepcopy(prepared)), x


@pytest.fixture(scope="module")
def cnn() -> tuple[nn.Module, nn.Module, Tensor]:
    return models("PlainCNN", "qnnpack")


@pytest.mark.parametrize("engine", ["qnnpack", "fbgemm"])
@pytest.mark.parametrize("name", NETS)
def test_every_net_is_extracted(name: str, engine: str) -> None:
    prepared, converted, x = models(name, engine)
    with quantized_engine(engine):
        for model in (converted, prepared):
            parameters, golden = extract_parameters(model), golden_vectors(model, x)
            known = {*parameters.inputs, *(op.name for op in parameters)}
            assert len(known) == len(parameters) + len(parameters.inputs)
            assert all(set(op.inputs) <= known for op in parameters)
            assert set(parameters.outputs) <= known
            assert {op.name: op.inputs for op in parameters} == golden.ops
            for op in parameters:
                assert len(op.inputs) == len(op.input_qparams)
                if op.op == "chunk":  # several values, by place
                    continue
                if op.output is not None:
                    assert golden.output_of(op.name).dtype == op.output.storage
                elif op.name not in golden.outputs:
                    assert op.name not in golden.values
        weights = [s for s in inspect(converted).sites if s.kind == "weight"]
        found = [op for op in extract_parameters(converted) if op.weight is not None]
        assert [tuple(op.weight.shape) for op in found] == [s.shape for s in weights]
        assert [op.weight_qparams for op in found] == [s.used for s in weights]


def test_int8_and_prepared_tell_the_same_of_weighted_ops(cnn: Any) -> None:
    prepared, converted, _ = cnn
    weighted = [
        [op for op in extract_parameters(model) if op.weight is not None]
        for model in (prepared, converted, to_decomposed(prepared))
    ]
    assert [len(ops) for ops in weighted] == [3, 3, 3]
    for a, b, c in zip(*weighted, strict=True):
        assert a.op == b.op == c.op
        for key in ("weight", "bias", "bias_int32", "multiplier", "fixed_multiplier"):
            assert torch.equal(getattr(a, key), getattr(b, key)), key
            assert torch.equal(getattr(a, key), getattr(c, key)), key
        names = ("stride", "padding", "dilation", "groups", "kernel_size")
        assert [a.options.get(n) for n in names] == [b.options.get(n) for n in names]


def test_what_is_known_of_a_convolution(cnn: Any) -> None:
    op = next(op for op in extract_parameters(cnn[1]) if op.weight is not None)
    assert (op.op, op.layout, op.module) == ("conv2d_relu", "OIHW", "body.0.0")
    assert op.options["kernel_size"] == (3, 3)
    assert op.options["padding"] == (1, 1)
    module: Any = cnn[1].get_submodule("body.0.0")
    assert torch.equal(op.weight, module.weight().int_repr())
    assert torch.equal(op.bias, module.bias())
    assert op.output.scale == module.scale
    assert op.output.zero_point == module.zero_point


@pytest.mark.parametrize("engine", ["qnnpack", "fbgemm"])
def test_bias_and_multipliers_are_the_formulas(engine: str) -> None:
    for op in extract_parameters(models("Residual", engine)[1]):
        if op.weight is None:
            continue
        f = np.float32
        for i, scale in enumerate(op.weight_qparams.scales):
            step = f(op.input_qparams[0].scale) * f(scale)
            assert op.multiplier[i].item() == step / f(op.output.scale)
        steps = np.array(op.weight_qparams.scales, f) * f(op.input_qparams[0].scale)
        assert op.bias_int32.tolist() == np.rint(op.bias.numpy() * (f(1) / steps)).tolist()
        assert op.bias_int32.dtype == torch.int32
        pairs = zip(op.multiplier.tolist(), op.fixed_multiplier, op.fixed_shift, strict=True)
        for real, multiplier, shift in pairs:  # a float32 has 24 bits: the pair has them all
            assert Fraction(real) == Fraction(int(multiplier)) / 2 ** int(shift)


def test_no_other_pair_is_closer() -> None:
    draw = random.Random(0)
    values = [draw.uniform(0.5, 1) * 2.0 ** draw.randint(-60, 20) for _ in range(3000)]
    values += [2.0**k for k in (-149, -31, -1, 0, 5)] + [math.nextafter(1.0, 0.0)]
    values += [(2**31 - Fraction(1, 2)) / 2**31, (2**30 + Fraction(1, 2)) / 2**31]
    for value in map(float, values):
        multiplier, shift = fixed_point(value)
        assert 2**30 <= multiplier < 2**31
        error = abs(Fraction(value) - multiplier * Fraction(2) ** -shift)
        for other in (multiplier - 1, multiplier + 1):
            assert error <= abs(Fraction(value) - other * Fraction(2) ** -shift)
        # In the octaves beside, the only pair that could be as close is at the border.
        assert error <= abs(Fraction(value) - Fraction(2**31) * Fraction(2) ** -shift)
        assert error <= abs(Fraction(value) - Fraction(2**31 - 1) * Fraction(2) ** -(shift + 1))
    assert fixed_point(0.0) == (0, 0)


def test_declared_ranges_come_from_the_prepared_model() -> None:
    prepared, converted, _ = models("PlainCNN", "fbgemm")
    plain, told = extract_parameters(converted), extract_parameters(converted, ranges_from=prepared)
    assert {op.output.range_text for op in plain if op.output} == {"[0,255]"}
    assert {op.output.range_text for op in told if op.output} == {"[0,127]"}
    inputs = {q.range_text for op in told for q in op.input_qparams if q}
    assert inputs == {"[0,127]"}
    mapping = get_default_qconfig_mapping("fbgemm")
    assert extract_parameters(converted, ranges_from=mapping) == told
    assert {op.output.range_text for op in extract_parameters(prepared) if op.output} == {"[0,127]"}


def test_torchs_own_decomposed_model_is_read_alike() -> None:
    prepared, _, x = models("Residual", "fbgemm")
    torchs = _convert_to_reference_decomposed_fx(copy.deepcopy(prepared))
    pairs = zip(extract_parameters(torchs), extract_parameters(prepared), strict=True)
    for theirs, ours in pairs:
        assert (theirs.op, theirs.output) == (ours.op, ours.output)
        for key in ("weight", "bias", "bias_int32", "multiplier"):
            a, b = getattr(theirs, key), getattr(ours, key)
            assert a is b is None or torch.equal(a, b), key
        if ours.weight is not None and ours.weight.dim() == 4:
            names = ("stride", "padding", "dilation", "groups", "kernel_size")
            assert [theirs.options[n] for n in names] == [ours.options[n] for n in names]
    golden_vectors(torchs, x)


class Aten(nn.Module):
    """As PT2E spells it: aten overloads, a weight per channel, a check that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(-128, 128, (5, 4, 3), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(5) / 100 + 0.01)
        self.register_buffer("points", torch.zeros(5, dtype=torch.int64))
        self.register_buffer("bias", torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        ops, given = torch.ops.quantized_decomposed, (0.05, 3, 0, 127, torch.uint8)
        channel = (self.codes, self.scales, self.points, 0, -128, 127, torch.int8)
        w = ops.dequantize_per_channel.default(*channel)
        x = ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *given), *given)
        torch.ops.aten.sin.default(x)
        x = torch.ops.aten.conv1d.default(x, w, self.bias, [2])
        x = torch.ops.aten.relu.default(x)
        return ops.quantize_per_tensor.default(x, 0.1, 0, 0, 255, torch.uint8)


def test_aten_spellings() -> None:
    with _torch.quiet():
        _torch.decomposed()
    tracer = fx.Tracer()
    tracer.proxy_buffer_attributes = True
    model, x = Aten(), torch.randn(2, 4, 9)
    net = fx.GraphModule(model, tracer.trace(model))
    entry, conv = extract_parameters(net)
    assert (conv.op, conv.inputs, conv.layout) == ("conv1d_relu", (entry.name,), "OIW")
    assert torch.equal(conv.weight, net.codes)
    assert torch.equal(conv.bias, net.bias)
    assert conv.weight_qparams.scales == tuple(net.scales.tolist())
    assert conv.weight_qparams.axis == 0
    wanted = {"kernel_size": (3,), "stride": (2,), "padding": (0,), "dilation": (1,), "groups": 1}
    assert dict(conv.options) == wanted
    assert (conv.input_qparams[0].range_text, conv.output.range_text) == ("[0,127]", "[0,255]")
    golden = golden_vectors(net, x)
    assert torch.equal(golden.output_of(conv.name), net(x))
    assert golden.outputs == (conv.name,)


class Transposed(nn.Module):
    """As PT2E spells it, with a scale per channel of one of the weight's axes."""

    def __init__(self, axis: int, groups: int) -> None:
        super().__init__()
        self.axis, self.groups = axis, groups
        self.register_buffer("codes", torch.randint(-128, 128, (4, 2, 3, 3), dtype=torch.int8))
        self.register_buffer("scales", torch.rand((4, 2)[axis]) / 100 + 0.01)
        self.register_buffer("points", torch.zeros((4, 2)[axis], dtype=torch.int64))
        self.register_buffer("bias", torch.rand(2 * groups))

    def forward(self, x: Tensor) -> Tensor:
        ops, given = torch.ops.quantized_decomposed, (0.05, 3, 0, 127, torch.uint8)
        channel = (self.codes, self.scales, self.points, self.axis, -128, 127, torch.int8)
        w = ops.dequantize_per_channel.default(*channel)
        x = ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *given), *given)
        rest = ([2, 2], [1, 1], [0, 0], self.groups)
        x = torch.ops.aten.conv_transpose2d.input(x, w, self.bias, *rest)
        return ops.quantize_per_tensor.default(x, 0.1, 0, 0, 255, torch.uint8)


@pytest.mark.parametrize(("axis", "groups"), [(0, 1), (0, 2), (1, 1), (1, 2)])
def test_scales_of_a_transposed_convolution(axis: int, groups: int) -> None:
    """Per input channel, as torchao's XNNPACK quantizer has it in QAT, sums have no one unit."""
    with _torch.quiet():
        _torch.decomposed()
    tracer = fx.Tracer()
    tracer.proxy_buffer_attributes = True
    model = Transposed(axis, groups)
    parameters = extract_parameters(fx.GraphModule(model, tracer.trace(model)))
    _, conv = parameters
    assert conv.layout == "IOHW"
    assert conv.weight_qparams.axis == axis
    assert conv.weight_qparams.scales == tuple(model.scales.tolist())
    assert torch.equal(conv.weight, model.codes)
    assert torch.equal(conv.bias, model.bias)
    integers = conv.bias_int32, conv.multiplier, conv.fixed_multiplier, conv.fixed_shift
    assert ("per input channel" in str(parameters)) == (axis == 0)
    if axis == 0:
        assert integers == (None,) * 4
        return
    steps = (torch.tensor(0.05) * model.scales).repeat(groups)
    assert torch.equal(conv.multiplier, steps / torch.tensor(0.1))
    assert torch.equal(conv.bias_int32, torch.round(model.bias * (1.0 / steps)).int())
    assert conv.fixed_shift.shape == (2 * groups,)


class Eager(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.conv, self.up = nn.Conv1d(3, 4, 3), nn.ConvTranspose2d(4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.up(self.conv(self.quant(x)).unsqueeze(3)))


def test_eager_model_with_1d_and_transposed_convolutions() -> None:
    x = torch.rand(2, 3, 8)
    with quantized_engine("qnnpack"):
        net = Eager().eval()
        net.qconfig = get_default_qconfig("qnnpack")
        prepared = eager_prepare(net)
        prepared(x)
        parameters = extract_parameters(eager_convert(prepared))
        golden = golden_vectors(eager_convert(prepared), x)
    conv, up = (op for op in parameters if op.weight is not None)
    assert (conv.layout, up.layout) == ("OIW", "IOHW")
    assert (conv.options["stride"], conv.options["kernel_size"]) == ((1,), (3,))
    assert (tuple(conv.weight.shape), tuple(up.weight.shape)) == ((4, 3, 3), (4, 2, 2, 2))
    assert golden.outputs == parameters.outputs
    assert golden.output_of(golden.outputs[0]).dtype == torch.float32


class Calls(nn.Module):
    """Functions, methods, several results, and a float op between."""

    def forward(self, x: Tensor) -> Any:
        q = torch.quantize_per_tensor(x, 0.05, 8, torch.quint8)
        left, right = q.chunk(2, 1)
        y = torch.ops.quantized.add(left, right, 0.1, 3)
        y = F.max_pool2d(y, 2).permute(0, 2, 3, 1)
        z = torch.quantize_per_tensor(torch.sin(y.dequantize()), 0.01, 100, torch.quint8)
        return z.flatten(1, 2), q.dequantize().sum()


def test_options_of_functions_and_methods() -> None:
    x = torch.randn(2, 4, 4, 4)
    parameters, golden = extract_parameters(Calls()), golden_vectors(Calls(), x)
    options = {op.op: dict(op.options) for op in parameters}
    assert options["max_pool2d"]["kernel_size"] == options["max_pool2d"]["stride"] == (2, 2)
    assert options["permute"] == {"dims": (0, 2, 3, 1)}
    assert options["flatten"] == {"start_dim": 1, "end_dim": 2}
    assert options["chunk"] == {"chunks": 2, "dim": 1}
    assert parameters["add"].inputs == ("getitem", "getitem_1")
    assert golden.values["chunk.1"].dtype == torch.uint8
    assert "sin" not in golden.values
    wanted, total = Calls()(x)
    assert torch.equal(golden.output_of("flatten"), wanted.int_repr())
    assert torch.equal(golden.output_of("sum_1"), total)


def test_golden_vectors_are_what_the_model_computes(cnn: Any) -> None:
    _, converted, x = cnn
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda m, a, out, n=name: seen.update({n: out.int_repr()}))
        for name, module in converted.named_modules()
        if name in ("body.0.0", "body.2.0", "head")
    ]
    with quantized_engine("qnnpack"):
        result = converted(x)
        for handle in handles:
            handle.remove()
        golden, parameters = golden_vectors(converted, x), extract_parameters(converted)
    by_module = {op.module: op.name for op in parameters if op.weight is not None}
    assert by_module.keys() == seen.keys()
    for module, codes in seen.items():
        assert torch.equal(golden.output_of(by_module[module]), codes)
    assert torch.equal(golden.values[golden.outputs[0]], result)
    assert torch.equal(golden.values[golden.inputs[0]], x)
    first = by_module["body.0.0"]
    feeding = golden.values[golden.ops[first][0]]
    assert torch.equal(golden.inputs_of(first)[0], feeding)


def test_nothing_is_perturbed(cnn: Any) -> None:
    for model in cnn[:2]:
        before, state, x = fingerprint(model), torch.get_rng_state(), cnn[2].clone()
        with quantized_engine("qnnpack"):
            golden, parameters = golden_vectors(model, x), extract_parameters(model)
        golden.values[golden.inputs[0]].zero_()
        for op in parameters:
            if op.weight is not None:
                op.weight.zero_()
                op.bias.zero_()
        assert torch.equal(x, cnn[2])
        assert torch.equal(state, torch.get_rng_state())
        assert fingerprint(model) == before
        assert extract_parameters(model)["head"].weight.any()


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("engine", ["qnnpack", "fbgemm"])
def test_round_trip(suffix: str, engine: str, tmp_path: Path) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    prepared, converted, x = models("PlainCNN", engine)
    path = tmp_path / f"file{suffix}"
    with quantized_engine(engine):
        for model in (prepared, converted):
            records = (extract_parameters(model), golden_vectors(model, x))
            for record in records:
                record.save(path)
                loaded = type(record).load(str(path))
                assert loaded == record
                assert str(loaded) == str(record)
            assert [op.output for op in Parameters.load(_saved(records[0], path))] == [
                op.output for op in records[0]
            ]


def _saved(record: Parameters, path: Path) -> Path:
    record.save(path)
    return path


def test_equality_is_of_bits(cnn: Any) -> None:
    first, second = extract_parameters(cnn[1]), extract_parameters(cnn[1])
    assert first == second
    assert first != "something else"
    second["head"].bias[0] = torch.nextafter(second["head"].bias[0], torch.tensor(9.0))
    assert first != second


def test_odd_floats_and_shapes_survive(tmp_path: Path) -> None:
    values = {
        "odd": torch.tensor([-0.0, 1e-45, 3.4e38, 0.1, float("inf"), float("nan")]),
        "none": torch.empty(0, 3, dtype=torch.int8),
        "one": torch.tensor(7, dtype=torch.int32),
    }
    record = GoldenVectors({"op": ("odd",)}, values, ("odd",), ("one",))
    for suffix in SUFFIXES:
        record.save(tmp_path / f"file{suffix}")
        assert GoldenVectors.load(tmp_path / f"file{suffix}") == record


def test_npz_needs_no_pickle_and_no_fxqfix(cnn: Any, tmp_path: Path) -> None:
    extract_parameters(cnn[1]).save(tmp_path / "file.npz")
    with np.load(tmp_path / "file.npz", allow_pickle=False) as file:
        header = json.loads(str(file["header"]))
        assert header["format"] == "fxqfix-parameters"
        assert file["head/weight"].dtype == np.int8
        assert file["head/bias_int32"].dtype == np.int32


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bad_files_are_refused(suffix: str, cnn: Any, tmp_path: Path) -> None:
    path = tmp_path / f"file{suffix}"
    with pytest.raises(DataError, match="can't be read"):
        Parameters.load(path)
    path.write_bytes(b"{broken")
    with pytest.raises(DataError, match="can't be read"):
        Parameters.load(path)
    extract_parameters(cnn[1]).save(path)
    with pytest.raises(DataError, match=r"of another kind.*fxqfix-golden-vectors"):
        GoldenVectors.load(path)
    with pytest.raises(DataError, match="can't be written"):
        extract_parameters(cnn[1]).save(tmp_path / "no" / f"folder{suffix}")


def test_bad_names_are_refused(cnn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = extract_parameters(cnn[1])
    with pytest.raises(DataError, match=r"suffix.*\.txt.*\.npz"):
        parameters.save(tmp_path / "file.txt")
    with pytest.raises(DataError, match="no suffix"):
        Parameters.load(tmp_path / "file")
    (tmp_path / "file.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(DataError, match="another kind"):
        Parameters.load(tmp_path / "file.json")
    (tmp_path / "file.json").write_text(
        '{"format": "fxqfix-parameters", "version": 1}', encoding="utf-8"
    )
    with pytest.raises(DataError, match="missing or broken"):
        Parameters.load(tmp_path / "file.json")
    with pytest.raises(UnknownNameError, match="head"):
        parameters["nothing"]
    with pytest.raises(UnknownNameError, match="head"), quantized_engine("qnnpack"):
        golden_vectors(cnn[1], cnn[2]).output_of("nothing")
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(MissingDependencyError, match=r"fxqfix\[export\]"):
        parameters.save(tmp_path / "file.safetensors")


class Dynamic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def test_bad_models_are_refused(cnn: Any) -> None:
    prepared, converted, x = cnn
    with pytest.raises(DialectError):
        extract_parameters(nn.Linear(2, 2))
    with pytest.raises(DialectError):
        golden_vectors(nn.Linear(2, 2), x)
    with quantized_engine("qnnpack"):
        reference = convert_to_reference_fx(copy.deepcopy(prepared))
        with pytest.raises(RangeUnknownError):
            extract_parameters(reference)
        assert extract_parameters(reference, ranges_from=prepared)["head"].weight is not None
        with pytest.raises(ModelRunError):
            golden_vectors(converted, torch.rand(2, 2))
        with pytest.raises(DataError, match="inputs"):
            golden_vectors(converted, (x, x, x))
        with pytest.raises(DataError, match="inputs"):
            golden_vectors(converted, {"other": x})
        assert golden_vectors(converted, {"x": x}) == golden_vectors(converted, (x,))
        run_time = torch.ao.quantization.quantize_dynamic(Dynamic(), {nn.LSTM})
        with pytest.raises((UnsupportedError, DialectError)):
            extract_parameters(run_time)


def test_table_names_every_op(cnn: Any) -> None:
    lines = str(extract_parameters(cnn[1])).splitlines()
    parameters = extract_parameters(cnn[1])
    assert lines[0].split()[:3] == ["name", "op", "inputs"]
    assert [line.split()[0] for line in lines[1:]] == [op.name for op in parameters]
    assert any("OI 10x192 int8 per tensor" in line for line in lines)

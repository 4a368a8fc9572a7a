"""judge: answers of every kind, exactness on every engine, what is missing, bad input."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fxqfix import (
    GoldenVectors,
    Judgement,
    Parameters,
    cli,
    extract_parameters,
    golden_vectors,
    judge,
)
from fxqfix._torch import quantized_engine
from fxqfix.errors import DataError, FxqfixError, OptionError, UnknownNameError
from tests.engines.nets import NETS
from tests.test_extract import models


@functools.cache
def dumped(
    name: str, engine: str = "qnnpack", prepared: bool = False
) -> tuple[Parameters, GoldenVectors]:
    before, converted, x = models(name, engine)
    model = before if prepared else converted
    with quantized_engine(engine):
        return extract_parameters(model), golden_vectors(model, x)


def named(found: Judgement, op: str) -> list[tuple[str, ...]]:
    return [e.deviations for e in found.op(op).named]


# torch has no per-channel observer for onednn's transposed convolution.
ENGINES = ("qnnpack", "fbgemm", "x86", "onednn")
CASES = [(n, e) for n in NETS if n != "Recurrent" for e in ENGINES if (n, e) != ("UNet", "onednn")]


@pytest.mark.parametrize("prepared", [False, True], ids=["int8", "decomposed"])
@pytest.mark.parametrize(("name", "engine"), CASES)
def test_what_torch_computes_is_exact(name: str, engine: str, prepared: bool) -> None:
    parameters, golden = dumped(name, engine, prepared)
    found = judge(parameters, golden, golden=golden)
    assert found.exact, found.reasons
    assert found.verdict == "ok"
    assert len(found.ops) >= 7
    assert all(op.cumulative is not None and not op.cumulative.differing for op in found.ops)


def test_parameters_say_their_arithmetic(tmp_path: Path) -> None:
    for prepared, said in ((False, "qnnpack, isa"), (True, "decomposed ops")):
        parameters, golden = dumped("PlainCNN", "qnnpack", prepared)
        assert str(parameters.arithmetic).startswith(said)
        for suffix in (".npz", ".json", ".safetensors"):
            path = tmp_path / f"p{suffix}"
            parameters.save(path)
            assert Parameters.load(path) == parameters
            assert judge(Parameters.load(path), golden).exact


def test_an_arithmetic_can_be_asked_for() -> None:
    _, converted, _ = models("PlainCNN", "fbgemm")
    with quantized_engine("fbgemm"):
        parameters = extract_parameters(converted, engine="x86", isa="avx2", threads=3)
    assert str(parameters.arithmetic) == "x86, isa avx2, 3 threads"
    with pytest.raises(OptionError, match="only an int8 model"):
        extract_parameters(models("PlainCNN", "qnnpack")[0], engine="qnnpack")


def test_limits_are_what_the_model_itself_clamps_to() -> None:
    prepared, converted, _ = models("PlainCNN", "fbgemm")
    with quantized_engine("fbgemm"):
        declared = extract_parameters(converted, ranges_from=prepared)["body_0_0"]
        decomposed = extract_parameters(prepared)["body_0_0"]
    assert (declared.output.quant_min, declared.output.quant_max) == (0, 127)
    assert declared.limits == (0, 255)  # convert_fx dropped the range
    assert decomposed.limits == (0, 127)


def test_a_file_of_version_1_is_read_and_its_arithmetic_is_asked_for(tmp_path: Path) -> None:
    parameters, golden = dumped("PlainCNN")
    path = tmp_path / "p.json"
    parameters.save(path)
    data = json.loads(path.read_text())
    data["version"] = 1
    del data["arithmetic"]
    for op in data["ops"]:
        del op["limits"]
    path.write_text(json.dumps(data))
    old = Parameters.load(path)
    assert old.arithmetic is None
    with pytest.raises(DataError, match="which arithmetic"):
        judge(old, golden)
    assert judge(dataclasses.replace(old, arithmetic=parameters.arithmetic), golden).exact


# --- answers of every kind -----------------------------------------------------------------------


def _folder(values: dict[str, Tensor], path: Path) -> Path:
    for name, value in values.items():
        np.save(path / f"{name}.npy", value.numpy())
    return path


def _raw(values: dict[str, Tensor], path: Path) -> Path:
    tensors = []
    for name, value in values.items():
        last = value.dim() == 4
        value = value.permute(0, 2, 3, 1).contiguous() if last else value
        (path / f"{name}.bin").write_bytes(value.numpy().tobytes())
        dtype = str(value.dtype).removeprefix("torch.")
        entry = {"name": name, "file": f"{name}.bin", "dtype": dtype, "shape": list(value.shape)}
        tensors.append({**entry, **({"layout": "NHWC"} if last else {})})
    (path / "manifest.json").write_text(json.dumps({"tensors": tensors}))
    return path


def _npz(values: dict[str, Tensor], path: Path) -> Path:
    np.savez(path / "a.npz", **{n: v.numpy() for n, v in values.items()})
    return path / "a.npz"


def _json(values: dict[str, Tensor], path: Path) -> Path:
    (path / "a.json").write_text(json.dumps({n: v.tolist() for n, v in values.items()}))
    return path / "a.json"


def _safetensors(values: dict[str, Tensor], path: Path) -> Path:
    save = pytest.importorskip("safetensors.torch").save_file
    save({n: v.contiguous() for n, v in values.items()}, path / "a.safetensors")
    return path / "a.safetensors"


def _saved(values: dict[str, Tensor], path: Path) -> Path:
    dumped("PlainCNN")[1].save(path / "golden.npz")
    return path / "golden.npz"


FORMS: dict[str, Callable[[dict[str, Tensor], Path], Any]] = {
    "mapping": lambda values, path: values,
    "numpy": lambda values, path: {n: v.numpy() for n, v in values.items()},
    "folder": _folder,
    "raw": _raw,
    "npz": _npz,
    "json": _json,
    "safetensors": _safetensors,
    "golden file": _saved,
}


@pytest.mark.parametrize("form", FORMS)
def test_answers_of_every_kind(form: str, tmp_path: Path) -> None:
    parameters, golden = dumped("PlainCNN")
    assert judge(parameters, FORMS[form](dict(golden.values), tmp_path)).exact


def test_dequantized_values_are_codes() -> None:
    parameters, golden = dumped("PlainCNN")
    grid = parameters["body_0_0"].output
    values = dict(golden.values)
    values["body_0_0"] = (values["body_0_0"].int() - grid.zero_point).float() * grid.scale
    found = judge(parameters, values)
    assert found.exact
    assert found.notes == ("body_0_0: floats were taken for the codes that they are values of",)


# --- what is missing -----------------------------------------------------------------------------


def test_an_op_that_was_not_given_is_judged_with_the_next() -> None:
    parameters, golden = dumped("PlainCNN")
    values = dict(golden.values)
    del values["body_0_0"]
    found = judge(parameters, values)
    assert found.exact, found.reasons
    assert found.op("body_1").through == ("body_0_0",)
    assert found.notes == ("body_0_0 was not given: it is judged with body_1",)


def test_an_output_that_was_not_given_leaves_it_open() -> None:
    parameters, golden = dumped("PlainCNN")
    values = {n: v for n, v in golden.values.items() if n not in golden.outputs}
    found = judge(parameters, values)
    assert found.verdict == "not judged"
    assert found.left_out == ("dequantize_6: the device did not give it",)
    assert not found.exact


def test_inputs_come_from_the_golden_vectors() -> None:
    parameters, golden = dumped("PlainCNN")
    values = {n: v for n, v in golden.values.items() if n != "x"}
    assert judge(parameters, values, golden=golden).exact
    without = judge(parameters, values)
    assert without.verdict == "not judged"
    assert any("quantize_per_tensor" in why for why in without.left_out)


def test_other_inputs_are_a_fault() -> None:
    parameters, golden = dumped("PlainCNN")
    values = {**golden.values, "x": golden.values["x"] + 1}
    found = judge(parameters, values, golden=golden)
    assert found.verdict == "not ok"
    assert found.faults[0] == "the model's input x is not the golden one"


def test_an_unknown_name_is_listed() -> None:
    parameters, golden = dumped("PlainCNN")
    found = judge(parameters, {**golden.values, "body_0_1": torch.zeros(1)})
    assert found.exact
    assert found.unknown == ("body_0_1 (nearest: body_0_0)",)


# --- bad input -----------------------------------------------------------------------------------


def _nan(value: Tensor) -> Tensor:
    wrong = value.float().clone()
    wrong.flatten()[0] = float("nan")
    return wrong


BAD: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "shape": (lambda v: v[:, :, 1:], "its shape is"),
    "axes": (lambda v: v.flatten(), "its shape is"),
    "nan": (_nan, "NaN or inf"),
    "bool": (lambda v: v > 3, "holds no codes"),
    "complex": (lambda v: v.to(torch.complex64), "holds no codes"),
    "floats": (lambda v: v.float() + 0.3, "neither codes nor values"),
    "text": (lambda v: "codes", "no array of numbers"),
    "objects": (lambda v: np.array([object()]), "no array of numbers"),
    "wide": (lambda v: v.long() + 2**40, "beyond 32 bits"),
    "lowest": (lambda v: torch.full_like(v, -(2**63), dtype=torch.int64), "beyond 32 bits"),
    "unsigned": (lambda v: np.full(v.shape, 2**64 - 1, dtype=np.uint64), "beyond 32 bits"),
    "meta": (lambda v: v.to("meta"), "meta tensor"),
    "sparse": (lambda v: v.to_sparse(), "sparse"),
    "float8": (lambda v: v.float().to(torch.float8_e4m3fn), "holds no codes"),
    "other grid": (lambda v: torch._make_per_tensor_quantized_tensor(v, 0.1, 3), "scale=0.1 zp=3"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_array_is_a_listed_op_and_the_others_are_judged(kind: str) -> None:
    wrong, said = BAD[kind]
    parameters, golden = dumped("PlainCNN")
    found = judge(parameters, {**golden.values, "body_0_0": wrong(golden.values["body_0_0"])})
    assert found.verdict == "not judged"
    assert [name for name, _ in found.unchecked] == ["body_0_0"]
    assert said in found.unchecked[0][1]
    assert len(found.ops) == len(judge(parameters, golden).ops) - 1
    assert all(op.equal for op in found.ops)


def _entry(path: Path, **changed: Any) -> None:
    data = json.loads((path / "manifest.json").read_text())
    entry = next(e for e in data["tensors"] if e["name"] == "body_0_0")
    entry.update(changed)
    (path / "manifest.json").write_text(json.dumps(data))


LIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (lambda p: _cut(p / "body_0_0.bin"), "bytes"),
    "shape": (lambda p: _entry(p, shape=[4, 16, 16, 9]), "bytes"),
    "dtype": (lambda p: _entry(p, dtype="int32"), "bytes"),
    "no dtype": (lambda p: _entry(p, dtype="codes"), "no dtype that is known"),
    "quantized dtype": (lambda p: _entry(p, dtype="quint8"), "no dtype that is known"),
    "dtype of 4 bits": (lambda p: _entry(p, dtype="uint4"), "no dtype that is known"),
    "float8": (lambda p: _entry(p, dtype="float8_e4m3fn"), "no dtype that is known"),
    "layout of layouts": (lambda p: _entry(p, layout=["NHWC"]), "layout that is not known"),
    "no shape": (lambda p: _entry(p, shape=None), "no shape"),
    "odd shape": (lambda p: _entry(p, shape=[4, -1]), "no shape of whole numbers"),
    "layout": (lambda p: _entry(p, layout="CHWN"), "layout that is not known"),
    "axes": (lambda p: _entry(p, layout="NWC"), "4 axes"),
    "outside": (lambda p: _entry(p, file="../../etc/x.bin"), "outside of the folder"),
    "absent": (lambda p: _entry(p, file="none.bin"), "there is no file"),
    "no file": (lambda p: _entry(p, file=7), "names no file"),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("kind", LIES)
def test_a_manifest_that_lies_is_a_listed_op(kind: str, tmp_path: Path) -> None:
    wrong, said = LIES[kind]
    parameters, golden = dumped("PlainCNN")
    wrong(_raw(dict(golden.values), tmp_path))
    found = judge(parameters, tmp_path)
    assert found.verdict == "not judged"
    assert [name for name, _ in found.unchecked] == ["body_0_0"]
    assert said in found.unchecked[0][1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "manifest can't be read"),
        ("[]", "lists no tensors"),
        ('{"tensors": [1]}', "lists no tensors"),
        ('{"tensors": [{"name": "a"}, {"name": "a"}]}', "twice"),
        ('{"tensors": [], "tensors": [{"name": "a"}]}', "twice"),
        ("[" * 100_000, "manifest can't be read"),
    ],
)
def test_a_broken_manifest_is_an_error(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=said):
        judge(dumped("PlainCNN")[0], tmp_path)


def test_what_a_manifest_says_and_nobody_reads_is_noted(tmp_path: Path) -> None:
    parameters, golden = dumped("PlainCNN")
    _raw(dict(golden.values), tmp_path)
    _entry(tmp_path, endian="big", offset=4)
    (note,) = judge(parameters, tmp_path).notes
    assert note == "body_0_0: of its entry in the manifest, endian, offset is not read"


def test_a_dump_in_json_has_each_name_once(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"body_0_0": [1], "body_0_0": [2]}')
    with pytest.raises(DataError, match="twice: body_0_0"):
        judge(dumped("PlainCNN")[0], path)


def test_a_dump_in_npz_has_each_name_once(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(2))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own, about the name
        for _ in range(2):
            file.write(tmp_path / "a.npy", "body_0_0.npy")
    with pytest.raises(DataError, match="twice: body_0_0"):
        judge(dumped("PlainCNN")[0], tmp_path / "a.npz")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    parameters, golden = dumped("PlainCNN")
    _folder(dict(golden.values), tmp_path)
    np.save(tmp_path / "body_0_0.npy", np.array([{"a": 1}]), allow_pickle=True)
    found = judge(parameters, tmp_path)
    assert "can't be read" in dict(found.unchecked)["body_0_0"]
    np.savez(tmp_path / "a.npz", body_0_0=np.array([{"a": 1}]))
    with pytest.raises(DataError, match="can't be read"):
        judge(parameters, tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (7, "can't be read"),
        ({}, "none of the answers is an op's"),
        ({"other": torch.zeros(1)}, "none of the answers is an op's"),
        ("no_such_file.npz", "can't be read"),
        ("no_such_file.txt", "names no format"),
    ],
)
def test_answers_that_are_none(answers: Any, said: str) -> None:
    with pytest.raises(FxqfixError, match=said):
        judge(dumped("PlainCNN")[0], answers)


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds nothing"):
        judge(dumped("PlainCNN")[0], tmp_path)


# --- the command ---------------------------------------------------------------------------------


def _files(tmp_path: Path, **wrong: Any) -> list[str]:
    parameters, golden = dumped("PlainCNN")
    folder = tmp_path / "dump"
    folder.mkdir()
    _folder({**golden.values, **wrong}, folder)
    parameters.save(tmp_path / "parameters.npz")
    golden.save(tmp_path / "golden.npz")
    return [str(tmp_path / "parameters.npz"), str(folder)]


def test_the_command_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = _files(tmp_path)
    golden = str(tmp_path / "golden.npz")
    assert cli.main(["judge", *files, "--golden", golden, "--fail-on-difference"]) == 0
    assert "every code is the reference's" in capsys.readouterr().out


def test_the_command_names_a_deviation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = dumped("PlainCNN")[1].values["body_0_0"].int() - 128
    files = _files(tmp_path, body_0_0=codes)
    out = tmp_path / "found.json"
    assert cli.main(["judge", *files, "--output", str(out)]) == 1
    assert "output-off-by-128" in capsys.readouterr().out
    assert Judgement.from_json(out.read_text()).verdict == "not ok"


def test_the_command_says_what_is_not_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = _files(tmp_path)
    (tmp_path / "dump" / "dequantize_6.npy").unlink()
    assert cli.main(["judge", *files]) == 2
    assert "the device did not give it" in capsys.readouterr().out
    assert cli.main(["judge", files[0], str(tmp_path / "none.npz")]) == 2
    assert "can't be read" in capsys.readouterr().err


def test_deviations_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["deviations"]) == 0
    assert "half-up" in capsys.readouterr().out


# --- the record ----------------------------------------------------------------------------------


def _wrong() -> Judgement:
    parameters, golden = dumped("PlainCNN")
    values = {**golden.values, "body_0_0": golden.values["body_0_0"].int() - 128}
    values |= {name: golden.values[name].flip(0) for name in ("head", "dequantize_6")}
    return judge(parameters, values, golden=golden)


def test_a_judgement_reads_back() -> None:
    found = _wrong()
    assert Judgement.from_json(found.to_json()) == found
    with pytest.raises(DataError, match="no judgement"):
        Judgement.from_json("{}")
    with pytest.raises(UnknownNameError, match="body_0_0"):
        found.op("conv")


def test_what_nothing_explains_is_said_so() -> None:
    found = _wrong()
    row = found.op("head")
    assert row.named == ()
    assert found.causes["unexplained"] == row.local.differing
    assert found.causes["output-off-by-128"] == found.op("body_0_0").local.differing
    assert "head: " in "; ".join(found.faults)
    assert "?" in found.table()


def test_codes_in_another_form_blame_no_op_behind() -> None:
    found = _wrong()
    assert named(found, "body_0_0") == [("output-off-by-128",)]
    assert found.op("body_1").equal


def test_no_function_of_torch_ao_runs_and_no_quantized_op() -> None:
    parameters, golden = dumped("PlainCNN")
    ran: list[str] = []

    def watch(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and "/torch/ao/" in frame.f_code.co_filename:
            ran.append(frame.f_code.co_filename)

    sys.setprofile(watch)
    try:
        assert judge(parameters, golden).exact
    finally:
        sys.setprofile(None)
    assert ran == []


def test_neither_inputs_nor_the_random_state_are_touched() -> None:
    parameters, golden = dumped("PlainCNN")
    before = {n: v.clone() for n, v in golden.values.items()}
    values = {**golden.values, "body_0_0": golden.values["body_0_0"].int() - 128}
    kept, state = values["body_0_0"].clone(), torch.get_rng_state()
    judge(parameters, values)
    assert torch.equal(values["body_0_0"], kept)
    assert all(torch.equal(golden.values[n], v) for n, v in before.items())
    assert torch.equal(torch.get_rng_state(), state)


class Doubled(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = torch.quantize_per_tensor(x, 0.5, 3, torch.quint8)
        return torch.ops.quantized.add(q, q, 1.0, 3).dequantize()  # type: ignore[no-any-return]


def test_few_codes_prove_nothing() -> None:
    """Two codes moved by one or two: what fits them fits by chance, and is said to."""
    parameters = extract_parameters(Doubled(), engine="qnnpack", isa="vnni")
    golden = golden_vectors(Doubled(), torch.tensor([0.3, 1.7]))
    fits = 0
    for first, second in [(1, 0), (0, 1), (1, 1), (-1, 0), (-3, -3), (2, 1)]:
        codes = golden.values["add"].int() + torch.tensor([first, second], dtype=torch.int32)
        found = judge(parameters, {**golden.values, "add": codes})
        row = found.op("add")
        assert found.verdict == ("not judged" if row.allowed else "not ok")
        assert row.few == bool(row.named)
        assert ("these are few codes" in str(found)) == row.few
        assert ("too few to tell why" in str(found.reasons)) == row.allowed
        assert Judgement.from_json(found.to_json()) == found
        fits += row.few
    assert fits


def test_more_codes_prove_enough() -> None:
    parameters = extract_parameters(Doubled(), engine="qnnpack", isa="vnni")
    golden = golden_vectors(Doubled(), torch.linspace(-1, 1, 64))
    codes = (golden.values["add"].int() - 3).clamp(min=0)
    row = judge(parameters, {**golden.values, "add": codes}).op("add")
    assert named(judge(parameters, {**golden.values, "add": codes}), "add")
    assert not row.few


# --- what a dump can mean -------------------------------------------------------------------------


class Sum(torch.nn.Module):
    """q + q, on a grid of choice."""

    def __init__(self, scale: float, point: int) -> None:
        super().__init__()
        self.scale, self.point = scale, point

    def forward(self, x: Tensor) -> Tensor:
        q = torch.quantize_per_tensor(x, self.scale, self.point, torch.quint8)
        added = torch.ops.quantized.add(q, q, self.scale, self.point)
        return torch.dequantize(added)


def summed(scale: float, point: int) -> tuple[Parameters, dict[str, Tensor]]:
    net, x = Sum(scale, point), torch.arange(40.0)
    parameters = extract_parameters(net, engine="qnnpack", isa="vnni")
    return parameters, dict(golden_vectors(net, x).values)


@pytest.mark.parametrize(("scale", "point"), [(1.0, 3), (2.0, 0), (1.0, 128)])
def test_floats_that_can_be_codes_and_values_are_not_guessed(scale: float, point: int) -> None:
    parameters, values = summed(scale, point)
    values["add"] = (values["add"].float() - point) * scale
    found = judge(parameters, values)
    assert found.verdict == "not judged"
    assert found.unchecked == (
        ("add", "its floats can be codes as well as values of this grid: give codes"),
    )
    assert all(op.equal for op in found.ops)


@pytest.mark.parametrize(("scale", "point"), [(1.0, 0), (0.75, 3)])
def test_floats_with_one_meaning_are_judged(scale: float, point: int) -> None:
    parameters, values = summed(scale, point)
    for made in (values["add"].float(), (values["add"].float() - point) * scale):
        assert judge(parameters, {**values, "add": made}).exact


def test_codes_in_place_of_the_floats_that_are_quantized_are_no_inputs() -> None:
    parameters, golden = dumped("PlainCNN")
    first = next(op for op in parameters if op.inputs == parameters.inputs)
    values = {**golden.values, first.inputs[0]: golden.values[first.name]}
    found = judge(parameters, values)
    assert found.verdict == "not judged"
    assert "floats are quantized here" in dict(found.unchecked)[first.inputs[0]]


class Floats(torch.nn.Module):
    """Float ops behind a dequantize, with one input and with two."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = torch.quantize_per_tensor(x, 0.05, 3, torch.quint8)
        y = torch.ops.quantized.add(q, q, 0.1, 3).dequantize()
        return y.softmax(-1), y - x


@pytest.mark.parametrize("name", ["softmax", "sub"])
def test_a_float_op_that_differs_is_a_row_without_a_name(name: str) -> None:
    x = torch.linspace(-1, 1, 32).reshape(4, 8)
    parameters = extract_parameters(Floats(), engine="qnnpack", isa="vnni")
    golden = golden_vectors(Floats(), x)
    assert judge(parameters, golden).exact
    found = judge(parameters, {**golden.values, name: golden.values[name] * 1.25})
    assert [op.name for op in found.ops if not op.equal] == [name]
    assert (found.verdict, named(found, name)) == ("not ok", [])


@pytest.mark.parametrize("engine", ["qnnpack", "onednn"])
def test_bytes_read_as_the_other_dtype_blame_the_dump(engine: str) -> None:
    parameters, golden = dumped("PlainCNN", engine)
    name = next(op.name for op in parameters if op.op.startswith("conv"))
    found = judge(parameters, {**golden.values, name: golden.values[name].view(torch.int8)})
    assert named(found, name) == [("output-bytes-reread",)]
    assert [op.name for op in found.ops if not op.equal] == [name]  # no op behind it is blamed


@pytest.mark.parametrize("code", [0, 7, "zero point"])
def test_a_buffer_that_was_never_written_is_said_and_no_pair_is_blamed(code: Any) -> None:
    parameters, golden = dumped("PlainCNN")
    op = [op for op in parameters if op.op == "linear"][-1]
    assert op.output is not None
    value = int(op.output.zero_points[0]) if code == "zero point" else code
    codes = torch.full_like(golden.values[op.name], value)
    row = judge(parameters, {**golden.values, op.name: codes}).op(op.name)
    assert f"the device gives {value} everywhere" in list(row.sentences())[1]
    assert all(len(e.deviations) == 1 for e in row.named)
    assert Judgement.from_json(Judgement("r", (row,)).to_json()).ops[0].constant == value

"""Encodings of AIMET and QNN: written, read back, and held against what a compiler took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxqfix.errors import DataError, OptionError
from fxqfix.export import encodings, read_encodings
from tests.engines.nets import NETS
from tests.test_judge import dumped

VERSIONS = ("0.6.1", "1.0.0")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("engine", ["qnnpack", "fbgemm"])
@pytest.mark.parametrize("name", NETS)
def test_what_is_written_is_read_back(name: str, engine: str, version: str, tmp_path: Path) -> None:
    for prepared in (False, True):
        parameters, _ = dumped(name, engine, prepared)
        text = encodings(parameters, version)
        path = tmp_path / "model.encodings"
        path.write_text(text)
        for given in (text, path):
            found = read_encodings(given)
            assert found.version == version
            assert found.differences(parameters) == ()
        for op in parameters:
            if op.output is not None:  # real values of the ends of the range are the same
                grid, mine = found.activations[op.name], op.output
                low = (mine.quant_min - mine.zero_point) * mine.scale
                assert (0 - grid.zero_point) * grid.scale == low
                high = (mine.quant_max - mine.zero_point) * mine.scale
                assert (grid.quant_max - grid.zero_point) * grid.scale == high


def test_a_declared_range_of_7_bits_is_7_bits() -> None:
    parameters, _ = dumped("PlainCNN", "fbgemm", True)
    found = json.loads(encodings(parameters))["activation_encodings"]["body_0_0"]
    assert [e["bitwidth"] for e in found] == [7]


@pytest.mark.parametrize("version", VERSIONS)
def test_what_a_compiler_changed_is_said(version: str) -> None:
    parameters, _ = dumped("PlainCNN", "fbgemm")
    data = json.loads(encodings(parameters, version))
    activations, weights = data["activation_encodings"], data["param_encodings"]
    if version == "0.6.1":
        activations["body_0_0"][0]["scale"] *= 1.001
        del activations["body_1"]
        weights["head.weight"][3]["offset"] += 1
    else:
        by_name = {e["name"]: e for e in (*activations, *weights)}
        by_name["body_0_0"]["scale"][0] *= 1.001
        activations.remove(by_name["body_1"])
        by_name["head.weight"]["offset"][3] += 1
    found = read_encodings(json.dumps(data)).differences(parameters)
    assert len(found) == 3
    assert found[0].startswith("activation body_0_0: ")
    assert found[1] == "activation body_1 is missing"
    assert found[2].startswith("weight head: ")


@pytest.mark.parametrize(
    "text",
    [
        *("{", "{}", '{"version": "9"}', '{"version": "1.0.0"}', '{"version": "0.6.1", "x": []}'),
        '{"version": "1.0.0", "activation_encodings": [1], "param_encodings": []}',
        '{"version": "0.6.1", "activation_encodings": {"a": []}, "param_encodings": {}}',
    ],
)
def test_what_is_none_is_an_error(text: str) -> None:
    with pytest.raises(DataError, match="can't be read"):
        read_encodings(text)


def test_no_such_file_or_version() -> None:
    with pytest.raises(DataError, match="can't be read"):
        read_encodings("no_such_file.encodings")
    with pytest.raises(OptionError, match="no such version"):
        encodings(dumped("PlainCNN")[0], "2")

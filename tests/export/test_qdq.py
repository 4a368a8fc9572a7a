"""The ONNX QDQ model: ONNX Runtime computes the decomposed graph; its grids read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxqfix.errors import DataError, UnsupportedError
from fxqfix.export import qdq_grids, qdq_model
from tests.test_judge import dumped

onnx = pytest.importorskip("onnx", reason='the extra "onnx" is not installed')
NETS = ("PlainCNN", "Residual", "Inception", "Mobile")


@pytest.mark.parametrize("engine", ["qnnpack", "fbgemm"])
@pytest.mark.parametrize("name", NETS)
def test_its_grids_read_back(name: str, engine: str, tmp_path: Path) -> None:
    for prepared in (False, True):
        parameters, golden = dumped(name, engine, prepared)
        model = qdq_model(parameters, {"x": tuple(golden.values["x"].shape)})
        onnx.save(model, tmp_path / "model.onnx")
        found = qdq_grids(onnx.load(tmp_path / "model.onnx"))
        for op in parameters:
            if op.output is not None:
                grid = found[op.name]
                scale = torch.tensor(op.output.scale, dtype=torch.float32)
                assert grid.scale == scale.item()
                assert grid.zero_point == op.output.zero_point
                assert (grid.quant_min, grid.quant_max) == op.limits


@pytest.mark.parametrize("name", NETS)
def test_onnx_runtime_computes_the_decomposed_graph(name: str) -> None:
    runtime = pytest.importorskip("onnxruntime", reason='the extra "onnx" is not installed')
    parameters, golden = dumped(name, "fbgemm", True)
    model = qdq_model(parameters, {"x": tuple(golden.values["x"].shape)})
    options = runtime.SessionOptions()
    # Without its int8 kernels, whose roundings are others.
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(model.SerializeToString(), options)
    found = torch.from_numpy(session.run(None, {"x": golden.values["x"].numpy()})[0])
    due = golden.values[golden.outputs[0]]
    scale = next(op.output.scale for op in reversed(parameters.ops) if op.output is not None)
    codes = ((found - due) / scale).round()
    assert int((codes != 0).sum()) <= due.numel() // 20  # reason: float32 sums in another order
    assert int(codes.abs().max()) <= 1


def test_what_it_has_no_form_for_is_refused() -> None:
    parameters, _ = dumped("PlainCNN")
    with pytest.raises(DataError, match="shape of an input"):
        qdq_model(parameters, {})
    other, golden = dumped("UNet")
    with pytest.raises(UnsupportedError, match="no ONNX form"):
        qdq_model(other, {"x": tuple(golden.values["x"].shape)})

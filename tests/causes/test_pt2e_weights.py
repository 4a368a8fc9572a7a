"""Weights of the PT2E flow whose grids are no plain ones: by block, and tables of embeddings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fxqfix
from fxqfix._torch import quiet

pytest.importorskip("torchao")

with quiet():
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.pt2e._affine_quantization import AffineQuantizedMinMaxObserver
    from torchao.quantization.quant_primitives import MappingType

from tests.dialects.pt2e_nets import (
    _xnnpack_quantizer,
    convert_pt2e,
    embedding_quantizer,
    prepare_pt2e,
    pt2e,
    tq,
)
from tests.faults.injectors import half_dequantize


class _Blockwise(tq.Quantizer):  # type: ignore[misc]  # torchao has no types
    """Linears with weights in groups, and activations per tensor or not at all."""

    def __init__(self, group: int, mapping: Any, values: bool) -> None:
        super().__init__()
        spec, scheme = tq.QuantizationSpec, torch.per_tensor_affine
        self.values = spec(torch.int8, pt2e.HistogramObserver, -128, 127, scheme)
        observer = AffineQuantizedMinMaxObserver.with_args(
            mapping_type=mapping,
            target_dtype=torch.int8,
            granularity=PerGroup(group),
            quant_min=-8,
            quant_max=7,
            eps=2**-12,
        )
        self.weights, self.observed = spec(torch.int8, observer, -8, 7), values

    def annotate(self, model: Any) -> Any:
        for node in model.graph.nodes:
            if node.op == "call_function" and "linear" in node.name:
                node.meta["quantization_annotation"] = tq.QuantizationAnnotation(
                    {node.args[0]: self.values, node.args[1]: self.weights},
                    self.values,
                    _annotated=True,
                )
        return model

    def validate(self, model: Any) -> None:
        """Takes anything."""


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    ("group", "mapping"), [(8, MappingType.SYMMETRIC), (16, MappingType.ASYMMETRIC)]
)
def test_weights_by_block_are_read_in_float(group: int, mapping: Any, frozen: bool) -> None:
    torch.manual_seed(0)
    x, net = torch.randn(16, 32), nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    with quiet():
        program = torch.export.export(net.eval(), (x,)).module()
        prepared = prepare_pt2e(program, _Blockwise(group, mapping, values=True))
        prepared(x)
        converted = convert_pt2e(copy.deepcopy(prepared))
    model = fxqfix.freeze(prepared) if frozen else prepared
    report = fxqfix.compare(model, converted, [x])
    assert report.unexplained == 0
    row = report.row("linear")
    assert row.causes["observer-only"] > 100
    assert "a weight with grids by block stays in float" in row.evidence["observer-only"]
    assert set(report.causes) <= {"observer-only", "upstream", "rounding"}


@pytest.mark.parametrize("net", ["two tables", "table alone"])
def test_tables_with_float_zero_points(net: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Embedding(20, 8), nn.Embedding(30, 8), nn.Linear(8, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            if net == "table alone":
                return self.a(ids)
            return self.fc(self.a(ids) + self.b(ids))

    torch.manual_seed(0)
    ids, own = torch.arange(20).reshape(2, 10), _xnnpack_quantizer
    with quiet():
        xnnpack = own.XNNPACKQuantizer().set_global(own.get_symmetric_quantization_config())
        quantizers = [embedding_quantizer.EmbeddingQuantizer(), xnnpack]
        program = torch.export.export(Two().eval(), (ids,)).module()
        prepared = prepare_pt2e(program, tq.ComposableQuantizer(quantizers))
        prepared(ids)
        converted = convert_pt2e(copy.deepcopy(prepared))
    report = fxqfix.compare(fxqfix.freeze(prepared), converted, [ids])
    assert report.unexplained == 0
    tables = [row for row in report.rows if row.kind == "weight" and row.op == "embedding"]
    assert tables
    assert all(row.causes["zero-point-cut"] > 10 for row in tables)
    assert set(report.causes) <= {"zero-point-cut", "rounding", "upstream"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_codes_that_it_does_not_hold(dtype: torch.dtype) -> None:
    fault = half_dequantize(dtype)
    report = fxqfix.compare(fault.prepared, fault.converted, fault.batches)
    assert set(report.causes) == {"half-dequantize", "upstream"}
    assert report.causes["half-dequantize"] > 300
    healthy = fxqfix.compare(fault.prepared, fxqfix.to_decomposed(fault.prepared), fault.batches)
    assert healthy.exact

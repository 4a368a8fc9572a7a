"""Parts of the routes that need no deployment: axes, names, paths, signs of codes."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers the ops
from torch import fx, nn
from torch.export import Dim

from fxqfix.dialects import Reading
from fxqfix.errors import DataError, OptionError, RouteError
from fxqfix.qparams import QParams
from fxqfix.routes import _registry, executorch
from fxqfix.routes._file import _within
from fxqfix.routes._xnnpack import _along, _signed_point
from fxqfix.routes.export import _any_size, _batched, axes_of, fixed_sizes, open_axes
from fxqfix.routes.onnxruntime import _on_integers, _opset

OPS = torch.ops.quantized_decomposed
migrate: Any = importlib.import_module("fxqfix.routes.migrate")  # the package's name is the call


def reading(*names: str) -> Reading:
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in names]
    graph.output(nodes)
    return Reading(fx.GraphModule(nn.Module(), graph), "decomposed", ())


def test_axes_stand_in_the_order_of_the_inputs() -> None:
    two, size = reading("x", "y"), Dim("n")
    assert open_axes(two, None, True) is True
    assert open_axes(two, None, False) is False
    assert open_axes(two, ({0: size},), False) == ({0: size}, None)
    assert open_axes(two, ({0: size}, {1: size}), False) == ({0: size}, {1: size})
    assert open_axes(two, {"y": {1: size}}, False) == (None, {1: size})


@pytest.mark.parametrize("given", [(), {}, (None, None, None), {"z": None}, {"x": None, "z": None}])
def test_axes_of_no_input_are_refused(given: Any) -> None:
    with pytest.raises(OptionError, match="does not fit the model's inputs"):
        open_axes(reading("x", "y"), given, False)


@pytest.mark.parametrize(
    ("given", "axes"),
    [
        (None, set()),
        ({0: Dim.DYNAMIC, 1: None, 2: Dim.STATIC}, {0}),
        ((None, Dim.AUTO), {1}),
        ([Dim("n")], {0}),
        ({}, set()),
    ],
)
def test_which_axes_are_open(given: Any, axes: set[int]) -> None:
    assert axes_of(given) == axes


def test_sizes_that_a_form_is_made_for() -> None:
    batch = torch.ones(2, 3), torch.ones(4)
    assert fixed_sizes(batch, False) == [(2, 3), (4,)]
    assert fixed_sizes(batch, True) == [(3,), ()]
    assert fixed_sizes(batch, ({1: Dim.AUTO}, None)) == [[2], [4]]
    assert fixed_sizes(batch, (None,)) == []
    assert fixed_sizes((torch.tensor(1.0),), True) == [()]


def test_which_values_have_a_batch() -> None:
    assert _batched(torch.ones(1))
    assert not _batched(torch.tensor(1.0))
    assert not _batched(3)
    assert _any_size(torch.ones(2, 3)) == {0: Dim.AUTO, 1: Dim.AUTO}
    assert _any_size(3) is None


@pytest.mark.parametrize(
    ("dynamic", "opens"),
    [(True, True), (False, False), (({0: Dim.AUTO},), True), (({1: Dim.AUTO}, None), False),
     ((None, [Dim.AUTO]), True)],
)  # fmt: skip
def test_whether_a_file_takes_any_batch(dynamic: Any, opens: bool) -> None:
    assert migrate._opens_batch(dynamic) == opens


def test_paths_of_files(tmp_path: Path) -> None:
    good = tmp_path / "model.pt2"
    assert migrate.check(good, "export") == (good, _registry.find("export"))
    (tmp_path / "folder.pt2").mkdir()
    for path, why in (
        (tmp_path / "model.pt", "the suffix is '.pt', not '.pt2'"),
        (tmp_path / "none" / "model.pt2", "there is no folder"),
        (tmp_path / "folder.pt2", "it is a folder"),
    ):
        with pytest.raises(DataError, match=why):
            migrate.check(path, "export")
    with pytest.raises(RouteError, match="does not start from a decomposed graph"):
        migrate.check(good, "int8:fbgemm")


def test_an_opset_is_for_onnx_routes() -> None:
    plain, onnx = _registry.find("export"), _registry.find("onnxruntime")
    assert _registry.with_opset(plain, None) is plain
    assert _registry.with_opset(onnx, 20).deploy.keywords["opset"] == 20  # type: ignore[union-attr]
    for name in ("export", "int8:fbgemm"):
        with pytest.raises(OptionError, match="has no opset"):
            _registry.with_opset(_registry.find(name), 20)
    for bad in ("17", True, -1, 2.5):
        with pytest.raises(OptionError, match="opset is a number"):
            _registry.with_opset(onnx, bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "integers"),
    [("QLinearConv", True), ("QGemm", True), ("ConvInteger", True),
     ("DynamicQuantizeLinear", False),
     ("Conv", False), ("QuantizeLinear", False)],
)  # fmt: skip
def test_which_onnx_ops_compute_on_integers(kind: str, integers: bool) -> None:
    assert _on_integers(kind) == integers


@pytest.mark.parametrize(
    ("dtypes", "opset"),
    [((torch.uint8,), None), ((torch.uint8, torch.int16), 21), ((torch.int32,), None), ((), None)],
)
def test_the_opset_that_16_bits_need(dtypes: tuple[torch.dtype, ...], opset: int | None) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for dtype in dtypes:
        graph.call_function(OPS.quantize_per_tensor.default, (x, 0.5, 0, 0, 9, dtype))
    program: Any = SimpleNamespace(graph=graph)
    assert _opset(program) == opset


@pytest.mark.parametrize(
    ("path", "within"), [("a", True), ("a.b", True), ("ab", False), ("b.a", False), ("", False)]
)
def test_modules_within_others(path: str, within: bool) -> None:
    assert _within(path, {"a", "c"}) == within


@pytest.mark.parametrize(
    ("dtype", "point", "signed"),
    [(torch.uint8, 128, 0), (torch.uint8, 3, -125), (torch.int8, 3, 3), (torch.int8, -128, -128)],
)
def test_zero_points_of_signed_codes(dtype: torch.dtype, point: int, signed: int) -> None:
    limits = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    assert _signed_point(QParams(0.5, point, *limits, dtype)) == signed


def test_a_multiplier_stands_along_the_channels() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    conv = graph.call_function(torch.ops.aten.conv2d.default, (x, x))
    linear = graph.call_function(torch.ops.aten.linear.default, (x, x))
    three = torch.ones(3)
    assert _along(three, torch.ones(2, 3, 4, 5), conv, {}).shape == (1, 3, 1, 1)
    assert _along(three, torch.ones(3), conv, {}).shape == (3,)
    assert _along(three, torch.ones(2, 3), linear, {}) is three
    one = torch.ones(1)
    assert _along(one, torch.ones(2, 3, 4, 5), conv, {}) is one


def test_unsigned_codes_go_in_and_out_as_signed_ones() -> None:
    signs = executorch._Signs((True, False), (False, True))
    codes = torch.tensor([0, 3, 255], dtype=torch.uint8)
    taken = signs.taken((codes, codes, codes))
    assert taken[0].tolist() == [-128, -125, 127]
    assert taken[0].dtype == torch.int8
    assert taken[1] is codes
    assert len(signs.taken((codes,))) == 1  # the other one has a default
    plain, back = signs.returned([codes, taken[0]])
    assert plain is codes
    assert torch.equal(back, codes)
    assert back.dtype == torch.uint8
    with pytest.raises(ValueError, match="argument 2"):
        signs.returned([codes])


def test_which_codes_of_a_graph_are_unsigned() -> None:
    graph = fx.Graph()
    x, codes, signed = (graph.placeholder(n) for n in ("x", "codes", "signed"))
    grid = 0.5, 0, 0, 255, torch.uint8
    small = 0.5, 0, -128, 127, torch.int8
    quantized = graph.call_function(OPS.quantize_per_tensor.default, (x, *grid))
    value = graph.call_function(OPS.dequantize_per_tensor.default, (codes, *grid))
    graph.call_function(OPS.dequantize_per_tensor.default, (signed, *small))
    graph.output((quantized, value))
    found = executorch._Signs.of(fx.GraphModule(nn.Module(), graph))
    assert found == executorch._Signs((False, True, False), (True, False))


@pytest.mark.parametrize(
    ("before", "act", "others", "fused"),
    [
        ("aten.convolution.default", "aten.relu.default", 0, True),
        ("aten.linear.default", "aten.hardtanh.default", 0, True),
        ("aten.add.Tensor", "aten.relu.default", 0, True),
        ("aten.add.Tensor", "aten.relu.default", 1, False),  # read elsewhere
        ("aten.mul.Tensor", "aten.relu.default", 0, False),
        ("aten.add.Tensor", "aten.sigmoid.default", 0, False),
    ],
)
def test_activations_that_are_part_of_a_kernel(
    before: str, act: str, others: int, fused: bool
) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(_edge(before), (x, x))
    node = graph.call_function(_edge(act), (first,))
    for _ in range(others):
        graph.call_function(torch.neg, (first,))

    assert executorch._is_fused(node) == fused


def _edge(name: str) -> Any:
    """An op of executorch's edge dialect, which is known by its name."""

    def op(*_: Any) -> None: ...

    op.__name__ = name
    return op


def test_notes_of_what_was_lowered() -> None:
    none = executorch._Lowered(Counter(), Counter(), Counter(), 0)
    assert list(none.notes(())) == []
    some = executorch._Lowered(Counter(add=1), Counter(mul=2), Counter(gelu=1, neg=3), 4)
    assert list(some.notes(("a", "b"))) == [
        "suited to XNNPACK first: pass suit-xnnpack, 2 edits",
        "4 activations are quantized at run time: XNNPACK chooses a grid per row, the graph one "
        "per tensor",
        "XNNPACK computes in float32: 2 mul",
        "left to executorch's portable kernels: 1 gelu, 3 neg",
    ]


def test_codes_that_are_read_as_floats() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    value = graph.call_function(
        OPS.dequantize_per_tensor.default, (x, 0.5, 0, -128, 127, torch.int8)
    )
    graph.output((value,))
    module = fx.GraphModule(nn.Module(), graph)
    executorch._check(module)
    value.meta[executorch._IMPLICIT] = True
    with pytest.raises(RouteError, match="reads codes as floats"):
        executorch._check(module)

"""What a lapse gives, against sums of integers written out here; all scales are powers of two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers the ops
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxqfix.engines._lost import Lost, Walk
from fxqfix.routes._lapses import _quantized, lapsed
from fxqfix.routes._wide import Wide

OPS = torch.ops.quantized_decomposed
ATEN = torch.ops.aten
STEP, POINT = 2.0**-4, 7  # of the input
UNIT, LIFT = 2.0**-6, 3  # of the weight


class Region:
    """An op of dequantized codes, as a decomposed graph has it."""

    def __init__(
        self,
        op: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *options: Any,
        scales: list[float] | None = None,
        axis: int = 0,
        point: int = LIFT,
    ) -> None:
        root, graph = nn.Module(), fx.Graph()
        root.register_buffer("w", weight)
        limits = torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max, x.dtype
        given = graph.placeholder("x")
        value = graph.call_function(
            OPS.dequantize_per_tensor.default, (given, STEP, POINT, *limits)
        )
        held = graph.get_attr("w")
        kernel: Any = held
        if scales is not None:
            root.register_buffer("scales", torch.tensor(scales))
            root.register_buffer("points", torch.full((len(scales),), point))
            grids = graph.get_attr("scales"), graph.get_attr("points")
            kernel = graph.call_function(
                OPS.dequantize_per_channel.default, (held, *grids, axis, -128, 127, torch.int8)
            )
        elif not weight.is_floating_point():
            kernel = graph.call_function(
                OPS.dequantize_per_tensor.default, (held, UNIT, point, -128, 127, torch.int8)
            )
        args: list[Any] = [value, kernel]
        if bias is not None:
            root.register_buffer("b", bias)
            args.append(graph.get_attr("b"))
        elif options:
            args.append(None)
        self.node = graph.call_function(op, (*args, *options))
        graph.output(self.node)
        self.module = fx.GraphModule(root, graph)
        self.interpreter = Wide(self.module, garbage_collect_values=False)
        self.own = self.interpreter.run(x)

    def __call__(self, *names: str) -> Tensor | None:
        return lapsed(self.interpreter, self.node, names)


def codes(*shape: int, dtype: torch.dtype = torch.uint8, seed: int = 0) -> Tensor:
    limits = torch.iinfo(dtype)
    made = torch.Generator().manual_seed(seed)
    return torch.randint(limits.min, limits.max + 1, shape, generator=made).to(dtype)


def sums(x: Tensor, weight: Tensor, point: int = LIFT) -> tuple[Tensor, Tensor]:
    """Steps from the zero points, exact."""
    return x.double() - POINT, weight.double() - point


X, W = codes(2, 4, 5, 5), codes(6, 4, 3, 3, dtype=torch.int8, seed=1)
BIAS = torch.linspace(-1, 1, 6)


def test_no_lapse_is_the_graphs_own_value() -> None:
    region = Region(ATEN.conv2d.default, X, W, BIAS)
    assert torch.equal(region(), region.own)
    steps = F.conv2d(*sums(X, W))
    assert torch.equal(region(), steps * STEP * UNIT + BIAS.double().reshape(-1, 1, 1))


@pytest.mark.parametrize("scales", [None, [UNIT * 2**i for i in range(6)]])
def test_the_bias_is_an_int32_in_steps_of_the_accumulator(scales: list[float] | None) -> None:
    region = Region(ATEN.conv2d.default, X, W, BIAS, scales=scales)
    steps = STEP * torch.tensor(scales or [UNIT] * 6).double().reshape(-1, 1, 1)
    rounded = torch.round(BIAS.double().reshape(-1, 1, 1) / steps)
    wanted = (F.conv2d(*sums(X, W)) + rounded) * steps
    assert torch.equal(region("bias-int32"), wanted)
    assert not torch.equal(wanted, region.own)


def test_the_steps_of_a_transposed_convolution_in_groups() -> None:
    """A group's channels have the scales, again in each group."""
    weight, scales = codes(4, 3, 3, 3, dtype=torch.int8, seed=2), [UNIT, 2 * UNIT, 4 * UNIT]
    options: tuple[Any, ...] = ([1, 1], [0, 0], [0, 0], 2, [1, 1])
    region = Region(ATEN.conv_transpose2d.input, X, weight, BIAS, *options, scales=scales, axis=1)
    steps = STEP * torch.tensor(scales * 2).double().reshape(-1, 1, 1)
    rounded = torch.round(BIAS.double().reshape(-1, 1, 1) / steps)
    wanted = (F.conv_transpose2d(*sums(X, weight), groups=2)) * steps + rounded * steps
    assert torch.equal(region("bias-int32"), wanted)
    # One scale for all: one step.
    single = Region(ATEN.conv_transpose2d.input, X, weight, BIAS, *options)
    unit = STEP * UNIT
    rounded = torch.round(BIAS.double().reshape(-1, 1, 1) / unit)
    assert torch.equal(
        single("bias-int32"), (F.conv_transpose2d(*sums(X, weight), groups=2) + rounded) * unit
    )
    # Pairs of a transposed kernel are not known: nothing is taken off.
    assert torch.equal(single("int16-saturation"), single.own)


@pytest.mark.parametrize("bias", [BIAS, None])
def test_the_weights_zero_point_is_taken_for_0(bias: Tensor | None) -> None:
    region = Region(ATEN.conv2d.default, X, W, bias)
    wanted = F.conv2d(*sums(X, W, 0)) * STEP * UNIT
    if bias is not None:
        wanted += bias.double().reshape(-1, 1, 1)
    assert torch.equal(region("weight-zero-point"), wanted)
    assert not torch.equal(wanted, region.own)


def test_a_float_weight_becomes_int8() -> None:
    # The scale is a power of two: 255 steps from -1 to 1.
    weight = torch.linspace(-1.0, 1.0, 2 * 4 * 9).reshape(2, 4, 3, 3) * (255 / 256)
    region = Region(ATEN.conv2d.default, X, weight, None)
    scale = 2.0**-7
    points = torch.round(torch.tensor(-128 + 255 / 2))
    found = (torch.round(weight / scale) + points).clamp(-128, 127)
    wanted = F.conv2d(X.double() - POINT, (found.double() - points) * scale) * STEP
    assert torch.equal(region("weight-int8"), wanted)
    assert not torch.equal(wanted, region.own)
    assert region("bias-int32") is None  # not asked for: the weight has no grid
    # A weight that is computed from one in the graph is one too.
    node = region.node.args[1]
    with region.module.graph.inserting_after(node):
        new = region.module.graph.call_function(torch.neg, (node,))
    region.node.args = (region.node.args[0], new)
    region.interpreter.env[new] = -region.interpreter.env[node]
    negative = region("weight-int8")
    assert negative is not None
    assert torch.equal(negative.sign(), -wanted.sign())


def test_a_weight_that_is_an_input_is_none() -> None:
    """Its values are not known before the run."""
    region = Region(ATEN.conv2d.default, X, W.float(), None)
    with region.module.graph.inserting_before(region.node):
        given = region.module.graph.placeholder("weight")
    region.node.args = (region.node.args[0], given)
    assert region("weight-int8") is None


@pytest.mark.parametrize(
    ("weight", "scale", "point", "codes_"),
    [
        ([0.0, 255.0], 1.0, -128, [-128, 127]),
        ([1.0, 255.0], 1.0, -128, [-127, 127]),  # zero is on the grid
        ([-255.0, -1.0], 1.0, 127, [-128, 126]),
        ([-127.0, 128.0], 1.0, -1, [-128, 127]),
        ([-254.0, 256.0], 2.0, -1, [-128, 127]),
        ([0.0, 0.0], 1.0, -128, [-128, -128]),  # no range: a scale all the same
    ],
)
def test_onnx_runtimes_grid(
    weight: list[float], scale: float, point: int, codes_: list[int]
) -> None:
    found, grid = _quantized(torch.tensor(weight))
    assert (grid.scale, grid.zero_point, found.tolist()) == (scale, point, codes_)
    assert (grid.quant_min, grid.quant_max, grid.dtype) == (-128, 127, torch.int8)
    assert found.dtype == torch.int8


LOUD = codes(2, 4, 5, 5, seed=4).clamp(min=200)
HEAVY = codes(6, 4, 3, 3, dtype=torch.int8, seed=3).clamp(min=100)


@pytest.mark.parametrize(
    ("options", "walk"),
    [
        ((), Walk((1, 1), (0, 0), (1, 1))),
        (([2, 2], [1, 1], [1, 1]), Walk((2, 2), (1, 1), (1, 1))),
        (([1, 1], [0, 0], [2, 2]), Walk((1, 1), (0, 0), (2, 2))),
    ],
)
@pytest.mark.parametrize("way", ["", "-by-channel"])
def test_pairs_that_saturate_are_taken_off(options: Any, walk: Walk, way: str) -> None:
    region = Region(ATEN.conv2d.default, LOUD, HEAVY, None, *options)
    lost = Lost(HEAVY, POINT, 0, walk, "channel" if way else "flat")(LOUD)
    assert int(lost.sum()) > 0
    wanted = region.own - lost * (STEP * UNIT)
    assert torch.equal(region(f"int16-saturation{way}"), wanted)


def test_which_pairs_of_a_linear_saturate() -> None:
    x = torch.full((3, 301), 255, dtype=torch.uint8)  # so many that the kernel takes them in halves
    weight = torch.where(codes(2, 301, seed=5) > 127, 120, -120).to(torch.int8)
    region = Region(ATEN.linear.default, x, weight, None)
    found = []
    for name, order in (("int16-saturation", "flat"), ("int16-saturation-by-channel", "halves")):
        lost = Lost(weight, POINT, 0, Walk(), order)(x)
        found.append(int(lost.sum()))
        assert torch.equal(region(name), region.own - lost * (STEP * UNIT))
    assert found[0] != found[1]


def test_groups_walk_as_they_are() -> None:
    weight = HEAVY[:, :2].contiguous()
    region = Region(ATEN.conv2d.default, LOUD, weight, None, [1, 1], [0, 0], [1, 1], 2)
    walk = Walk((1, 1), (0, 0), (1, 1), 2)
    lost = Lost(weight, POINT, 0, walk, "flat")(LOUD)
    assert int(lost.sum()) > 0
    assert torch.equal(region("int16-saturation"), region.own - lost * (STEP * UNIT))


def test_what_does_not_saturate() -> None:
    """One channel per output, and codes that are signed: other kernels run these."""
    one = Region(
        ATEN.conv2d.default, LOUD, HEAVY[:4, :1].contiguous(), None, [1, 1], [0, 0], [1, 1], 4
    )
    assert torch.equal(one("int16-saturation"), one.own)
    x = torch.full((1, 4, 5, 5), 127, dtype=torch.int8)
    signed = Region(ATEN.conv2d.default, x, HEAVY, None)
    assert torch.equal(signed("int16-saturation"), signed.own)
    column = Region(ATEN.linear.default, LOUD[0, :1, 0, :1], HEAVY[:, :1, 0, 0], None)
    assert column("int16-saturation") is not None  # a linear of one input is no depthwise one


@pytest.mark.parametrize(
    ("size", "dilation", "sides"), [(3, 1, 1), (3, 2, 2), (5, 1, 2), (2, 2, 1), (1, 1, 0)]
)
def test_a_padding_in_words(size: int, dilation: int, sides: int) -> None:
    weight = codes(6, 4, size, size, dtype=torch.int8, seed=3).clamp(min=100)
    options = ([1, 1], "same", [dilation] * 2)
    region = Region(ATEN.conv2d.padding, LOUD, weight, None, *options)
    walk = Walk((1, 1), (sides, sides), (dilation, dilation))
    lost = Lost(weight, POINT, 0, walk, "flat")(LOUD)
    assert torch.equal(region("int16-saturation"), region.own - lost * (STEP * UNIT))
    valid = Region(ATEN.conv2d.padding, LOUD, weight, None, [1, 1], "valid", [1, 1])
    lost = Lost(weight, POINT, 0, Walk((1, 1), (0, 0), (1, 1)), "flat")(LOUD)
    assert torch.equal(valid("int16-saturation"), valid.own - lost * (STEP * UNIT))


def test_a_padding_that_is_wider_on_one_side_is_not_walked() -> None:
    region = Region(ATEN.conv2d.padding, LOUD, HEAVY[..., :2, :2], None, [1, 1], "same", [1, 1])
    assert torch.equal(region("int16-saturation"), region.own)


def test_options_that_are_one_number_for_all_axes() -> None:
    region = Region(F.conv2d, LOUD, HEAVY, None, 2, 1, 1)
    lost = Lost(HEAVY, POINT, 0, Walk((2, 2), (1, 1), (1, 1)), "flat")(LOUD)
    assert torch.equal(region("int16-saturation"), region.own - lost * (STEP * UNIT))
    x, weight = LOUD[..., 0], HEAVY[..., 0]
    line = Region(F.conv1d, x, weight, None, 2, 1, 1)
    lost = Lost(weight, POINT, 0, Walk((2,), (1,), (1,)), "flat")(x)
    assert torch.equal(line("int16-saturation"), line.own - lost * (STEP * UNIT))


@pytest.mark.parametrize(
    "op", [F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d]
)
def test_any_number_of_axes(op: Any) -> None:
    dims = int(op.__name__[-2])
    x, weight = codes(2, 4, *[4] * dims), codes(4, 4, *[2] * dims, dtype=torch.int8, seed=1)
    region = Region(op, x, weight, BIAS[:4])
    bias = BIAS[:4].double().reshape(-1, *[1] * dims)
    wanted = op(*sums(x, weight, 0)) * STEP * UNIT + bias
    assert torch.equal(region("weight-zero-point"), wanted)


def test_weights_that_are_not_known_before_the_run() -> None:
    """Codes that are an input, and a grid that is chosen at run time."""
    region = Region(ATEN.conv2d.default, X, W, None)
    kernel = region.node.args[1]
    with region.module.graph.inserting_before(kernel):
        given = region.module.graph.placeholder("weight")
    kernel.args = (given, *kernel.args[1:])
    assert region("weight-zero-point") is None
    dynamic = Region(ATEN.conv2d.default, X, W, None)
    kernel = dynamic.node.args[1]
    with dynamic.module.graph.inserting_before(kernel):
        scale = dynamic.module.graph.placeholder("scale")
    kernel.target = OPS.dequantize_per_tensor.tensor
    kernel.args = (kernel.args[0], scale, scale, *kernel.args[3:])
    assert dynamic("weight-zero-point") is None


def test_what_no_lapse_speaks_of() -> None:
    region = Region(ATEN.conv2d.default, X, W, BIAS)
    names = ("weight-int8", "bias-int32", "weight-zero-point", "int16-saturation")
    for node in region.module.graph.nodes:
        if node is not region.node:
            assert lapsed(region.interpreter, node, names) is None
    # A matmul of two values, and a convolution of what is no code.
    matmul = Region(ATEN.matmul.default, X[0, 0], W[:5, :1, 0, :1].reshape(5, 1), None)
    assert matmul(*names) is None
    plain = Region(ATEN.conv2d.default, X, W, None)
    with plain.module.graph.inserting_before(plain.node):
        relu = plain.module.graph.call_function(torch.relu, (plain.node.args[0],))
    plain.node.args = (relu, *plain.node.args[1:])
    assert plain(*names) is None


def test_an_input_with_a_grid_per_channel_is_not_judged() -> None:
    region = Region(ATEN.conv2d.default, X, W, None, scales=[UNIT] * 6)
    kernel = region.node.args[1]
    region.node.args = (kernel, kernel)  # its input is per channel now
    assert region("bias-int32", "weight-zero-point") is None

"""The op table: one row per op family, with its spellings in every dialect.

A row tells how an op is spelled by each flow, which qparams its output has, and which module or
functional form computes it in float. Readers, rewrites, coverage listing and tests read this
table; to add an op is to add a row, and the tests grow by themselves.

Spellings are dotted names, resolved when first needed, so that importing fxqfix needs neither
torch.ao nor torchao: ``torch.nn.Conv2d`` (module class), ``torch.relu`` (function), ``.relu``
(method), ``torch.ops.quantized.add`` (operator). A spelling that this torch lacks is skipped.

Output rules (whose qparams the output of an int8 kernel has):

* ``own``: its own scale and zero point, held by the node's arguments or module. A float spelling
  that runs on a quantized tensor has neither and keeps its input's, as torch's kernels do.
* ``input``: the first input's; the values are computed anew (pools, clamps, cat).
* ``shape``: the first input's codes, moved or picked, never changed.
* ``fixed``: given by the op (sigmoid: 1/256, 0).
* ``scalar``: the first input's codes; scale and zero point move instead.
* ``tuple``: several values, each with qparams of its own.
* ``float``: not quantized (embedding, dynamic ops).
* ``none``: no tensor (sizes and other questions).

Value rules (where values lie, while input and output are on one grid; "" promises nothing):

* ``picked``: each is one of the inputs' (max pools, cat; so is whatever has the output rule
  ``shape``).
* ``between``: between the inputs' lowest and highest, zeros of a padding included (averages, and
  interpolation as far as quantized kernels do it: not bicubic).
* ``to-zero``: none is further from zero than its input, on the same side (relu, and hardtanh
  between bounds with zero in them).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import fx, nn

from fxqfix._torch import decomposed, resolve
from fxqfix.inserted import FloatIsland, Functional, InMemoryOrder
from fxqfix.registry import Registry

__all__ = ["OPS", "TABLE", "Match", "OpSpec", "match", "match_node", "parts", "spellings"]


@dataclass(frozen=True)
class OpSpec:
    """One op family.

    Attributes:
        key: The row's name, e.g. "conv2d".
        family: "weighted", "element-wise", "pool", "activation", "normalization", "shape",
            "recurrent", "attention", "embedding" or "boundary".
        spelled: Float spellings; they run on float tensors (prepared, reference, decomposed) and,
            where the engine has a kernel behind the same name, on quantized tensors too.
        spelled_relu: The same, fused with a relu.
        int8: Spellings that run on quantized tensors only.
        int8_relu: The same, fused with a relu.
        dynamic: Spellings with int8 weights on float activations.
        output: The output rule; see the module's docstring.
        fixed: (scale, zero point) of a "fixed" output on quint8.
        values: The value rule; see the module's docstring.
        inplace: Whether its int8 form writes in place where its float form does.
        refuses: Whether its float spellings have no kernel on quantized tensors.
        dims: How many axes of an image it works along; 0 where that is not in its name.
        transposed: Whether its weight has the input channels first.
        averages: Whether its values are averages.
        pointwise: How it computes each element by itself: "arithmetic" of two inputs, "clamp",
            "curve" (what kernels take from a table) or "same"; "" where it does not.
        parts: The ops that it is one spelling of, or that a kernel fuses; () for itself.

    Example:
        >>> from fxqfix.ops import OPS
        >>> OPS["sigmoid"].fixed
        (0.00390625, 0)
    """

    key: str
    family: str
    spelled: tuple[str, ...] = ()
    spelled_relu: tuple[str, ...] = ()
    int8: tuple[str, ...] = ()
    int8_relu: tuple[str, ...] = ()
    dynamic: tuple[str, ...] = ()
    output: str = "own"
    fixed: tuple[float, int] | None = None
    values: str = ""
    inplace: bool = False
    refuses: bool = False
    dims: int = 0
    transposed: bool = False
    averages: bool = False
    pointwise: str = ""
    parts: tuple[str, ...] = ()

    @property
    def takes_codes(self) -> bool:
        """Whether its float spellings run on quantized tensors too."""
        closed = ("weighted", "normalization", "recurrent", "attention")
        return not self.refuses and self.family not in closed


@dataclass(frozen=True)
class Match:
    """What a node spells: the row, whether a relu is fused, and in which column it stands."""

    spec: OpSpec
    relu: bool
    column: str

    @property
    def key(self) -> str:
        """The op as reports name it, e.g. "conv2d_relu"."""
        return f"{self.spec.key}_relu" if self.relu else self.spec.key


def _conv(dim: int) -> OpSpec:
    n, nni, qat, iqat = f"{dim}d", "torch.ao.nn.intrinsic", "torch.ao.nn.qat", _IQAT
    return OpSpec(
        key=f"conv{n}",
        family="weighted",
        spelled=(
            f"torch.nn.Conv{n}",
            f"torch.nn.functional.conv{n}",
            f"torch.ops.aten.conv{n}.default",
            f"torch.ops.aten.conv{n}.padding",
            f"{qat}.Conv{n}",
            f"{nni}.ConvBn{n}",
            f"{iqat}.ConvBn{n}",
            f"{_REF}.Conv{n}",
        ),
        spelled_relu=(
            f"{nni}.ConvReLU{n}",
            f"{nni}.ConvBnReLU{n}",
            f"{iqat}.ConvReLU{n}",
            f"{iqat}.ConvBnReLU{n}",
        ),
        int8=(f"{_Q}.Conv{n}", f"torch.ops.quantized.conv{n}"),
        int8_relu=(f"{_IQ}.ConvReLU{n}", f"torch.ops.quantized.conv{n}_relu"),
        dynamic=(f"{_QD}.Conv{n}", f"torch.ops.quantized.conv{n}_dynamic"),
        dims=dim,
    )


def _conv_transpose(dim: int) -> OpSpec:
    n, overload = f"{dim}d", "default" if dim == 1 else "input"
    return OpSpec(
        key=f"conv_transpose{n}",
        family="weighted",
        spelled=(
            f"torch.nn.ConvTranspose{n}",
            f"torch.nn.functional.conv_transpose{n}",
            f"torch.ops.aten.conv_transpose{n}.{overload}",
            f"{_REF}.ConvTranspose{n}",
        ),
        int8=(f"{_Q}.ConvTranspose{n}", f"torch.ops.quantized.conv_transpose{n}"),
        dynamic=(f"{_QD}.ConvTranspose{n}", f"torch.ops.quantized.conv_transpose{n}_dynamic"),
        dims=dim,
        transposed=True,
    )


def _pool(kind: str, dim: int, *aten: str) -> OpSpec:
    snake, name = f"{kind}_pool{dim}d", f"{kind.title().replace('_', '')}Pool{dim}d"
    # Of these functions torch itself has all max pools, and of the others the one-dimensional.
    own = (f"torch.{snake}",) if dim == 1 or kind == "max" else ()
    int8 = (f"{_OPS}.{snake}",) if kind == "max" and dim < 3 else ()
    return OpSpec(
        key=snake,
        family="pool",
        spelled=(f"torch.nn.{name}", f"{_F}.{snake}", *own, *_aten(f"{snake}.default", *aten)),
        int8=int8,
        output="input",
        values="picked" if kind.endswith("max") else "between",
        refuses=kind == "adaptive_max",
        dims=dim,
        averages=kind.endswith("avg"),
    )


def _aten(*overloads: str) -> tuple[str, ...]:
    """Spellings of ATen operators, as graphs of torch.export (the PT2E flow) have them."""
    return tuple(f"torch.ops.aten.{overload}" for overload in overloads)


def _batch_norm(dim: int) -> OpSpec:
    n = f"{dim}d"
    modules = dim > 1  # torch has neither fused nor quantized modules of one dimension
    return OpSpec(
        key=f"batch_norm{n}",
        family="normalization",
        spelled=(f"torch.nn.BatchNorm{n}",),
        spelled_relu=(f"torch.ao.nn.intrinsic.BNReLU{n}",) if modules else (),
        int8=(*((f"{_Q}.BatchNorm{n}",) if modules else ()), f"{_OPS}.batch_norm{n}"),
        int8_relu=(
            *((f"{_IQ}.BNReLU{n}",) if modules else ()),
            f"{_OPS}.batch_norm{n}_relu",
        ),
    )


def _plain(
    key: str, family: str, *spelled: str, int8: tuple[str, ...] = (), output: str = "own", **kw: Any
) -> OpSpec:
    return OpSpec(key=key, family=family, spelled=spelled, int8=int8, output=output, **kw)


def _shape(key: str, *spelled: str, **kw: Any) -> OpSpec:
    return OpSpec(key=key, family="shape", spelled=spelled, output="shape", **kw)


_Q, _QD = "torch.ao.nn.quantized", "torch.ao.nn.quantized.dynamic"
_IQ, _IQD = "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.intrinsic.quantized.dynamic"
_IQAT, _REF = "torch.ao.nn.intrinsic.qat", "torch.ao.nn.quantized.reference"
_F, _OPS = "torch.nn.functional", "torch.ops.quantized"

TABLE: tuple[OpSpec, ...] = (
    # ---- where values enter and leave the quantized world
    _plain(
        "quantize",
        "boundary",
        "torch.quantize_per_tensor",
        "torch.quantize_per_channel",
        "torch.quantize_per_tensor_dynamic",
        "torch.ops.quantized_decomposed.quantize_per_tensor",
        "torch.ops.quantized_decomposed.quantize_per_tensor.default",
        "torch.ops.quantized_decomposed.quantize_per_tensor.tensor",
        "torch.ops.quantized_decomposed.quantize_per_tensor.tensor2",
        "torch.ops.quantized_decomposed.quantize_per_channel",
        "torch.ops.quantized_decomposed.quantize_per_channel.default",
        int8=(f"{_Q}.Quantize",),
    ),
    _plain(
        "dequantize",
        "boundary",
        ".dequantize",
        "torch.dequantize",
        "torch.ops.quantized_decomposed.dequantize_per_tensor",
        "torch.ops.quantized_decomposed.dequantize_per_tensor.default",
        "torch.ops.quantized_decomposed.dequantize_per_tensor.tensor",
        "torch.ops.quantized_decomposed.dequantize_per_tensor.tensor2",
        "torch.ops.quantized_decomposed.dequantize_per_channel",
        "torch.ops.quantized_decomposed.dequantize_per_channel.default",
        f"{_Q}.DeQuantize",
        output="float",
    ),
    # fxqfix's own: the declared range behind an int8 kernel.
    _plain("hold_range", "boundary", int8=("fxqfix.inserted.hold_range",), output="input"),
    _plain(
        "stub",
        "boundary",
        "torch.ao.quantization.QuantStub",
        "torch.ao.quantization.DeQuantStub",
        output="shape",
    ),
    # ---- with weights
    *(_conv(d) for d in (1, 2, 3)),
    *(_conv_transpose(d) for d in (1, 2, 3)),
    OpSpec(
        key="linear",
        family="weighted",
        spelled=(
            "torch.nn.Linear",
            f"{_F}.linear",
            *_aten("linear.default"),
            "torch.ao.nn.qat.Linear",
            "torch.ao.nn.qat.dynamic.Linear",
            "torch.ao.nn.intrinsic.LinearBn1d",
            f"{_IQAT}.LinearBn1d",
            f"{_REF}.Linear",
        ),
        spelled_relu=("torch.ao.nn.intrinsic.LinearReLU", f"{_IQAT}.LinearReLU"),
        int8=(f"{_Q}.Linear", f"{_OPS}.linear"),
        int8_relu=(f"{_IQ}.LinearReLU", f"{_OPS}.linear_relu"),
        dynamic=(
            f"{_QD}.Linear",
            f"{_IQD}.LinearReLU",
            f"{_OPS}.linear_dynamic",
            f"{_OPS}.linear_relu_dynamic",
            f"{_OPS}.linear_dynamic_fp16",
            f"{_OPS}.linear_relu_dynamic_fp16",
        ),
    ),
    OpSpec(
        key="linear_leaky_relu",
        family="weighted",
        spelled=("torch.ao.nn.intrinsic.LinearLeakyReLU",),
        int8=(f"{_IQ}.LinearLeakyReLU", f"{_OPS}.linear_leaky_relu"),
        parts=("linear", "leaky_relu"),
    ),
    OpSpec(
        key="linear_tanh",
        family="weighted",
        spelled=("torch.ao.nn.intrinsic.LinearTanh",),
        int8=(f"{_IQ}.LinearTanh", f"{_OPS}.linear_tanh"),
        parts=("linear", "tanh"),
    ),
    OpSpec(
        key="conv2d_add",
        family="weighted",
        spelled=("torch.ao.nn.intrinsic.ConvAdd2d",),
        spelled_relu=("torch.ao.nn.intrinsic.ConvAddReLU2d",),
        int8=(f"{_IQ}.ConvAdd2d", f"{_OPS}.conv2d_add"),
        int8_relu=(f"{_IQ}.ConvAddReLU2d", f"{_OPS}.conv2d_add_relu"),
        parts=("conv2d", "add"),
        dims=2,
    ),
    OpSpec(
        key="embedding",
        family="embedding",
        spelled=(
            "torch.nn.Embedding",
            f"{_F}.embedding",
            *_aten("embedding.default"),
            "torch.ao.nn.qat.Embedding",
            f"{_REF}.Embedding",
        ),
        dynamic=(f"{_Q}.Embedding", f"{_OPS}.embedding_byte", f"{_OPS}.embedding_4bit"),
        output="float",
    ),
    OpSpec(
        key="embedding_bag",
        family="embedding",
        spelled=(
            "torch.nn.EmbeddingBag",
            f"{_F}.embedding_bag",
            *_aten("embedding_bag.default", "embedding_bag.padding_idx", "_embedding_bag.default"),
            "torch.ao.nn.qat.EmbeddingBag",
            f"{_REF}.EmbeddingBag",
        ),
        dynamic=(
            f"{_Q}.EmbeddingBag",
            f"{_OPS}.embedding_bag_byte",
            f"{_OPS}.embedding_bag_4bit",
        ),
        output="float",
    ),
    # ---- element-wise
    OpSpec(
        key="add",
        family="element-wise",
        spelled=(
            "operator.add",
            "operator.iadd",
            "torch.add",
            ".add",
            ".add_",
            ".__add__",
            *_aten("add.Tensor", "add_.Tensor", "add.Scalar", "add_.Scalar"),
        ),
        int8=(f"{_OPS}.add", f"{_OPS}.add_out"),
        int8_relu=(f"{_OPS}.add_relu", f"{_OPS}.add_relu_out"),
        refuses=True,
        pointwise="arithmetic",
    ),
    OpSpec(
        key="mul",
        family="element-wise",
        spelled=(
            "operator.mul",
            "operator.imul",
            "torch.mul",
            ".mul",
            ".mul_",
            ".__mul__",
            *_aten("mul.Tensor", "mul_.Tensor", "mul.Scalar", "mul_.Scalar"),
        ),
        int8=(f"{_OPS}.mul", f"{_OPS}.mul_out"),
        int8_relu=(f"{_OPS}.mul_relu", f"{_OPS}.mul_relu_out"),
        refuses=True,
        pointwise="arithmetic",
    ),
    # The scalar kernels keep the codes and change scale and zero point instead.
    OpSpec(
        key="add_scalar",
        family="element-wise",
        int8=(f"{_OPS}.add_scalar", f"{_OPS}.add_scalar_out"),
        int8_relu=(f"{_OPS}.add_scalar_relu", f"{_OPS}.add_scalar_relu_out"),
        output="scalar",
        parts=("add",),
    ),
    OpSpec(
        key="mul_scalar",
        family="element-wise",
        int8=(f"{_OPS}.mul_scalar", f"{_OPS}.mul_scalar_out"),
        int8_relu=(f"{_OPS}.mul_scalar_relu", f"{_OPS}.mul_scalar_relu_out"),
        output="scalar",
        parts=("mul",),
    ),
    OpSpec(
        key="matmul",
        family="element-wise",
        spelled=(
            "operator.matmul",
            "torch.matmul",
            ".matmul",
            "torch.bmm",
            ".bmm",
            "torch.mm",
            ".mm",
            *_aten("matmul.default", "bmm.default", "mm.default"),
        ),
        int8=(f"{_OPS}.matmul",),
        refuses=True,
    ),
    _plain("addmm", "element-wise", "torch.addmm", ".addmm", *_aten("addmm.default"), refuses=True),
    _plain(
        "sub",
        "element-wise",
        "operator.sub",
        "operator.isub",
        "torch.sub",
        ".sub",
        ".sub_",
        *_aten("sub.Tensor", "sub_.Tensor", "sub.Scalar"),
        refuses=True,
        pointwise="arithmetic",
    ),
    _plain(
        "div",
        "element-wise",
        "operator.truediv",
        "operator.itruediv",
        "torch.div",
        ".div",
        ".div_",
        *_aten("div.Tensor", "div_.Tensor", "div.Scalar"),
        refuses=True,
        pointwise="arithmetic",
    ),
    # torch.cat on quantized tensors has the first tensor's qparams, quantized.cat its own.
    OpSpec(
        key="cat",
        family="element-wise",
        spelled=("torch.cat", "torch.concat", "torch.concatenate", "torch.ops.aten.cat.default"),
        int8=(f"{_OPS}.cat", f"{_OPS}.cat_out"),
        int8_relu=(f"{_OPS}.cat_relu", f"{_OPS}.cat_relu_out"),
        output="input",
        values="picked",
    ),
    # ---- pools
    _pool("max", 1),
    _pool("max", 2, "max_pool2d_with_indices.default"),
    _pool("max", 3, "max_pool3d_with_indices.default"),
    *(_pool("avg", d) for d in (1, 2, 3)),
    _pool("adaptive_avg", 1),
    _pool("adaptive_avg", 2, "_adaptive_avg_pool2d.default"),
    _pool("adaptive_avg", 3, "_adaptive_avg_pool3d.default"),
    *(_pool("adaptive_max", d) for d in (1, 2, 3)),
    _plain(
        "mean",
        "pool",
        "torch.mean",
        ".mean",
        *_aten("mean.dim", "mean.default"),
        output="input",
        values="between",
        averages=True,
    ),
    # ---- activations
    _plain(
        "relu",
        "activation",
        "torch.nn.ReLU",
        "torch.relu",
        "torch.relu_",
        f"{_F}.relu",
        f"{_F}.relu_",
        ".relu",
        ".relu_",
        *_aten("relu.default", "relu_.default"),
        output="input",
        values="to-zero",
        inplace=True,
        pointwise="clamp",
    ),
    _plain(
        "relu6",
        "activation",
        "torch.nn.ReLU6",
        f"{_F}.relu6",
        *_aten("relu6.default", "relu6_.default"),
        int8=(f"{_Q}.ReLU6", f"{_OPS}.relu6"),
        output="input",
        values="to-zero",
        inplace=True,
        pointwise="clamp",
        parts=("clamp",),
    ),
    _plain(
        "hardtanh",
        "activation",
        "torch.nn.Hardtanh",
        f"{_F}.hardtanh",
        f"{_F}.hardtanh_",
        *_aten("hardtanh.default", "hardtanh_.default"),
        output="input",
        values="to-zero",
        inplace=True,
        pointwise="clamp",
        parts=("clamp",),
    ),
    _plain(
        "clamp",
        "activation",
        "torch.clamp",
        "torch.clamp_",
        "torch.clip",
        ".clamp",
        ".clamp_",
        ".clip",
        *_aten("clamp.default", "clamp_.default", "clamp_min.default"),
        int8=(f"{_OPS}.clamp",),
        output="input",
        pointwise="clamp",
    ),
    _plain(
        "hardswish",
        "activation",
        "torch.nn.Hardswish",
        f"{_F}.hardswish",
        *_aten("hardswish.default", "hardswish_.default"),
        int8=(f"{_Q}.Hardswish", f"{_OPS}.hardswish"),
        refuses=True,
        pointwise="curve",
    ),
    # torch's own backend configs name methods "hardsigmoid" and "hardsigmoid_".
    _plain(
        "hardsigmoid",
        "activation",
        "torch.nn.Hardsigmoid",
        f"{_F}.hardsigmoid",
        ".hardsigmoid",
        ".hardsigmoid_",
        *_aten("hardsigmoid.default", "hardsigmoid_.default"),
        output="fixed",
        inplace=True,
        fixed=(1 / 256, 0),
        pointwise="curve",
    ),
    _plain(
        "sigmoid",
        "activation",
        "torch.nn.Sigmoid",
        "torch.sigmoid",
        "torch.sigmoid_",
        f"{_F}.sigmoid",
        ".sigmoid",
        ".sigmoid_",
        *_aten("sigmoid.default", "sigmoid_.default"),
        int8=(f"{_Q}.Sigmoid", f"{_OPS}.sigmoid"),
        output="fixed",
        fixed=(1 / 256, 0),
        pointwise="curve",
    ),
    _plain(
        "tanh",
        "activation",
        "torch.nn.Tanh",
        "torch.tanh",
        "torch.tanh_",
        f"{_F}.tanh",
        ".tanh",
        ".tanh_",
        *_aten("tanh.default", "tanh_.default"),
        output="fixed",
        fixed=(2 / 256, 128),
        pointwise="curve",
    ),
    _plain(
        "elu",
        "activation",
        "torch.nn.ELU",
        f"{_F}.elu",
        f"{_F}.elu_",
        *_aten("elu.default", "elu_.default"),
        int8=(f"{_Q}.ELU", f"{_OPS}.elu"),
        refuses=True,
        pointwise="curve",
    ),
    _plain(
        "celu",
        "activation",
        "torch.nn.CELU",
        f"{_F}.celu",
        "torch.celu",
        *_aten("celu.default", "celu_.default"),
        int8=(f"{_OPS}.celu",),
        refuses=True,
        pointwise="curve",
    ),
    # torch's own backend configs name a method "leaky_relu".
    _plain(
        "leaky_relu",
        "activation",
        "torch.nn.LeakyReLU",
        f"{_F}.leaky_relu",
        f"{_F}.leaky_relu_",
        ".leaky_relu",
        *_aten("leaky_relu.default", "leaky_relu_.default"),
        int8=(f"{_Q}.LeakyReLU", f"{_OPS}.leaky_relu"),
        pointwise="curve",
    ),
    _plain(
        "prelu",
        "activation",
        "torch.nn.PReLU",
        f"{_F}.prelu",
        ".prelu",
        *_aten("prelu.default"),
        int8=(f"{_Q}.PReLU", f"{_OPS}.prelu"),
        refuses=True,
    ),
    _plain(
        "softmax",
        "activation",
        "torch.nn.Softmax",
        f"{_F}.softmax",
        "torch.softmax",
        ".softmax",
        *_aten("softmax.int", "_softmax.default"),
        int8=(f"{_Q}.Softmax", f"{_OPS}.softmax"),
        refuses=True,
    ),
    # No flow of torch quantizes these two; they stay float between their neighbours.
    _plain(
        "silu",
        "activation",
        "torch.nn.SiLU",
        f"{_F}.silu",
        *_aten("silu.default"),
        refuses=True,
        pointwise="curve",
    ),
    _plain(
        "gelu",
        "activation",
        "torch.nn.GELU",
        f"{_F}.gelu",
        *_aten("gelu.default"),
        values="to-zero",
        pointwise="curve",
    ),
    _plain(
        "threshold",
        "activation",
        "torch.nn.Threshold",
        f"{_F}.threshold",
        *_aten("threshold.default", "threshold_.default"),
        int8=(f"{_OPS}.threshold",),
        output="input",
    ),
    # ---- normalization
    *(_batch_norm(d) for d in (1, 2, 3)),
    # The function has no dimension: it comes last, so that modules match the rows above.
    _plain(
        "batch_norm",
        "normalization",
        f"{_F}.batch_norm",
        *_aten("batch_norm.default", "_native_batch_norm_legit_no_training.default"),
        int8=(f"{_OPS}.batch_norm",),
        int8_relu=(f"{_OPS}.batch_norm_relu",),
    ),
    _plain(
        "layer_norm",
        "normalization",
        "torch.nn.LayerNorm",
        f"{_F}.layer_norm",
        *_aten("layer_norm.default", "native_layer_norm.default"),
        int8=(f"{_Q}.LayerNorm", f"{_OPS}.layer_norm"),
    ),
    _plain(
        "group_norm",
        "normalization",
        "torch.nn.GroupNorm",
        f"{_F}.group_norm",
        *_aten("group_norm.default", "native_group_norm.default"),
        int8=(f"{_Q}.GroupNorm", f"{_OPS}.group_norm"),
    ),
    _plain(
        "instance_norm",
        "normalization",
        *(f"torch.nn.InstanceNorm{d}d" for d in (1, 2, 3)),
        f"{_F}.instance_norm",
        *_aten("instance_norm.default"),
        int8=(*(f"{_Q}.InstanceNorm{d}d" for d in (1, 2, 3)), f"{_OPS}.instance_norm"),
    ),
    # ---- the same codes, moved or picked
    _plain(
        "dropout",
        "shape",
        *(f"torch.nn.Dropout{d}" for d in ("", "1d", "2d", "3d")),
        f"{_F}.dropout",
        "torch.dropout",
        *_aten("dropout.default", "dropout_.default"),
        int8=(f"{_Q}.Dropout", f"{_OPS}.dropout"),
        output="shape",
    ),
    _plain(
        "interpolate",
        "shape",
        "torch.nn.Upsample",
        "torch.nn.UpsamplingNearest2d",
        "torch.nn.UpsamplingBilinear2d",
        f"{_F}.interpolate",
        f"{_F}.upsample",
        f"{_F}.upsample_nearest",
        f"{_F}.upsample_bilinear",
        *_aten(
            *(f"upsample_nearest{d}d.vec" for d in (1, 2, 3)),
            "upsample_linear1d.vec",
            "upsample_bilinear2d.vec",
            "upsample_bicubic2d.vec",
            "upsample_trilinear3d.vec",
        ),
        output="input",
        values="between",
    ),
    _plain(
        "pad",
        "shape",
        f"{_F}.pad",
        *(
            f"torch.nn.{kind}Pad{d}d"
            for kind in ("Constant", "Zero", "Reflection", "Replication", "Circular")
            for d in (1, 2, 3)
        ),
        *_aten("pad.default", "constant_pad_nd.default", "reflection_pad2d.default"),
        *_aten("replication_pad2d.default"),
        output="input",
    ),
    _shape("identity", "torch.nn.Identity", pointwise="same"),
    _shape(
        "flatten",
        "torch.nn.Flatten",
        "torch.flatten",
        ".flatten",
        "torch.ravel",
        ".ravel",
        *_aten("flatten.using_ints"),
    ),
    _shape(
        "unflatten",
        "torch.nn.Unflatten",
        "torch.unflatten",
        ".unflatten",
        *_aten("unflatten.int"),
    ),
    _shape(
        "reshape",
        "torch.reshape",
        ".reshape",
        ".reshape_as",
        ".view",
        ".view_as",
        ".resize_",
        *_aten("view.default", "reshape.default", "_unsafe_view.default", "view_copy.default"),
    ),
    _shape(
        "permute",
        "torch.permute",
        "torch.permute_copy",
        ".permute",
        "torch.movedim",
        ".movedim",
        *_aten("permute.default", "permute_copy.default"),
    ),
    _shape(
        "transpose",
        "torch.transpose",
        ".transpose",
        ".t",
        "torch.t",
        "torch.swapaxes",
        ".swapaxes",
        *_aten("transpose.int", "t.default"),
    ),
    _shape(
        "squeeze",
        "torch.squeeze",
        ".squeeze",
        ".squeeze_",
        *_aten("squeeze.default", "squeeze.dim", "squeeze.dims"),
    ),
    _shape(
        "unsqueeze", "torch.unsqueeze", ".unsqueeze", ".unsqueeze_", *_aten("unsqueeze.default")
    ),
    _shape(
        "expand",
        ".expand",
        ".expand_as",
        "torch.broadcast_to",
        *_aten("expand.default", "expand_as.default"),
    ),
    _shape(
        "repeat",
        ".repeat",
        ".repeat_interleave",
        "torch.repeat_interleave",
        "torch.tile",
        ".tile",
        *_aten("repeat.default", "repeat_interleave.self_int", "tile.default"),
    ),
    _shape("stack", "torch.stack", *_aten("stack.default")),
    _shape("chunk", "torch.chunk", ".chunk", *_aten("chunk.default")),
    _shape(
        "split",
        "torch.split",
        ".split",
        "torch.tensor_split",
        *_aten("split.Tensor", "split_with_sizes.default"),
    ),
    _shape("unbind", "torch.unbind", ".unbind", *_aten("unbind.int")),
    _shape("getitem", "operator.getitem", *_aten("slice.Tensor", "index.Tensor")),
    _shape(
        "narrow",
        "torch.narrow",
        ".narrow",
        ".select",
        "torch.select",
        *_aten("narrow.default", "select.int"),
    ),
    _shape(
        "roll",
        "torch.roll",
        ".roll",
        "torch.flip",
        ".flip",
        *_aten("roll.default", "flip.default"),
    ),
    _shape(
        "pixel_shuffle",
        "torch.nn.PixelShuffle",
        f"{_F}.pixel_shuffle",
        "torch.nn.PixelUnshuffle",
        f"{_F}.pixel_unshuffle",
        *_aten("pixel_shuffle.default", "pixel_unshuffle.default"),
    ),
    _shape(
        "channel_shuffle",
        "torch.nn.ChannelShuffle",
        f"{_F}.channel_shuffle",
        "torch.channel_shuffle",
        *_aten("channel_shuffle.default"),
    ),
    _shape(
        "contiguous",
        ".contiguous",
        ".clone",
        "torch.clone",
        ".detach",
        ".detach_",
        ".to",
        ".cpu",
        ".cuda",
        *_aten("contiguous.default", "clone.default", "detach.default", "detach_.default"),
        *_aten("to.dtype", "to.device", "to.dtype_layout", "alias.default"),
    ),
    _plain(
        "size",
        "shape",
        ".size",
        ".dim",
        ".numel",
        ".shape",
        "builtins.getattr",
        "builtins.len",
        "operator.floordiv",
        *_aten("sym_size.int"),
        output="none",
    ),
    # ---- whole sub-networks; opened only through their own modules
    OpSpec(
        key="lstm",
        family="recurrent",
        spelled=("torch.nn.LSTM", "torch.ao.nn.quantizable.LSTM", f"{_REF}.LSTM"),
        int8=(f"{_Q}.LSTM",),
        dynamic=(f"{_QD}.LSTM",),
        output="tuple",
    ),
    OpSpec(
        key="gru",
        family="recurrent",
        spelled=("torch.nn.GRU", f"{_REF}.GRU"),
        dynamic=(f"{_QD}.GRU",),
        output="tuple",
    ),
    OpSpec(
        key="rnn_cell",
        family="recurrent",
        spelled=(
            *(f"torch.nn.{c}Cell" for c in ("LSTM", "GRU", "RNN")),
            "torch.ao.nn.quantizable.LSTMCell",
            *(f"{_REF}.{c}Cell" for c in ("LSTM", "GRU", "RNN")),
        ),
        dynamic=tuple(f"{_QD}.{c}Cell" for c in ("LSTM", "GRU", "RNN")),
        output="tuple",
    ),
    OpSpec(
        key="multihead_attention",
        family="attention",
        spelled=("torch.nn.MultiheadAttention", "torch.ao.nn.quantizable.MultiheadAttention"),
        int8=(f"{_Q}.MultiheadAttention",),
        output="tuple",
    ),
)

_FAMILIES = (
    *("boundary", "weighted", "embedding", "element-wise", "pool", "activation"),
    *("normalization", "shape", "recurrent", "attention"),
)
_OUTPUTS = ("own", "input", "shape", "fixed", "scalar", "tuple", "float", "none")
_VALUES = ("", "picked", "between", "to-zero")
_POINTWISE = ("", "arithmetic", "clamp", "curve", "same")
_COLUMNS = ("spelled", "spelled_relu", "int8", "int8_relu", "dynamic")


def _problem(row: OpSpec) -> str | None:
    columns = {"family": _FAMILIES, "output": _OUTPUTS, "values": _VALUES, "pointwise": _POINTWISE}
    for name, known in columns.items():
        if (found := getattr(row, name)) not in known:
            return f"there is no {name} {found!r}"
    if (row.output == "fixed") != (row.fixed is not None):
        return "a fixed output, and no other, has its scale and zero point"
    return None if any(spellings(row)) else "it has no spelling"


def spellings(spec: OpSpec) -> Iterator[tuple[str, str]]:
    """Yield (column, spelling) of every spelling of a row."""
    for column in _COLUMNS:
        for spelling in getattr(spec, column):
            yield column, spelling


OPS: Registry[str, OpSpec] = Registry("op", key=attrgetter("key"), check=_problem)
OPS.add(*TABLE, module=__name__)


def parts(key: str) -> tuple[str, ...]:
    """The ops that one of this key is made of; of a key that no row has, itself.

    Example:
        >>> parts("linear_tanh"), parts("relu6"), parts("sin")
        (('linear', 'tanh'), ('clamp',), ('sin',))
    """
    row = OPS.get(key)
    return (row.parts if row is not None else ()) or (key,)


@functools.cache
def _index() -> tuple[dict[str, Match], dict[Any, Match]]:
    """(methods by name, functions and module classes by object); first spelling wins."""
    decomposed()  # registers torch.ops.quantized_decomposed, so that its spellings resolve
    methods: dict[str, Match] = {}
    targets: dict[Any, Match] = {}
    for spec in TABLE:
        for column, spelling in spellings(spec):
            found = Match(spec, column.endswith("_relu"), column.removesuffix("_relu"))
            if spelling.startswith("."):
                methods.setdefault(spelling[1:], found)
            elif (target := resolve(spelling)) is not None:
                targets.setdefault(target, found)
    return methods, targets


def match(target: Callable[..., Any] | type[nn.Module] | str) -> Match | None:
    """Find the row of a function, a module class or a method name; None where there is none.

    A module class also matches through its bases, so that a user's subclass of nn.Conv2d is a
    conv2d.

    Example:
        >>> import torch
        >>> match(torch.nn.ReLU).key, match("reshape").key, match(print)
        ('relu', 'reshape', None)
    """
    methods, targets = _index()
    if isinstance(target, str):
        return methods.get(target)
    if isinstance(target, type):
        return next((targets[c] for c in target.__mro__ if c in targets), None)
    try:
        return targets.get(target)
    except TypeError:  # unhashable callable
        return None


def match_node(node: fx.Node, modules: Mapping[str, nn.Module]) -> Match | None:
    """Find the row of an FX node; `modules` are the graph module's named modules.

    Example:
        >>> from fxqfix.ops import match_node
        >>> traced = fx.symbolic_trace(nn.Sequential(nn.ReLU6()))
        >>> found = [match_node(n, dict(traced.named_modules())) for n in traced.graph.nodes]
        >>> [match.key for match in found if match is not None]
        ['relu6']
    """
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, FloatIsland | InMemoryOrder):
            module = module.inner
        return match(module.function if isinstance(module, Functional) else type(module))
    if node.op in ("call_function", "call_method"):
        return match(node.target)
    return None

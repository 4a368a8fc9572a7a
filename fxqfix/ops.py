"""The op table: one row per op family, with its spellings in every dialect.

A row tells how an op is spelled by each flow, which qparams its output has, and which module or
functional form computes it in float. Readers, rewrites, coverage listing and tests read this
table; to add an op is to add a row, and the tests grow by themselves.

Spellings are dotted names, resolved when first needed, so that importing fxqfix needs neither
torch.ao nor torchao: ``torch.nn.Conv2d`` (module class), ``torch.relu`` (function), ``.relu``
(method), ``torch.ops.quantized.add`` (operator). A spelling that this torch lacks is skipped.

Output rules (whose qparams the output of an int8 kernel has):

* ``own``: its own scale and zero point, held by the node's arguments or module.
* ``input``: the first input's; the values are computed anew (pools, clamps, cat).
* ``shape``: the first input's codes, moved or picked, never changed.
* ``fixed``: given by the op (sigmoid: 1/256, 0).
* ``float``: not quantized (embedding, dynamic ops).
* ``none``: no tensor (sizes and other questions).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxqfix._torch import decomposed, resolve

__all__ = ["TABLE", "Match", "OpSpec", "match", "match_node", "spellings"]


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

    Example:
        >>> from fxqfix.ops import TABLE
        >>> next(row for row in TABLE if row.key == "sigmoid").fixed
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
    )


def _conv_transpose(dim: int) -> OpSpec:
    n = f"{dim}d"
    return OpSpec(
        key=f"conv_transpose{n}",
        family="weighted",
        spelled=(
            f"torch.nn.ConvTranspose{n}",
            f"torch.nn.functional.conv_transpose{n}",
            f"{_REF}.ConvTranspose{n}",
        ),
        int8=(f"{_Q}.ConvTranspose{n}", f"torch.ops.quantized.conv_transpose{n}"),
        dynamic=(f"{_QD}.ConvTranspose{n}",),
    )


def _pool(kind: str, dim: int, output: str = "input") -> OpSpec:
    snake, name = f"{kind}_pool{dim}d", f"{kind.title().replace('_', '')}Pool{dim}d"
    functional = (f"torch.nn.functional.{snake}", f"torch.{snake}", f"torch.ops.aten.{snake}")
    return OpSpec(
        key=snake,
        family="pool",
        spelled=(f"torch.nn.{name}", *functional, f"torch.ops.aten.{snake}.default"),
        int8=(f"torch.ops.quantized.{snake}",) if kind == "max" and dim < 3 else (),
        output=output,
    )


def _plain(
    key: str, family: str, *spelled: str, int8: tuple[str, ...] = (), output: str = "own", **kw: Any
) -> OpSpec:
    return OpSpec(key=key, family=family, spelled=spelled, int8=int8, output=output, **kw)


def _shape(key: str, *spelled: str) -> OpSpec:
    names = spelled or (f"torch.{key}", f".{key}", f"torch.ops.aten.{key}.default")
    return OpSpec(key=key, family="shape", spelled=names, output="shape")


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
            "torch.ops.aten.linear.default",
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
    ),
    OpSpec(
        key="linear_tanh",
        family="weighted",
        spelled=("torch.ao.nn.intrinsic.LinearTanh",),
        int8=(f"{_IQ}.LinearTanh", f"{_OPS}.linear_tanh"),
    ),
    OpSpec(
        key="conv2d_add",
        family="weighted",
        spelled=("torch.ao.nn.intrinsic.ConvAdd2d",),
        spelled_relu=("torch.ao.nn.intrinsic.ConvAddReLU2d",),
        int8=(f"{_IQ}.ConvAdd2d", f"{_OPS}.conv2d_add"),
        int8_relu=(f"{_IQ}.ConvAddReLU2d", f"{_OPS}.conv2d_add_relu"),
    ),
    OpSpec(
        key="embedding",
        family="embedding",
        spelled=(
            "torch.nn.Embedding",
            f"{_F}.embedding",
            "torch.ao.nn.qat.Embedding",
            f"{_REF}.Embedding",
        ),
        dynamic=(f"{_Q}.Embedding", f"{_OPS}.embedding_byte"),
        output="float",
    ),
    OpSpec(
        key="embedding_bag",
        family="embedding",
        spelled=(
            "torch.nn.EmbeddingBag",
            f"{_F}.embedding_bag",
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
            "torch.ops.aten.add.Tensor",
            "torch.ops.aten.add_.Tensor",
        ),
        int8=(f"{_OPS}.add", f"{_OPS}.add_out"),
        int8_relu=(f"{_OPS}.add_relu", f"{_OPS}.add_relu_out"),
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
            "torch.ops.aten.mul.Tensor",
            "torch.ops.aten.mul_.Tensor",
        ),
        int8=(f"{_OPS}.mul", f"{_OPS}.mul_out"),
        int8_relu=(f"{_OPS}.mul_relu", f"{_OPS}.mul_relu_out"),
    ),
    # The scalar kernels keep the codes and change scale and zero point instead.
    OpSpec(
        key="add_scalar",
        family="element-wise",
        int8=(f"{_OPS}.add_scalar", f"{_OPS}.add_scalar_out"),
        int8_relu=(f"{_OPS}.add_scalar_relu", f"{_OPS}.add_scalar_relu_out"),
        output="scalar",
    ),
    OpSpec(
        key="mul_scalar",
        family="element-wise",
        int8=(f"{_OPS}.mul_scalar", f"{_OPS}.mul_scalar_out"),
        int8_relu=(f"{_OPS}.mul_scalar_relu", f"{_OPS}.mul_scalar_relu_out"),
        output="scalar",
    ),
    OpSpec(
        key="matmul",
        family="element-wise",
        spelled=("operator.matmul", "torch.matmul", ".matmul", "torch.ops.aten.matmul.default"),
        int8=(f"{_OPS}.matmul",),
    ),
    _plain("sub", "element-wise", "operator.sub", "torch.sub", ".sub", "torch.ops.aten.sub.Tensor"),
    _plain(
        "div", "element-wise", "operator.truediv", "torch.div", ".div", "torch.ops.aten.div.Tensor"
    ),
    # torch.cat on quantized tensors has the first tensor's qparams, quantized.cat its own.
    OpSpec(
        key="cat",
        family="element-wise",
        spelled=("torch.cat", "torch.concat", "torch.concatenate", "torch.ops.aten.cat.default"),
        int8=(f"{_OPS}.cat",),
        int8_relu=(f"{_OPS}.cat_relu",),
        output="input",
    ),
    # ---- pools
    *(_pool("max", d) for d in (1, 2, 3)),
    *(_pool("avg", d) for d in (1, 2, 3)),
    *(_pool("adaptive_avg", d) for d in (1, 2, 3)),
    *(_pool("adaptive_max", d) for d in (1, 2)),
    _plain("mean", "pool", "torch.mean", ".mean", "torch.ops.aten.mean.dim", output="input"),
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
        "torch.ops.aten.relu.default",
        "torch.ops.aten.relu_.default",
        output="input",
    ),
    _plain(
        "relu6",
        "activation",
        "torch.nn.ReLU6",
        f"{_F}.relu6",
        int8=(f"{_Q}.ReLU6", f"{_OPS}.relu6"),
        output="input",
    ),
    _plain(
        "hardtanh",
        "activation",
        "torch.nn.Hardtanh",
        f"{_F}.hardtanh",
        f"{_F}.hardtanh_",
        "torch.ops.aten.hardtanh.default",
        output="input",
    ),
    _plain(
        "clamp",
        "activation",
        "torch.clamp",
        ".clamp",
        ".clamp_",
        "torch.ops.aten.clamp.default",
        output="input",
    ),
    _plain(
        "hardswish",
        "activation",
        "torch.nn.Hardswish",
        f"{_F}.hardswish",
        "torch.ops.aten.hardswish.default",
        int8=(f"{_Q}.Hardswish", f"{_OPS}.hardswish", f"{_Q}.functional.hardswish"),
    ),
    _plain(
        "hardsigmoid",
        "activation",
        "torch.nn.Hardsigmoid",
        f"{_F}.hardsigmoid",
        ".hardsigmoid",
        ".hardsigmoid_",
        output="fixed",
        fixed=(1 / 256, 0),
    ),
    _plain(
        "sigmoid",
        "activation",
        "torch.nn.Sigmoid",
        "torch.sigmoid",
        f"{_F}.sigmoid",
        ".sigmoid",
        ".sigmoid_",
        "torch.ops.aten.sigmoid.default",
        int8=(f"{_Q}.Sigmoid", f"{_OPS}.sigmoid"),
        output="fixed",
        fixed=(1 / 256, 0),
    ),
    _plain(
        "tanh",
        "activation",
        "torch.nn.Tanh",
        "torch.tanh",
        f"{_F}.tanh",
        ".tanh",
        ".tanh_",
        int8=(f"{_OPS}.tanh",),
        output="fixed",
        fixed=(2 / 256, 128),
    ),
    _plain(
        "elu",
        "activation",
        "torch.nn.ELU",
        f"{_F}.elu",
        int8=(f"{_Q}.ELU", f"{_OPS}.elu", f"{_Q}.functional.elu"),
    ),
    _plain("celu", "activation", "torch.nn.CELU", f"{_F}.celu", int8=(f"{_OPS}.celu",)),
    _plain(
        "leaky_relu",
        "activation",
        "torch.nn.LeakyReLU",
        f"{_F}.leaky_relu",
        int8=(f"{_Q}.LeakyReLU", f"{_OPS}.leaky_relu"),
    ),
    _plain(
        "prelu",
        "activation",
        "torch.nn.PReLU",
        f"{_F}.prelu",
        int8=(f"{_Q}.PReLU", f"{_OPS}.prelu"),
    ),
    _plain(
        "softmax",
        "activation",
        "torch.nn.Softmax",
        f"{_F}.softmax",
        "torch.softmax",
        ".softmax",
        int8=(f"{_Q}.Softmax", f"{_OPS}.softmax"),
    ),
    _plain("silu", "activation", "torch.nn.SiLU", f"{_F}.silu"),
    _plain("gelu", "activation", "torch.nn.GELU", f"{_F}.gelu"),
    _plain("threshold", "activation", "torch.nn.Threshold", f"{_F}.threshold", output="input"),
    # ---- normalization
    OpSpec(
        key="batch_norm2d",
        family="normalization",
        spelled=("torch.nn.BatchNorm2d",),
        spelled_relu=("torch.ao.nn.intrinsic.BNReLU2d",),
        int8=(f"{_Q}.BatchNorm2d", f"{_OPS}.batch_norm2d"),
        int8_relu=(f"{_IQ}.BNReLU2d", f"{_OPS}.batch_norm2d_relu"),
    ),
    OpSpec(
        key="batch_norm3d",
        family="normalization",
        spelled=("torch.nn.BatchNorm3d",),
        spelled_relu=("torch.ao.nn.intrinsic.BNReLU3d",),
        int8=(f"{_Q}.BatchNorm3d", f"{_OPS}.batch_norm3d"),
        int8_relu=(f"{_IQ}.BNReLU3d", f"{_OPS}.batch_norm3d_relu"),
    ),
    _plain(
        "batch_norm1d",
        "normalization",
        "torch.nn.BatchNorm1d",
        f"{_F}.batch_norm",
        int8=(f"{_OPS}.batch_norm1d",),
    ),
    _plain(
        "layer_norm",
        "normalization",
        "torch.nn.LayerNorm",
        f"{_F}.layer_norm",
        int8=(f"{_Q}.LayerNorm", f"{_OPS}.layer_norm"),
    ),
    _plain(
        "group_norm",
        "normalization",
        "torch.nn.GroupNorm",
        f"{_F}.group_norm",
        int8=(f"{_Q}.GroupNorm", f"{_OPS}.group_norm"),
    ),
    _plain(
        "instance_norm",
        "normalization",
        *(f"torch.nn.InstanceNorm{d}d" for d in (1, 2, 3)),
        f"{_F}.instance_norm",
        int8=(*(f"{_Q}.InstanceNorm{d}d" for d in (1, 2, 3)), f"{_OPS}.instance_norm"),
    ),
    # ---- the same codes, moved or picked
    _plain(
        "dropout",
        "shape",
        *(f"torch.nn.Dropout{d}" for d in ("", "1d", "2d", "3d")),
        f"{_F}.dropout",
        int8=(f"{_Q}.Dropout",),
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
        output="input",
    ),
    _plain(
        "pad",
        "shape",
        f"{_F}.pad",
        "torch.nn.ConstantPad2d",
        "torch.nn.ZeroPad2d",
        "torch.nn.ReflectionPad2d",
        "torch.nn.ReplicationPad2d",
        output="input",
    ),
    _shape("identity", "torch.nn.Identity"),
    _shape("flatten", "torch.nn.Flatten", "torch.flatten", ".flatten"),
    _shape("unflatten", "torch.nn.Unflatten", "torch.unflatten", ".unflatten"),
    _shape(
        "reshape",
        "torch.reshape",
        ".reshape",
        ".view",
        ".resize_",
        "torch.ops.aten.view.default",
        "torch.ops.aten.reshape.default",
    ),
    _shape(
        "permute", "torch.permute", ".permute", "torch.movedim", "torch.ops.aten.permute.default"
    ),
    _shape(
        "transpose",
        "torch.transpose",
        ".transpose",
        ".t",
        "torch.t",
        "torch.ops.aten.transpose.int",
    ),
    _shape("squeeze", "torch.squeeze", ".squeeze", ".squeeze_"),
    _shape("unsqueeze", "torch.unsqueeze", ".unsqueeze", ".unsqueeze_"),
    _shape("expand", ".expand", ".expand_as"),
    _shape("repeat", ".repeat", ".repeat_interleave", "torch.repeat_interleave", "torch.tile"),
    _shape("stack", "torch.stack"),
    _shape("chunk", "torch.chunk", ".chunk"),
    _shape("split", "torch.split", ".split"),
    _shape("unbind", "torch.unbind", ".unbind"),
    _shape("getitem", "operator.getitem"),
    _shape("narrow", "torch.narrow", ".narrow", ".select", "torch.select"),
    _shape("roll", "torch.roll", ".roll", "torch.flip", ".flip"),
    _shape(
        "pixel_shuffle",
        "torch.nn.PixelShuffle",
        f"{_F}.pixel_shuffle",
        "torch.nn.PixelUnshuffle",
        f"{_F}.pixel_unshuffle",
    ),
    _shape(
        "channel_shuffle",
        "torch.nn.ChannelShuffle",
        f"{_F}.channel_shuffle",
        "torch.channel_shuffle",
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

_COLUMNS = ("spelled", "spelled_relu", "int8", "int8_relu", "dynamic")


def spellings(spec: OpSpec) -> Iterator[tuple[str, str]]:
    """Yield (column, spelling) of every spelling of a row."""
    for column in _COLUMNS:
        for spelling in getattr(spec, column):
            yield column, spelling


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


def match_node(node: fx.Node, modules: dict[str, nn.Module]) -> Match | None:
    """Find the row of an FX node; `modules` are the graph module's named modules."""
    if node.op == "call_module":
        return match(type(modules[str(node.target)]))
    if node.op in ("call_function", "call_method"):
        return match(node.target)
    return None

"""The text of a script that shows one op's discrepancy with torch alone."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxqfix.errors import UnsupportedError
from fxqfix.export import OpParameters
from fxqfix.qparams import QParams

__all__ = ["script"]

_HEAD = '''\
"""{title}

{about}

The reference: the op in float32 on the dequantized inputs, quantized as in the prepared model.
Needs torch alone. Ends with status 1 where codes differ.
"""

import base64
import sys
import warnings
import zlib

import torch
import torch.nn.functional as F

warnings.simplefilter("ignore")  # torch's notices of deprecation


def tensor(text, shape, dtype):
    """A tensor from text."""
    data = bytearray(zlib.decompress(base64.b64decode(text)))
    return torch.frombuffer(data, dtype=dtype).reshape(shape).clone()


def quantized(codes, scale, zero_point, dtype, axis=None):
    """A quantized tensor that holds these integer values."""
    if axis is None:
        real = (codes.double() - zero_point) * scale
        found = torch.quantize_per_tensor(real.float(), scale, zero_point, dtype)
    else:
        scales, points = (torch.tensor(v, dtype=torch.float64) for v in (scale, zero_point))
        shape = [-1 if i == axis else 1 for i in range(codes.dim())]
        real = (codes.double() - points.reshape(shape)) * scales.reshape(shape)
        found = torch.quantize_per_channel(real.float(), scales, points.long(), axis, dtype)
    assert torch.equal(found.int_repr(), codes)
    return found


def codes_of(value, scale, zero_point, low, high):
    """Integer values, as fake-quantize rounds and clamps them."""
    real = torch.fake_quantize_per_tensor_affine(value, scale, zero_point, low, high)
    return (real.double() / scale).round().long() + zero_point

'''

_TAIL = """
differ = expected != found
lsb = (expected - found).abs().max()
print(f"torch {torch.__version__}, {int(differ.sum())} of {differ.numel()} codes differ, "
      f"by up to {int(lsb)}")
for place in differ.nonzero()[:10].tolist():
    at = tuple(place)
    print(f"  at {at}: expected {int(expected[at])}, found {int(found[at])}")
if not torch.equal(found, recorded.long()):
    print("note: this machine's kernel gives other codes than the one of the report")
sys.exit(1 if bool(differ.any()) else 0)
"""

_CONV = "{stride}, {padding}, {dilation}, {groups}"
# Op -> the float form, and the kernel of torch's quantized ops. {0} and {1} are inputs.
_FORMS = {
    "quantize": ("{0}", "torch.quantize_per_tensor({0}, {scale}, {zero_point}, {dtype})"),
    "linear": (
        "F.linear({0}, weight, bias)",
        "torch.ops.quantized.linear{relu}(\n"
        "    {0}, torch.ops.quantized.linear_prepack(packed, bias), {scale}, {zero_point}\n)",
    ),
    "cat": (
        "torch.cat([{all}], {dim})",
        "torch.ops.quantized.cat{relu}([{all}], {dim}, {scale}, {zero_point})",
    ),
    "adaptive_avg_pool2d": ("F.adaptive_avg_pool2d({0}, {output_size})",) * 2,
    **{
        f"conv{n}d": (
            f"F.conv{n}d({{0}}, weight, bias, {_CONV})",
            f"torch.ops.quantized.conv{n}d{{relu}}(\n"
            f"    {{0}}, torch.ops.quantized.conv{n}d_prepack(packed, bias, {_CONV}),\n"
            "    {scale}, {zero_point}\n)",
        )
        for n in (1, 2, 3)
    },
    **{
        name: (
            f"{{0}} {sign} {{1}}",
            f"torch.ops.quantized.{name}{{relu}}({{0}}, {{1}}, {{scale}}, {{zero_point}})",
        )
        for name, sign in (("add", "+"), ("mul", "*"))
    },
    **{
        name: (
            f"{of}.{name}({{0}})",
            f"torch.ops.quantized.{name}({{0}}, {{scale}}, {{zero_point}})",
        )
        for name, of in (("sigmoid", "torch"), ("hardswish", "F"))
    },
}


def script(
    title: str,
    mine: OpParameters,
    theirs: OpParameters,
    inputs: tuple[Tensor, ...],
    recorded: Tensor,
    engine: str,
    about: str,
) -> str:
    """Write the script.

    Args:
        title: Its first line.
        mine: The op as the prepared model computes it: weight, grid and range.
        theirs: The op of the converted model.
        inputs: The converted model's codes that go in (the float input of a quantize op).
        recorded: The converted model's codes that came out.
        engine: The quantized engine.
        about: What a reader has to know, a paragraph.

    Raises:
        UnsupportedError: There is no such form for the op.
    """
    base, relu = theirs.op.removesuffix("_relu"), theirs.op.endswith("_relu")
    grids = mine.output, theirs.output
    padded = theirs.options.get("padding_mode", "zeros") != "zeros"
    if base not in _FORMS or None in grids or padded:
        raise UnsupportedError(
            f"there is no script for {theirs.op}",
            where="Report.reproduce",
            found=theirs.name,
            expected=f"one of {', '.join(_FORMS)}, with zero padding and a quantized result",
            remedy="hand on fxqfix.extract_parameters and fxqfix.golden_vectors of the model",
        )
    own, other = (grid for grid in grids if grid is not None)
    lines = [_HEAD.format(title=_plain(title), about=_plain(about))]
    lines += [f"torch.backends.quantized.engine = {engine!r}", ""] if engine else [""]
    names = []
    for i, (value, grid) in enumerate(zip(inputs, theirs.input_qparams, strict=True)):
        names.append(f"x{i}")
        text = _tensor(value)
        lines.append(f"x{i} = {text if grid is None else _quantized(text, grid)}")
    lines += _weights(mine, theirs)
    lines.append(f"recorded = {_tensor(recorded)}  # what the converted model gave")
    floats, kernel = _FORMS[base]
    options = {**{k: _option(v) for k, v in theirs.options.items()}, "relu": "_relu" * relu}
    numbers = {"scale": repr(other.scales[0]), "zero_point": other.zero_points[0]}
    fields: Mapping[str, Any] = {**options, **numbers, "dtype": _dtype(other)}
    pairs = zip(names, theirs.input_qparams, strict=True)
    plain = [f"{name}.dequantize()" if grid else name for name, grid in pairs]
    said = floats.format(*plain, all=", ".join(plain), **fields)
    limits = f"{own.scales[0]!r}, {own.zero_points[0]}, {own.quant_min}, {own.quant_max}"
    lines += [
        "",
        f"value = {f'torch.relu({said})' if relu else said}",
        f"expected = codes_of(value, {limits})",
        f"found = {kernel.format(*names, all=', '.join(names), **fields)}",
        "found = found.int_repr().long()",
    ]
    return "\n".join(lines) + "\n" + _TAIL


def _weights(mine: OpParameters, theirs: OpParameters) -> list[str]:
    if theirs.weight is None or theirs.weight_qparams is None:
        return []
    lines = [f"packed = {_quantized(_tensor(theirs.weight), theirs.weight_qparams)}"]
    lines.append("weight = packed.dequantize()")
    if mine.weight is not None and mine.weight_qparams is not None:
        same = torch.equal(mine.weight, theirs.weight) and mine.weight_qparams.same_grid(
            theirs.weight_qparams
        )
        if not same:
            text = _quantized(_tensor(mine.weight), mine.weight_qparams)
            lines[1] = f"# the prepared model's weight is another one\nweight = {text}.dequantize()"
    bias = "None" if theirs.bias is None else _tensor(theirs.bias.float())
    return [*lines, f"bias = {bias}"]


def _tensor(value: Tensor) -> str:
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    data = base64.b64encode(zlib.compress(bytes(flat.tolist()), 9)).decode()
    return f'tensor("{data}", {list(value.shape)}, {value.dtype})'


def _quantized(text: str, grid: QParams) -> str:
    kind = _dtype(grid)
    if grid.axis is None:
        return f"quantized({text}, {grid.scales[0]!r}, {grid.zero_points[0]}, {kind})"
    scales, points = list(grid.scales), list(grid.zero_points)
    return f"quantized({text}, {scales}, {points}, {kind}, {grid.axis})"


def _dtype(grid: QParams) -> str:
    """Of a quantized tensor, whose codes are of the grid's storage."""
    kinds = {torch.int8: torch.qint8, torch.uint8: torch.quint8}
    return str(kinds.get(grid.storage, grid.dtype))


def _option(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)


def _plain(text: str) -> str:
    """Text that can't end the docstring, or escape in it."""
    return text.replace("\\", "/").replace('"', "'")

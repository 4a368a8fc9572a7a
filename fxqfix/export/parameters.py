"""Parameters: what each op of a quantized model computes with, as plain integers and tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxqfix._notebook import Shown
from fxqfix.errors import UnknownNameError
from fxqfix.export._files import Arrays, Stored
from fxqfix.export.arithmetic import Arithmetic
from fxqfix.export.requantize import fixed_point, int32_bias, multipliers
from fxqfix.export.step import Step
from fxqfix.qparams import QParams

__all__ = ["OpParameters", "Parameters"]

_COLUMNS = ("name", "op", "inputs", "weight", "output", "multiplier", "options")
_TENSORS = ("weight", "bias", "bias_int32", "multiplier", "fixed_multiplier", "fixed_shift")


@dataclass(frozen=True, eq=False)
class OpParameters(Shown):
    """One op of a quantized model.

    Attributes:
        name: The node's name; of a decomposed op, that of the float op that is quantized.
        op: The op's key, e.g. "conv2d_relu"; see the reference of ops.
        module: Path of the module that the op belongs to, "" where it is unknown.
        inputs: Names of the ops (or model inputs) that feed it, in order, repeated ones too.
        options: Stride, padding, dilation, groups, kernel size, dim and the like.
        input_qparams: The grid of each input, None where it is a float.
        output: The grid of the result, None where it is a float.
        limits: Lowest and highest code that the model itself lets the result have: the declared
            range where it clamps to it, else what the dtype holds. None where that is not known.
        weight: Integer codes.
        weight_qparams: Their scales, zero points and channel axis.
        layout: The weight's axes: "OIHW", "OI", "IOHW" (transposed), "NE" (embedding), ...
        bias: The float bias.
        bias_int32: ``rne(b * f(1 / f(xs * ws)))``, in units of the accumulator. None, as are the
            multipliers, where the weight has a scale per input channel: products of several units
            add up to no integer.
        multiplier: ``f(f(xs * ws) / os)``, float32: one, or one per output channel.
        fixed_multiplier: The same as an int32 in [2^30, 2^31) ...
        fixed_shift: ... and a right shift: ``multiplier == fixed_multiplier * 2^-fixed_shift``,
            as gemmlowp and TFLite have it (the shift is of the whole 64-bit product).
        tensors: Other float tensors of the op by name (normalizations, PReLU).

    Example:
        >>> import torch
        >>> from torch.ao.quantization import get_default_qconfig_mapping
        >>> from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
        >>> x = torch.linspace(-1, 1, 8).reshape(1, 8)
        >>> mapping = get_default_qconfig_mapping("fbgemm")
        >>> prepared = prepare_fx(torch.nn.Sequential(torch.nn.Linear(8, 2)).eval(), mapping, (x,))
        >>> _ = prepared(x)
        >>> import fxqfix
        >>> linear = fxqfix.extract_parameters(convert_fx(prepared))["_0"]
        >>> linear.op, linear.layout, linear.weight.shape, linear.weight.dtype
        ('linear', 'OI', torch.Size([2, 8]), torch.int8)
    """

    name: str
    op: str
    module: str = ""
    inputs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    input_qparams: tuple[QParams | None, ...] = ()
    output: QParams | None = None
    weight: Tensor | None = None
    weight_qparams: QParams | None = None
    layout: str = ""
    bias: Tensor | None = None
    bias_int32: Tensor | None = None
    multiplier: Tensor | None = None
    fixed_multiplier: Tensor | None = None
    fixed_shift: Tensor | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    limits: tuple[int, int] | None = None

    @classmethod
    def of(cls, step: Step) -> OpParameters:
        """The parameters of a step, copied out of the model."""
        found = cls(
            step.name,
            step.op,
            step.module,
            step.inputs,
            step.options,
            step.input_qparams,
            step.output,
            layout=step.layout,
            tensors={name: _copied(value) for name, value in step.tensors.items()},
            limits=step.limits,
        )
        view = step.weight
        if view is None:
            return found
        codes = _copied(view.codes).to(view.qparams.storage)
        bias = None if view.bias is None else _copied(view.bias)
        found = dataclasses.replace(found, weight=codes, weight_qparams=view.qparams, bias=bias)
        source = step.input_qparams[0] if step.input_qparams else None
        scales = step.channel_scales if step.weighted else None
        if source is None or step.output is None or scales is None:
            return found
        real = multipliers(source.scales[0], scales, step.output.scales[0])
        pairs = [fixed_point(m) for m in real.tolist()]
        return dataclasses.replace(
            found,
            bias_int32=None if bias is None else int32_bias(bias, source.scales[0], scales),
            multiplier=real,
            fixed_multiplier=torch.tensor([m for m, _ in pairs], dtype=torch.int32),
            fixed_shift=torch.tensor([s for _, s in pairs], dtype=torch.int32),
        )


@dataclass(frozen=True, eq=False)
class Parameters(Stored):
    """All ops of a quantized model, in graph order.

    Iterating gives the ops; ``parameters["conv1"]`` finds one by name.

    Attributes:
        ops: One record per op.
        inputs: Names of the model's inputs.
        outputs: Names of the ops whose results the model returns.
        arithmetic: What computes these ops; None in files that do not say it.

    Example:
        >>> import torch
        >>> from torch.ao.quantization import get_default_qconfig_mapping
        >>> from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
        >>> x = torch.linspace(-1, 1, 8).reshape(1, 8)
        >>> mapping = get_default_qconfig_mapping("fbgemm")
        >>> prepared = prepare_fx(torch.nn.Sequential(torch.nn.Linear(8, 2)).eval(), mapping, (x,))
        >>> _ = prepared(x)
        >>> import fxqfix
        >>> parameters = fxqfix.extract_parameters(convert_fx(prepared))
        >>> [op.op for op in parameters]
        ['quantize', 'linear', 'dequantize']
    """

    ops: tuple[OpParameters, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    arithmetic: Arithmetic | None = None
    KIND: ClassVar[str] = "fxqfix-parameters"

    def __iter__(self) -> Iterator[OpParameters]:
        return iter(self.ops)

    def __len__(self) -> int:
        return len(self.ops)

    def __getitem__(self, name: str) -> OpParameters:
        for op in self.ops:
            if op.name == name:
                return op
        raise UnknownNameError(
            f"no op is named {name!r}",
            where="Parameters",
            expected=f"one of {', '.join(op.name for op in self.ops)}",
        )

    def to_parts(self) -> tuple[dict[str, Any], Arrays]:
        """The header (a JSON object) and the tensors by "op/name", as the files hold them."""
        arrays: Arrays = {}
        for op in self.ops:
            named = {key: getattr(op, key) for key in _TENSORS}
            if op.weight_qparams is not None:
                # Beside the codes, since there can be thousands.
                scales, points = op.weight_qparams.scales, op.weight_qparams.zero_points
                named["weight_scale"] = torch.tensor(scales, dtype=torch.float64)
                named["weight_zero_point"] = torch.tensor(points, dtype=torch.float64)
            named |= {f"tensors/{key}": value for key, value in op.tensors.items()}
            arrays |= {f"{op.name}/{k}": v for k, v in named.items() if v is not None}
        header = {
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "arithmetic": None if self.arithmetic is None else self.arithmetic.to_dict(),
            "ops": [_op_header(op) for op in self.ops],
        }
        return header, arrays

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], arrays: Arrays) -> Parameters:
        """The record that `to_parts` took apart."""
        ops = tuple(_read_op(entry, arrays) for entry in header["ops"])
        said = header.get("arithmetic")  # files of version 1 say nothing
        arithmetic = None if said is None else Arithmetic.from_dict(said)
        return cls(ops, tuple(header["inputs"]), tuple(header["outputs"]), arithmetic)

    def __str__(self) -> str:
        """Render a line per op, in padded columns."""
        lines = [_COLUMNS, *map(_cells, self.ops)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = (map(str.ljust, line, widths) for line in lines)
        return "\n".join("  ".join(line).rstrip() for line in padded)


def _copied(value: Tensor) -> Tensor:
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _op_header(op: OpParameters) -> dict[str, Any]:
    weight = _grid(op.weight_qparams)
    if weight is not None:
        del weight["scale"], weight["zero_point"]
    return {
        "name": op.name,
        "op": op.op,
        "module": op.module,
        "inputs": list(op.inputs),
        "options": {key: _listed(value) for key, value in op.options.items()},
        "input_qparams": [_grid(q) for q in op.input_qparams],
        "output": _grid(op.output),
        "limits": None if op.limits is None else list(op.limits),
        "weight_qparams": weight,
        "layout": op.layout,
    }


def _listed(value: Any) -> Any:
    return [_listed(v) for v in value] if isinstance(value, list | tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(_tupled(v) for v in value) if isinstance(value, list | tuple) else value


def _grid(qparams: QParams | None) -> dict[str, Any] | None:
    if qparams is None:
        return None
    named = {f.name: _listed(getattr(qparams, f.name)) for f in dataclasses.fields(qparams)}
    return {**named, "dtype": str(qparams.dtype).removeprefix("torch.")}


def _read_grid(entry: Mapping[str, Any] | None) -> QParams | None:
    if entry is None:
        return None
    named = {key: _tupled(value) for key, value in entry.items()}
    return QParams(**{**named, "dtype": getattr(torch, named["dtype"])})


def _read_op(entry: Mapping[str, Any], arrays: Arrays) -> OpParameters:
    mine = f"{entry['name']}/"
    own = {key.removeprefix(mine): value for key, value in arrays.items() if key.startswith(mine)}
    grid = entry["weight_qparams"]
    if grid is not None:
        scales, points = own["weight_scale"].tolist(), own["weight_zero_point"].tolist()
        points = [int(p) if p.is_integer() else p for p in points]
        single = grid["axis"] is None
        grid = {**grid, "scale": scales[0] if single else scales}
        grid["zero_point"] = points[0] if single else points
    return OpParameters(
        name=entry["name"],
        op=entry["op"],
        module=entry["module"],
        inputs=tuple(entry["inputs"]),
        options={key: _tupled(value) for key, value in entry["options"].items()},
        input_qparams=tuple(map(_read_grid, entry["input_qparams"])),
        output=_read_grid(entry["output"]),
        limits=_tupled(entry.get("limits")),
        weight_qparams=_read_grid(grid),
        layout=entry["layout"],
        tensors={
            key.removeprefix("tensors/"): value
            for key, value in own.items()
            if key.startswith("tensors/")
        },
        **{key: own[key] for key in _TENSORS if key in own},
    )


def _cells(op: OpParameters) -> tuple[str, ...]:
    weight = ""
    if op.weight is not None and op.weight_qparams is not None:
        size = "x".join(map(str, op.weight.shape))
        axis, way = op.weight_qparams.axis, "per tensor"
        if axis is not None:
            way = "per input channel" if op.layout and op.layout[axis] == "I" else "per channel"
        weight = f"{op.layout} {size} {str(op.weight.dtype).removeprefix('torch.')} {way}"
    real = ""
    if op.multiplier is not None and op.multiplier.numel():
        low, high = float(op.multiplier.min()), float(op.multiplier.max())
        real = f"{low:.4g}" if low == high else f"{low:.4g}..{high:.4g}"
    return (
        op.name,
        op.op,
        ", ".join(op.inputs),
        weight,
        str(op.output or "float"),
        real,
        " ".join(f"{k}={_short(v)}" for k, v in op.options.items()),
    )


def _short(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)

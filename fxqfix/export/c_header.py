"""Parameters as a C header: arrays and numbers that an engine in C includes as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxqfix.engines import Qnnpack, Weighted
from fxqfix.errors import OptionError, UnsupportedError
from fxqfix.export.parameters import OpParameters, Parameters
from fxqfix.export.reference import Reference

__all__ = ["c_header", "c_names"]

_TYPES = {
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
    torch.int32: "int32_t",
    torch.float32: "float",
}
_OPTIONS = ("kernel_size", "stride", "padding", "dilation", "groups", "start_dim", "dim")
_KEYWORDS = frozenset(
    (
        *("auto", "break", "case", "char", "const", "continue", "default", "do", "double", "else"),
        *("enum", "extern", "float", "for", "goto", "if", "inline", "int", "long", "register"),
        *("restrict", "return", "short", "signed", "sizeof", "static", "struct", "switch"),
        *("typedef", "union", "unsigned", "void", "volatile", "while"),
    )
)


def c_names(names: Sequence[str]) -> dict[str, str]:
    """A C identifier for each name, none twice.

    Example:
        >>> c_names(["body.0", "body_0", "for"])
        {'body.0': 'body_0', 'body_0': 'body_0_2', 'for': 'for_'}
    """
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"\W", "_", name, flags=re.ASCII)
        plain = f"_{plain}" if not plain or plain[0].isdigit() else plain
        plain = f"{plain}_" if plain in _KEYWORDS else plain
        count, unique = 2, plain
        while unique in found.values():
            unique, count = f"{plain}_{count}", count + 1
        found[name] = unique
    return found


def c_header(parameters: Parameters, prefix: str = "fxq") -> str:
    """Write all parameters as a C header (C99): per op its codes, biases, multipliers and shifts.

    Per op NAME: ``NAME_weight`` (codes as they are, torch's layout), ``NAME_bias`` (int32, in units
    of the sums), ``NAME_multiplier`` (float32, the arithmetic's own where it has one),
    ``NAME_fixed_multiplier`` and ``NAME_fixed_shift`` (a right shift of the whole 64-bit product),
    ``NAME_scale`` and ``NAME_zero_point`` of the result, ``NAME_min`` and ``NAME_max`` (what the
    model clamps to, a fused relu included), ``NAME_input_zero_point``, and options as macros.

    Args:
        parameters: What `extract_parameters` gave.
        prefix: What all names begin with.

    Returns:
        The text of the header.

    Raises:
        OptionError: The prefix is no C identifier.

    Example:
        >>> from fxqfix.export import Parameters
        >>> print(c_header(Parameters((), (), ())).splitlines()[1])
        #define FXQ_PARAMETERS_H
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", prefix):
        raise OptionError(
            "a prefix of C names is a C identifier",
            where="c_header",
            found=repr(prefix),
            expected="letters, digits and _, no digit first",
        )
    guard = prefix.upper() + "_PARAMETERS_H"
    names = c_names([op.name for op in parameters])
    lines = [f"#ifndef {guard}", f"#define {guard}", "#include <stdint.h>", ""]
    lines.append(f"/* written by fxqfix; reference: {parameters.arithmetic or 'not known'} */")
    for op in parameters:
        lines += ["", f"/* {op.name.replace('*/', '')}: {op.op} */"]
        lines += _op(op, f"{prefix}_{names[op.name]}", parameters)
    return "\n".join([*lines, "", f"#endif /* {guard} */", ""])


def _op(op: OpParameters, name: str, parameters: Parameters) -> Iterator[str]:
    for option in _OPTIONS:
        value = op.options.get(option)
        if isinstance(value, bool) or value is None:
            continue
        if isinstance(value, tuple):
            for i, one in enumerate(v for v in value if isinstance(v, int)):
                yield _macro(f"{name}_{option}_{i}", one)
        elif isinstance(value, int):
            yield _macro(f"{name}_{option}", value)
    source = op.input_qparams[0] if op.input_qparams else None
    if source is not None:
        yield _macro(f"{name}_input_zero_point", int(source.zero_points[0]))
        yield _float(f"{name}_input_scale", source.scales[0])
    if op.output is not None:
        low, high = op.limits or op.output.container
        point = int(op.output.zero_points[0])
        yield _macro(f"{name}_zero_point", point)
        yield _macro(f"{name}_min", max(low, point) if op.op.endswith("_relu") else low)
        yield _macro(f"{name}_max", high)
        yield _float(f"{name}_scale", op.output.scales[0])
    if op.weight is None:
        return
    yield from (_macro(f"{name}_weight_{i}", n) for i, n in enumerate(op.weight.shape))
    yield _array(f"{name}_weight", op.weight)
    points = op.weight_qparams.zero_points if op.weight_qparams is not None else ()
    if points and all(float(z).is_integer() for z in points):
        whole = torch.tensor([int(z) for z in points], dtype=torch.int32)
        yield _array(f"{name}_weight_zero_point", whole)
    bias, multiplier = _own(op, parameters)
    for key, value in (
        ("bias", bias),
        ("multiplier", multiplier),
        ("fixed_multiplier", op.fixed_multiplier),
        ("fixed_shift", op.fixed_shift),
    ):
        if value is not None:
            yield _array(f"{name}_{key}", value)


def _own(op: OpParameters, parameters: Parameters) -> tuple[Tensor | None, Tensor | None]:
    """Bias and multiplier of the arithmetic, where its kernel has them as such."""
    bias, multiplier = op.bias_int32, op.multiplier
    if parameters.arithmetic is None or parameters.arithmetic.decomposed:
        return bias, multiplier
    try:
        kernel = Reference(op, parameters.arithmetic).kernel
    except UnsupportedError:
        return bias, multiplier
    found: Any = getattr(kernel, "multiplier", None) if isinstance(kernel, Weighted) else None
    if isinstance(found, Tensor):
        multiplier = found.flatten()
    if isinstance(kernel, Qnnpack) and kernel.steps is not None:
        bias = torch.round(kernel.steps).flatten().to(torch.int32)
    return bias, multiplier


def _macro(name: str, value: int) -> str:
    return f"#define {name.upper()} ({value})"


def _float(name: str, value: float) -> str:
    return f"#define {name.upper()} ({_number(value)})"


def _number(value: float) -> str:
    """A float32 literal, to the bit."""
    single = float(torch.tensor(value, dtype=torch.float32))
    return f"{single.hex()}f"


def _array(name: str, value: Tensor) -> str:
    flat = value.detach().flatten()
    if flat.dtype not in _TYPES:
        flat = flat.float() if flat.is_floating_point() else flat.to(torch.int32)
    kind = _TYPES[flat.dtype]
    values = flat.tolist()
    if flat.dtype == torch.float32:
        texts = [_number(v) for v in values]
    else:
        texts = ["INT32_MIN" if v == -(2**31) else str(v) for v in values]
    rows = [", ".join(texts[i : i + 16]) for i in range(0, len(texts), 16)]
    body = ",\n    ".join(rows) or "0"
    return f"static const {kind} {name}[{max(1, len(texts))}] = {{\n    {body}\n}};"

"""Grids as other tools' compilers take them: AIMET's and QNN's .encodings, and read back.

Two versions of the schema: "0.6.1" (a list of encodings per tensor name) and "1.0.0" (a list of
records). In both a real value is ``scale * (q + offset)`` with q in [0, 2^bits - 1].
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxqfix.errors import DataError, OptionError
from fxqfix.export.parameters import Parameters
from fxqfix.qparams import QParams

__all__ = ["VERSIONS", "Encodings", "encodings", "read_encodings"]

VERSIONS = ("0.6.1", "1.0.0")
_PARAMETER = ".weight"


@dataclass(frozen=True)
class Encodings:
    """Grids by tensor name, as a file has them.

    Attributes:
        version: Of the schema.
        activations: Name of an op -> its result's grid, with unsigned codes.
        weights: Name of an op -> its weight's grid, with unsigned codes.

    Example:
        >>> Encodings("1.0.0", {}, {}).version
        '1.0.0'
    """

    version: str
    activations: Mapping[str, QParams]
    weights: Mapping[str, QParams]

    def differences(self, parameters: Parameters) -> tuple[str, ...]:
        """What a compiler's encodings have otherwise than the parameters; () where it took them.

        Args:
            parameters: What `encodings` wrote.

        Returns:
            A sentence per tensor that is missing or on another grid, as float32 compares scales.
        """
        found = []
        for kind, mine, due in (
            ("activation", self.activations, _activations(parameters)),
            ("weight", self.weights, _weights(parameters)),
        ):
            for name, grid in due.items():
                other = mine.get(name)
                if other is None:
                    found.append(f"{kind} {name} is missing")
                elif not _same(grid, other):
                    found.append(f"{kind} {name}: {other} in place of {_unsigned(grid)}")
        return tuple(found)


def encodings(parameters: Parameters, version: str = "0.6.1") -> str:
    """Write the grids of all ops as an .encodings file of AIMET and QNN.

    Activations go by the names of the ops, weights by the same with ".weight". A declared range of
    2^n codes has a bitwidth of n; another one has the dtype's, which the schema can't narrow.

    Args:
        parameters: What `extract_parameters` gave.
        version: Of the schema: "0.6.1" or "1.0.0".

    Returns:
        JSON text.

    Raises:
        OptionError: There is no such version.

    Example:
        >>> from fxqfix.export import Parameters
        >>> json.loads(encodings(Parameters((), (), ())))["version"]
        '0.6.1'
    """
    if version not in VERSIONS:
        raise OptionError(
            "the schema has no such version",
            where="encodings",
            found=repr(version),
            expected=" or ".join(VERSIONS),
        )
    activations, weights = _activations(parameters), _weights(parameters)
    named = {f"{name}{_PARAMETER}": grid for name, grid in weights.items()}
    if version == "0.6.1":
        parts: dict[str, Any] = {
            "activation_encodings": {n: _listed(g) for n, g in activations.items()},
            "param_encodings": {n: _listed(g) for n, g in named.items()},
        }
    else:
        parts = {
            "activation_encodings": [_record(n, g) for n, g in activations.items()],
            "param_encodings": [_record(n, g) for n, g in named.items()],
        }
    return json.dumps({"version": version, **parts}, indent=1) + "\n"


def read_encodings(text_or_path: str | os.PathLike[str]) -> Encodings:
    """Read an .encodings file, of either version.

    Args:
        text_or_path: The text itself (it starts with a brace), or the path of a file.

    Raises:
        DataError: It can't be read, or is of another version.

    Example:
        >>> read_encodings(encodings(Parameters((), (), ()), "1.0.0")).version
        '1.0.0'
    """
    try:
        is_text = isinstance(text_or_path, str) and text_or_path.lstrip().startswith("{")
        text = text_or_path if is_text else Path(text_or_path).read_text(encoding="utf-8")
        data = json.loads(str(text))
        version = data.get("version")
        if version not in VERSIONS:
            raise ValueError(f"version {version!r}")
        read = _read_listed if version == "0.6.1" else _read_records
        activations, weights = (
            read(data[key]) for key in ("activation_encodings", "param_encodings")
        )
    except (AttributeError, KeyError, OSError, TypeError, ValueError, IndexError) as error:
        raise DataError(
            "the encodings can't be read",
            where="read_encodings",
            found=f"{type(error).__name__}: {error}",
            expected=f"JSON of version {' or '.join(VERSIONS)}",
        ) from error
    own = {name.removesuffix(_PARAMETER): grid for name, grid in weights.items()}
    return Encodings(version, activations, own)


def _activations(parameters: Parameters) -> dict[str, QParams]:
    return {op.name: op.output for op in parameters if op.output is not None}


def _weights(parameters: Parameters) -> dict[str, QParams]:
    found = {op.name: op.weight_qparams for op in parameters}
    return {
        name: grid
        for name, grid in found.items()
        if grid is not None and all(float(z).is_integer() for z in grid.zero_points)
    }


def _unsigned(grid: QParams) -> QParams:
    """The same grid with codes from 0."""
    size = grid.quant_max - grid.quant_min + 1
    low, bits = grid.quant_min, size.bit_length() - 1
    if size != 1 << bits:
        low, bits = grid.container[0], grid.bits
    points = tuple(int(z) - low for z in grid.zero_points)
    dtype = torch.uint8 if bits <= 8 else torch.int32
    top = min((1 << bits) - 1, torch.iinfo(torch.int32).max)
    point = points if grid.axis is not None else points[0]
    return QParams(grid.scale, point, 0, top, dtype, grid.axis)


def _same(grid: QParams, other: QParams) -> bool:
    due = _unsigned(grid)
    scales = (torch.tensor(q.scales, dtype=torch.float32) for q in (due, other))
    return (
        len(due.scales) == len(other.scales)
        and torch.equal(*scales)
        and due.zero_points == other.zero_points
        and due.quant_max == other.quant_max
    )


def _bits(grid: QParams) -> int:
    return (grid.quant_max - grid.quant_min + 1).bit_length() - 1


def _symmetric(grid: QParams) -> bool:
    return all(z == (grid.quant_max + 1) // 2 for z in grid.zero_points)


def _listed(given: QParams) -> list[dict[str, Any]]:
    grid = _unsigned(given)
    return [
        {
            "bitwidth": _bits(grid),
            "dtype": "int",
            "is_symmetric": str(_symmetric(grid)),
            "min": scale * -point,
            "max": scale * (grid.quant_max - point),
            "offset": -int(point),
            "scale": scale,
        }
        for scale, point in zip(grid.scales, grid.zero_points, strict=True)
    ]


def _record(name: str, given: QParams) -> dict[str, Any]:
    grid = _unsigned(given)
    return {
        "name": name,
        "enc_type": "PER_TENSOR" if grid.axis is None else "PER_CHANNEL",
        "dtype": "INT",
        "bw": _bits(grid),
        "is_sym": _symmetric(grid),
        "scale": list(grid.scales),
        "offset": [-int(point) for point in grid.zero_points],
    }


def _grid(scales: list[Any], offsets: list[Any], bits: Any, per_channel: bool) -> QParams:
    numbers = tuple(float(s) for s in scales)
    points = tuple(-int(o) for o in offsets)
    if type(bits) is not int or not 0 < bits <= 32 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"bits {bits!r}, scales {numbers[:3]}")
    top = min((1 << bits) - 1, torch.iinfo(torch.int32).max)
    dtype = torch.uint8 if bits <= 8 else torch.int32
    if per_channel:
        return QParams(numbers, points, 0, top, dtype, 0)
    return QParams(numbers[0], points[0], 0, top, dtype)


def _read_listed(data: Mapping[str, Any]) -> dict[str, QParams]:
    found = {}
    for name, listed in data.items():
        scales, offsets = [e["scale"] for e in listed], [e["offset"] for e in listed]
        found[name] = _grid(scales, offsets, listed[0]["bitwidth"], len(listed) > 1)
    return found


def _read_records(data: list[Any]) -> dict[str, QParams]:
    return {
        e["name"]: _grid(e["scale"], e["offset"], e["bw"], e["enc_type"] != "PER_TENSOR")
        for e in data
    }

"""What a device computed, from arrays or files, held against what each op gives.

Nothing is unpickled, and no path of a manifest leads out of its folder. What is wrong with one
tensor is said of that tensor: the others can be judged.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxqfix._extras import require
from fxqfix.errors import DataError, FxqfixError
from fxqfix.export._files import once, read_arrays
from fxqfix.export.vectors import GoldenVectors

__all__ = ["Answers", "read_answers"]

_WHERE = "judge"
_MANIFEST = "manifest.json"
_KEYS = frozenset({"name", "file", "dtype", "shape", "layout"})  # of an entry of the manifest
_NUMBERS = frozenset(
    getattr(torch, name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    )
)
_LAYOUTS = {"NCHW": "NHWC", "NCDHW": "NDHWC", "NCW": "NWC", "NCL": "NLC"}


@dataclass
class Answers:
    """Arrays by name, and what is wrong with others.

    Attributes:
        values: Name -> array.
        problems: Name -> why its array can't be used.
        notes: What else was seen.
        grids: Name -> (scale, zero point), where a quantized tensor was given.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    grids: dict[str, tuple[float, int]] = field(default_factory=dict)


def read_answers(given: Any) -> Answers:
    """Arrays from a mapping, golden vectors, a file or a folder.

    Args:
        given: A mapping of names to tensors or numpy arrays; `GoldenVectors`; the path of an .npz,
            .safetensors or .json file; or the path of a folder, of .npy files by name, or of files
            that its manifest.json names.

    Raises:
        DataError: It is none of these, or a file or the manifest as a whole can't be read.
        MissingDependencyError: numpy or safetensors is not installed.
    """
    if isinstance(given, GoldenVectors):
        return Answers(dict(given.values))
    if isinstance(given, Mapping):
        found = Answers()
        for name, value in given.items():
            _take(found, str(name), value)
        return found
    if not isinstance(given, str | os.PathLike):
        raise DataError(
            "the answers can't be read",
            where=_WHERE,
            found=type(given).__name__,
            expected="a mapping of names to arrays, a file, or a folder",
        )
    path = Path(given)
    if path.is_dir():
        return _folder(path)
    found = Answers()
    for name, value in read_arrays(path, _WHERE).items():
        _take(found, name.removeprefix("value/"), value)
    return found


def _take(found: Answers, name: str, value: Any) -> None:
    """One array of a mapping."""
    if isinstance(value, Tensor):
        try:
            found.values[name] = _of_tensor(found, name, value)
        except ValueError as error:
            found.problems[name] = str(error)
        return
    try:
        numpy = require("numpy", "export", "reading arrays")
        array = numpy.asarray(value)
        if array.dtype.kind not in "iufb":
            raise TypeError(f"dtype {array.dtype}")
        array = array.astype(array.dtype.newbyteorder("="))
        found.values[name] = torch.from_numpy(numpy.array(array))
    except FxqfixError:
        raise
    except Exception as error:  # arrays of other libraries raise anything
        found.problems[name] = f"it is no array of numbers ({_said(error)})"


def _of_tensor(found: Answers, name: str, value: Tensor) -> Tensor:
    """Numbers in memory; of a quantized tensor its codes, and its grid apart."""
    if value.is_quantized:
        if value.qscheme() != torch.per_tensor_affine:
            raise ValueError("it is a quantized tensor with more than one scale")
        found.grids[name] = (value.q_scale(), value.q_zero_point())
        return value.detach().cpu().int_repr()
    if value.is_meta:
        raise ValueError("it is a meta tensor, which holds no numbers")
    if value.layout != torch.strided or value.is_nested:
        raise ValueError("it is a sparse or nested tensor")
    if value.dtype not in _NUMBERS:
        raise ValueError(f"dtype {value.dtype} holds no codes")
    return value.detach().cpu()


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _folder(path: Path) -> Answers:
    manifest = path / _MANIFEST
    if manifest.is_file():
        return _by_manifest(path, _entries(manifest))
    files = sorted(path.glob("*.npy"))
    if not files:
        raise DataError(
            "the folder holds nothing that can be read",
            where=f"{_WHERE}, {os.fspath(path)!r}",
            expected=f".npy files named like the ops, or a {_MANIFEST}",
            remedy="write a manifest for raw files: see the documentation of judge",
        )
    found = Answers()
    for file in files:
        _npy(found, file.stem, file)
    return found


def _entries(manifest: Path) -> dict[str, Mapping[str, Any]]:
    """Name -> entry."""
    where, form = f"{_WHERE}, {os.fspath(manifest)!r}", '{"tensors": [{"name", "file", ...}]}'
    try:
        data = json.loads(manifest.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError("the manifest can't be read", where=where, found=_said(error)) from error
    listed = data.get("tensors") if isinstance(data, dict) else None
    good = isinstance(listed, list) and all(
        isinstance(e, dict) and isinstance(e.get("name"), str) for e in listed
    )
    if not good or not isinstance(listed, list):
        raise DataError("the manifest lists no tensors", where=where, expected=form)
    names = [e["name"] for e in listed]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise DataError("the manifest lists a name twice", where=where, found=", ".join(twice))
    return dict(zip(names, listed, strict=True))


def _by_manifest(path: Path, entries: Mapping[str, Mapping[str, Any]]) -> Answers:
    found = Answers()
    for name, entry in entries.items():
        _listed(found, path, name, entry)
    return found


def _listed(found: Answers, path: Path, name: str, entry: Mapping[str, Any]) -> None:
    """One tensor of a manifest."""
    if unread := sorted(entry.keys() - _KEYS):
        found.notes.append(f"{name}: of its entry in the manifest, {', '.join(unread)} is not read")
    try:
        file = _inside(path, entry.get("file", f"{name}.npy"))
        if file.suffix == ".npy":
            _npy(found, name, file)
        else:
            found.values[name] = _raw(file, entry)
        if name in found.values:
            found.values[name] = _as_said(found.values[name], entry, file.suffix == ".npy")
    except (OSError, ValueError, TypeError) as error:
        found.values.pop(name, None)
        found.problems[name] = str(error).partition("\n")[0]


def _inside(folder: Path, name: Any) -> Path:
    """A file of the folder."""
    if not isinstance(name, str) or not name:
        raise ValueError("the manifest names no file for it")
    file = (folder / name).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise ValueError(f"the manifest names a file outside of the folder: {name!r}")
    if not file.is_file():
        raise ValueError(f"there is no file {name!r}")
    return file


def _npy(found: Answers, name: str, file: Path) -> None:
    numpy = require("numpy", "export", "reading .npy")
    try:
        _take(found, name, numpy.load(file, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        found.problems[name] = f"{file.name} can't be read ({_said(error)})"


def _dtype(entry: Mapping[str, Any]) -> torch.dtype:
    said = entry.get("dtype")
    found = getattr(torch, said, None) if isinstance(said, str) else None
    if not isinstance(found, torch.dtype) or found.is_complex or found not in _NUMBERS:
        raise ValueError(f"the manifest gives it no dtype that is known: {said!r}")
    return found


def _shape(entry: Mapping[str, Any]) -> tuple[int, ...] | None:
    said = entry.get("shape")
    if said is None:
        return None
    whole = isinstance(said, list) and all(type(n) is int and n >= 0 for n in said)
    if not whole:
        raise ValueError(f"the manifest gives it no shape of whole numbers: {said!r}")
    return tuple(said)


def _raw(file: Path, entry: Mapping[str, Any]) -> Tensor:
    """Little-endian numbers without a header."""
    dtype, shape = _dtype(entry), _shape(entry)
    if shape is None:
        raise ValueError("the manifest gives it no shape, which a raw file needs")
    data = file.read_bytes()
    due = math.prod(shape) * dtype.itemsize
    if len(data) != due:
        sizes = f"{'x'.join(map(str, shape))} of {str(dtype).removeprefix('torch.')}"
        raise ValueError(f"{file.name} has {len(data)} bytes, and {sizes} are {due}")
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def _as_said(value: Tensor, entry: Mapping[str, Any], own_header: bool) -> Tensor:
    """Checked against the manifest, and in torch's layout."""
    shape = _shape(entry)
    if own_header and shape is not None and tuple(value.shape) != shape:
        raise ValueError(f"its file has shape {tuple(value.shape)}, the manifest says {shape}")
    if own_header and entry.get("dtype") is not None and value.dtype != _dtype(entry):
        raise ValueError(f"its file has dtype {value.dtype}, the manifest says {entry['dtype']}")
    layout = entry.get("layout")
    if layout is None or layout in list(_LAYOUTS):
        return value
    if layout not in list(_LAYOUTS.values()):
        known = ", ".join((*_LAYOUTS, *_LAYOUTS.values()))
        raise ValueError(f"the manifest gives it a layout that is not known: {layout!r} ({known})")
    if len(layout) != value.dim():
        raise ValueError(f"the manifest says {layout}, and it has {value.dim()} axes")
    return value.movedim(-1, 1).contiguous()

"""Files of named tensors and one JSON header: .npz, .safetensors or .json, by suffix.

Every format gives back the very bits. None runs code when it is read: there is no pickle.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from fxqfix._extras import require
from fxqfix._notebook import Shown
from fxqfix.errors import DataError, FxqfixError

__all__ = ["Stored", "read_arrays"]

_HEADER = "header"  # the JSON text's own name; every tensor's name holds a slash
# 2: parameters say their arithmetic and limits; what 1 lacks is None.
_VERSION, _READ = 2, (1, 2)

Arrays = dict[str, Tensor]
S = TypeVar("S", bound="Stored")


class Stored(Shown, ABC):
    """A record that is a JSON header and named tensors."""

    KIND: ClassVar[str]

    @abstractmethod
    def to_parts(self) -> tuple[dict[str, Any], Arrays]:
        """The header and the tensors."""

    @classmethod
    @abstractmethod
    def from_parts(cls: type[S], header: Mapping[str, Any], arrays: Arrays) -> S:
        """The record that `to_parts` took apart."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file; its suffix names the format.

        Args:
            path: Ends in .npz (numpy, without pickle), .safetensors or .json (nested lists).

        Raises:
            DataError: The suffix names no format, or the file can't be written.
            MissingDependencyError: numpy or safetensors is not installed.
        """
        write, _ = _format(path, f"{type(self).__name__}.save")
        header, arrays = self.to_parts()
        text = json.dumps({"format": self.KIND, "version": _VERSION, **header})
        try:
            write(Path(path), text, {k: v.detach().cpu().contiguous() for k, v in arrays.items()})
        except FxqfixError:
            raise
        except Exception as error:  # safetensors has errors of its own
            raise DataError(
                f"the file can't be written: {error}",
                where=f"{type(self).__name__}.save",
                found=os.fspath(path),
            ) from error

    @classmethod
    def load(cls: type[S], path: str | os.PathLike[str]) -> S:
        """Read what `save` wrote.

        Args:
            path: The file; its suffix names the format.

        Returns:
            A record equal to the one that was saved, to the bit.

        Raises:
            DataError: The suffix names no format, there is no such file, or it holds something
                else.
            MissingDependencyError: numpy or safetensors is not installed.
        """
        _, read = _format(path, f"{cls.__name__}.load")
        try:
            text, arrays = read(Path(path))
            header = json.loads(text)
        except FxqfixError:
            raise
        except Exception as error:  # each format has errors of its own for broken files
            raise cls._broken(path, "the file can't be read", error) from error
        found = header.get("format") if isinstance(header, dict) else type(header).__name__
        if found != cls.KIND or header.get("version") not in _READ:
            raise DataError(
                "the file is of another kind",
                where=f"{cls.__name__}.load, {os.fspath(path)!r}",
                found=f"{found}, version {header.get('version')}"
                if isinstance(header, dict)
                else found,
                expected=f"{cls.KIND}, version {' or '.join(map(str, _READ))}",
                remedy=f"pass a file that {cls.__name__}.save wrote",
            )
        try:
            return cls.from_parts(header, arrays)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise cls._broken(path, "a part of the file is missing or broken", error) from error

    @classmethod
    def _broken(cls, path: str | os.PathLike[str], what: str, error: Exception) -> DataError:
        return DataError(
            what,
            where=f"{cls.__name__}.load, {os.fspath(path)!r}",
            found=f"{type(error).__name__}: {error}",
            expected=f"a file that {cls.__name__}.save wrote",
        )

    def __eq__(self, other: object) -> bool:
        """True where the headers are equal and the tensors are, in dtype, shape and every bit."""
        if type(other) is not type(self) or not isinstance(other, Stored):
            return NotImplemented
        (mine, tensors), (yours, others) = self.to_parts(), other.to_parts()
        return (
            mine == yours
            and tensors.keys() == others.keys()
            and all(_same(tensor, others[name]) for name, tensor in tensors.items())
        )

    __hash__ = None  # type: ignore[assignment]  # tensors have no hash by value


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(*flat)


# --- the formats ---------------------------------------------------------------------------------


def _write_npz(path: Path, text: str, arrays: Arrays) -> None:
    numpy = require("numpy", "export", "saving .npz")
    numpy.savez(path, **{_HEADER: numpy.array(text)}, **{k: v.numpy() for k, v in arrays.items()})


def _read_npz(path: Path) -> tuple[str, Arrays]:
    numpy = require("numpy", "export", "loading .npz")
    with numpy.load(path, allow_pickle=False) as file:
        arrays = {k: torch.from_numpy(file[k]) for k in file.files if k != _HEADER}
        return str(file[_HEADER]), arrays


def _write_safetensors(path: Path, text: str, arrays: Arrays) -> None:
    save = require("safetensors.torch", "export", "saving .safetensors").save_file
    # Tensors that share memory are refused; the same value may stand under two names.
    save({k: v.clone() for k, v in arrays.items()}, path, metadata={_HEADER: text})


def _read_safetensors(path: Path) -> tuple[str, Arrays]:
    with require("safetensors", "export", "loading .safetensors").safe_open(path, "pt") as file:
        return (file.metadata() or {})[_HEADER], {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118  # no mapping


def _write_json(path: Path, text: str, arrays: Arrays) -> None:
    tensors = {
        name: {
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": list(value.shape),
            "data": value.tolist(),
        }
        for name, value in arrays.items()
    }
    path.write_text(json.dumps({**json.loads(text), "tensors": tensors}), encoding="utf-8")


def _read_json(path: Path) -> tuple[str, Arrays]:
    text = path.read_text(encoding="utf-8")
    data = json.loads(text)
    stored = data.pop("tensors", {}) if isinstance(data, dict) else {}
    arrays = {
        name: torch.tensor(v["data"], dtype=getattr(torch, v["dtype"])).reshape(v["shape"])
        for name, v in stored.items()
    }
    return json.dumps(data), arrays


def read_arrays(path: Path, where: str) -> Arrays:
    """The arrays of a file, whether it has a header of ours or none.

    Args:
        path: Ends in .npz, .safetensors or .json (names to nested lists).
        where: Who reads, for messages.

    Raises:
        DataError: The suffix names no format, or the file can't be read.
        MissingDependencyError: numpy or safetensors is not installed.
    """
    _format(path, f"{where}, {os.fspath(path)!r}")
    try:
        return _BARE[path.suffix](path)
    except FxqfixError:
        raise
    except Exception as error:  # each format has errors of its own for broken files
        raise DataError(
            "the file can't be read",
            where=f"{where}, {os.fspath(path)!r}",
            found=f"{type(error).__name__}: {error}",
        ) from error


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are there once; json and zip files would keep the last of them.

    Args:
        pairs: Keys and values, as json hands them over.

    Raises:
        ValueError: A key is there twice.
    """
    keys = [key for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"a key is there twice: {', '.join(twice)}")
    return dict(pairs)


def _bare_npz(path: Path) -> Arrays:
    numpy = require("numpy", "export", "loading .npz")
    with numpy.load(path, allow_pickle=False) as file:
        once([(name, None) for name in file.files])
        return {k: torch.from_numpy(file[k]) for k in file.files if k != _HEADER}


def _bare_safetensors(path: Path) -> Arrays:
    with require("safetensors", "export", "loading .safetensors").safe_open(path, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118  # no mapping


def _bare_json(path: Path) -> Arrays:
    data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    if isinstance(data, dict) and "format" in data:
        return _read_json(path)[1]
    return {name: torch.tensor(value) for name, value in data.items()}


_BARE: dict[str, Callable[[Path], Arrays]] = {
    ".npz": _bare_npz,
    ".safetensors": _bare_safetensors,
    ".json": _bare_json,
}

Writer = Callable[[Path, str, Arrays], None]
Reader = Callable[[Path], tuple[str, Arrays]]

_FORMATS: dict[str, tuple[Writer, Reader]] = {
    ".npz": (_write_npz, _read_npz),
    ".safetensors": (_write_safetensors, _read_safetensors),
    ".json": (_write_json, _read_json),
}


def _format(path: str | os.PathLike[str], where: str) -> tuple[Writer, Reader]:
    suffix = Path(path).suffix
    if suffix not in _FORMATS:
        raise DataError(
            "the suffix names no format",
            where=where,
            found=suffix or "no suffix",
            expected=f"one of {', '.join(_FORMATS)}",
        )
    return _FORMATS[suffix]

"""What a certificate was made by and on: versions, the CPU's levels, a digest of the data."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxqfix.comparison import versions
from fxqfix.engines.isa import isa_of
from fxqfix.measure import batches_of, tensors_of

__all__ = ["Digest", "file_digest", "identity"]

_PIECE = 2**20  # bytes of a file that are read at once


class Digest:
    """SHA-256 of batches as they stream by: dtype, shape and bytes of every tensor.

    Example:
        >>> one, two = Digest(), Digest()
        >>> one.add([torch.ones(2)])
        >>> two.add([torch.ones(2), torch.ones(1)])
        >>> str(one) == str(two)
        False
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, values: Iterable[Any]) -> None:
        """Add one batch: tensors, and nested tuples, lists and dicts of them."""
        for tensor in tensors_of(values):
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            self._hash.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            self._hash.update(_bytes(plain))

    def over(self, data: Any, where: str) -> Iterator[Any]:
        """The batches of any data, each added before it is handed on."""
        for batch in batches_of(data, where):
            self.add([batch])
            yield batch

    def __str__(self) -> str:
        """The digest of all batches so far."""
        return f"sha256:{self._hash.hexdigest()}"


def _bytes(plain: Tensor) -> bytes:
    # Not by numpy, which torch does without.
    return ctypes.string_at(plain.data_ptr(), plain.nbytes) if plain.numel() else b""


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            found.update(piece)
    return f"sha256:{found.hexdigest()}"


def identity(data: Digest) -> dict[str, str]:
    """What a certificate was made by and on.

    Args:
        data: The digest of the batches.

    Example:
        >>> sorted(identity(Digest()))
        ['cpu', 'data', 'fxqfix', 'threads', 'torch']
    """
    return {
        **versions(),
        "cpu": str(isa_of(None)),
        "threads": str(torch.get_num_threads()),
        "data": str(data),
    }

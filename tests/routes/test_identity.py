"""A certificate says what it was made by and on, and of which data and which file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fxqfix
from fxqfix.routes._identity import Digest
from tests.routes.small import linears, rows


def test_the_digest_is_of_the_values_and_their_order() -> None:
    def of(*batches: object) -> str:
        digest = Digest()
        for batch in batches:
            digest.add([batch])
        return str(digest)

    x, y = torch.rand(2, 3), torch.rand(2, 3).to(torch.bfloat16)
    assert of(x, y) == of(x.clone(), y.clone())
    others = [
        of(y, x),
        of(x),
        of(x.t(), y),
        of(x.reshape(3, 2), y),
        of(x.double(), y),
        of(x + 1, y),
    ]
    assert of(x, y) not in others
    assert len(set(others)) == len(others)
    assert of(torch.tensor(3), torch.empty(0), torch.tensor([True])).startswith("sha256:")


def test_every_route_identifies_itself() -> None:
    data = [rows(seed=0), rows(seed=1)]

    def once() -> Iterator[Tensor]:
        yield from data

    found = [
        fxqfix.certify(linears(), route, given)
        for route in ("export", "float64", "int8:fbgemm")
        for given in (data, once())
    ]
    assert len({c.identity["data"] for c in found}) == 1
    for certificate in found:
        assert certificate.identity["fxqfix"] == metadata.version("fxqfix")
        assert certificate.identity["torch"].startswith(f"{torch.__version__}, build ")
        assert certificate.identity["cpu"]
        written = json.loads(certificate.to_json())
        assert written["format"] == "fxqfix.certificate/1"
        assert written["identity"] == dict(certificate.identity)
    other = fxqfix.certify(linears(), "export", data[:1])
    assert other.identity["data"] != found[0].identity["data"]


def test_a_file_is_identified(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    done = fxqfix.migrate(linears(), [rows()], path)
    wanted = hashlib.sha256(path.read_bytes()).hexdigest()
    assert done.certificate.identity["file"] == f"sha256:{wanted}"
    written = json.loads(done.to_json())
    assert written["format"] == "fxqfix.migration/1"
    assert written["certificate"]["identity"]["file"] == f"sha256:{wanted}"


def test_the_digest_needs_no_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [torch.arange(6.0).reshape(2, 3).t(), torch.empty(0), torch.ones(3).bfloat16()]
    wanted = hashlib.sha256()
    for tensor in values:
        wanted.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        plain = tensor.contiguous().reshape(-1)
        wanted.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    monkeypatch.setattr(torch.Tensor, "numpy", None, raising=False)  # as where it is missing
    digest = Digest()
    digest.add(values)
    assert str(digest) == f"sha256:{wanted.hexdigest()}"

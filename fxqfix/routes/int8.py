"""Routes "int8:ENGINE": `to_int8` for an engine, watched by `compare`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from fxqfix import dialects
from fxqfix.dialects import CODE
from fxqfix.engines import ENGINES
from fxqfix.errors import DialectError
from fxqfix.flows.compare import compare
from fxqfix.flows.freeze import freeze
from fxqfix.flows.to_int8 import certificate_of, to_int8
from fxqfix.names import Engine
from fxqfix.report import Certificate, Certified
from fxqfix.report.data import Report
from fxqfix.routes._base import Route
from fxqfix.routes._identity import Digest, identity

__all__ = ["ROUTES"]


def _certify(
    model: nn.Module, data: Iterable[Any], progress: bool | None, engine: Engine
) -> Certificate:
    reading = dialects.read(model, "certify")
    if not reading.prepared:
        raise DialectError(
            "this route starts from a prepared model, which torch converts",
            where=f"certify, route int8:{engine}",
            found=f"a model of dialect {reading.dialect}",
            remedy="pass the prepared model; a converted one is compared with "
            "fxqfix.compare(prepared, converted, data)",
        )
    # An eager model stays one: torch's own conversion of it takes no trace.
    frozen = freeze(model)
    deployed = to_int8(frozen, engine=engine)
    digest = Digest()
    batches = digest.over(data, "certify")
    report = compare(frozen, deployed, batches, engine=engine, noise_floor=False, progress=progress)
    rows = [r for r in report.rows if r.kind == "activation"]
    narrow = [r.name for r in rows if r.prepared is not None and r.prepared.is_narrow]
    kernels = Counter(r.kernel for r in rows if r.kernel.startswith("quantized."))
    apart = (*report.coverage.unpaired, *report.coverage.unsupported)
    around = tuple((s.name, reason) for s, reason in reading.unsupported if s.source == CODE)
    checked = certificate_of(deployed)
    return Certificate(
        route=f"int8:{engine}",
        versions={"torch": torch.__version__},
        batches=report.batches,
        sites=tuple(_records(report)),
        outputs=tuple(_outputs(report)),
        narrow=len(narrow),
        pinned=sum(c.held for c in checked.ranges if c.site in narrow),
        kernels=tuple(kernels.items()),
        notes=(
            *checked.notes,
            *report.notes,
            *(f"{name}: {reason}" for name, reason in checked.possible),
        ),
        unchecked=tuple((u.name, u.reason) for u in apart) + checked.unchecked + around,
        identity=identity(digest),
    )


def _local(causes: Any) -> dict[str, int]:
    return {name: count for name, count in causes.items() if name != "upstream"}


def _records(report: Report) -> Iterable[Certified]:
    """The sites and the outputs, on the same inputs."""
    for row in report.rows:
        if row.kind != "weight" and row.local is not None:
            yield Certified(row.name, row.op, row.prepared, row.local, _local(row.causes))


def _outputs(report: Report) -> Iterable[Certified]:
    """The outputs, against the prepared model's own values."""
    for row in report.rows:
        if row.kind == "output":
            shown_by = row.name if row.local is not None else ""
            yield Certified(row.name, row.op, None, row.cumulative, shown_by=shown_by)


ROUTES = tuple(
    Route(
        name=f"int8:{engine}",
        summary=f"to_int8 for {engine}: torch's int8 kernels, ranges held",
        certify=partial(_certify, engine=engine),
    )
    for engine in ENGINES
)

"""What `migrate` wrote, and what was checked on it: record, text, JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fxqfix.measure.discrepancy import Discrepancy
from fxqfix.report import json_, text
from fxqfix.report.certificate import Certificate
from fxqfix.report.data import Report
from fxqfix.report.findings import counted
from fxqfix.report.verdict import Judged

__all__ = ["Migration"]

_LOAD = "import torch.ao.quantization.quantize_fx (registers the ops), then torch.export.load"


@dataclass(frozen=True)
class Migration(Judged):
    """A .pt2 file, and what it was seen to compute.

    Attributes:
        path: The file.
        size: Its bytes.
        dynamic_batch: Whether it takes any size of its inputs' first dimension.
        sites: Quantized activations; each has the grid, range and clamp of the graph in the file.
        weights: Quantized weights; each has the codes and the grid of the graph in the file.
        certificate: The loaded file, as the route deploys it, beside the decomposed graph.
        trained: The loaded file's outputs against those of ``freeze(prepared)``; `differing` counts
            values whose bits differ. None where there is no such model to ask (see `notes`).
        report: What the old conversion computes, where it was given.
        notes: What a reader has to know.

    Example:
        >>> certificate = Certificate("export", {"torch": "2.13.0"}, 1, (), (), 0, 0, ())
        >>> Migration("model.pt2", 1024, True, 3, 2, certificate, Discrepancy(elements=8)).verdict
        'not judged'
    """

    path: str
    size: int
    dynamic_batch: bool
    sites: int
    weights: int
    certificate: Certificate
    trained: Discrepancy | None = None
    report: Report | None = None
    notes: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the certificate is, and the file gives every bit of the trained model."""
        return self.certificate.exact and not self.reasons

    @property
    def faults(self) -> tuple[str, ...]:
        """Those of the certificate, and outputs that are not the trained model's."""
        apart = self.trained.differing if self.trained is not None else 0
        said = (f"{apart} outputs are not those of freeze(prepared)",) if apart else ()
        return (*said, *self.certificate.faults)

    @property
    def left_out(self) -> tuple[str, ...]:
        """What the certificate left out."""
        return self.certificate.left_out

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        return {
            "path": self.path,
            "verdict": self.verdict,
            "ok": self.ok,
            "exact": self.exact,
            "reasons": list(self.reasons),
            "size": self.size,
            "dynamic_batch": self.dynamic_batch,
            "sites": self.sites,
            "weights": self.weights,
            "trained": None if self.trained is None else self.trained.to_dict(),
            "certificate": self.certificate.to_dict(),
            "old_conversion": None if self.report is None else self.report.causes,
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """The same as JSON text."""
        return json_.record("migration", self.to_dict())

    def __str__(self) -> str:
        """Render what was written, the certificate, and what the old conversion does."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        verdict = "NOT what was trained" if self.faults else self.verdict
        batch = "any batch size" if self.dynamic_batch else "the first batch's sizes only"
        yield f"migrate: {self.path}, {self.size:,} bytes, {batch}: {verdict}"
        parts = f"{counted(self.sites, 'site')} and {counted(self.weights, 'weight')}"
        yield f"- loaded back: {parts} equal the graph's, to the bit"
        if self.trained is not None:
            found = self.trained
            yield "- its outputs against freeze(prepared): " + (
                f"{found.differing:,} of {found.elements:,} values differ"
            )
        yield from (f"- {note}" for note in self.notes)
        yield f"- to load it: {_LOAD}"
        yield f"\n{self.certificate}"
        if self.report is not None:
            yield f"\nthe old conversion, against the prepared model: {text.verdict(self.report)}"
            yield from text.causes(self.report)

"""Two reports of the same two models, on different data, added up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from fxqfix.dialects.site import digits_apart, qparams_text
from fxqfix.errors import PairingError
from fxqfix.measure.culprits import Culprit
from fxqfix.measure.discrepancy import Discrepancy
from fxqfix.measure.histogram import Histogram
from fxqfix.report.data import Report
from fxqfix.report.rows import Coverage, Row, Uncovered

__all__ = ["merged"]

Sums = TypeVar("Sums", Discrepancy, Histogram)


def merged(report: Report, other: object) -> Report:
    """Add up two reports, in any order: counts are the same, float sums but for their last bits.

    Args:
        report: One.
        other: What has to be the report of other data on the same pair of models.

    Returns:
        A report of both data.

    Raises:
        PairingError: The reports are of different models, or the other is none.

    Example:
        >>> merged(Report(rows=(), batches=1), Report(rows=(), batches=2)).batches
        3
    """
    if not isinstance(other, Report):
        raise PairingError(
            "only a report can be merged with a report",
            where="Report.merge",
            found=type(other).__name__,
            expected="what compare returned for other data",
        )
    mine, theirs = (
        [(row.name, row.prepared, row.converted) for row in one.rows] for one in (report, other)
    )
    if (mine, report.engine) != (theirs, other.engine):
        raise PairingError(
            "only reports of the same two models can be merged",
            where="Report.merge",
            found=_apart(report, other),
            remedy="compare one and the same prepared and converted model on each part of the "
            "data; on the ranks of a distributed run broadcast buffers first, since their "
            "observers drift apart",
        )
    rows = tuple(_rows(a, b) for a, b in zip(report.rows, other.rows, strict=True))
    levels = {level for one in (report, other) for level in one.isa.split(" and ") if level}
    return replace(
        report,
        source=None,
        rows=rows,
        batches=report.batches + other.batches,
        coverage=_coverage(report.coverage, other.coverage),
        notes=_both(report.notes, other.notes),
        corrected=_culprits(report, other),
        isa=" and ".join(sorted(levels)),
        threads=report.threads if report.threads == other.threads else 0,
        made=_made(report.made, other.made),
    )


def _made(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, str]:
    said = {key: [one[key] for one in (a, b) if key in one] for key in (*a, *b)}
    return {key: " and ".join(sorted({*" and ".join(s).split(" and ")})) for key, s in said.items()}


def _apart(report: Report, other: Report) -> str:
    """The first thing that tells the models of two reports apart: site and scales, in words."""
    if report.engine != other.engine:
        return f"engine {other.engine or 'unknown'}, and {report.engine or 'unknown'} here"
    for a, b in zip(report.rows, other.rows, strict=False):
        if a.name != b.name:
            return f"site {b.name!r} in the place of {a.name!r}"
        for side in ("prepared", "converted"):
            here, there = getattr(a, side), getattr(b, side)
            if here != there:
                digits = 6 if None in (here, there) else digits_apart(here, there)
                texts = [g if g is None else qparams_text(g, digits) for g in (there, here)]
                return f"site {a.name!r}: {side} {texts[0]}, and {texts[1]} here"
    return f"{len(other.rows)} rows, and {len(report.rows)} here"


def _add(a: Sums | None, b: Sums | None) -> Sums | None:
    return a + b if a is not None and b is not None else None


def _rows(a: Row, b: Row) -> Row:
    if a.kind == "weight":  # weights are compared once, whatever the data
        return a
    return replace(
        a,
        local=_add(a.local, b.local),
        cumulative=a.cumulative + b.cumulative,
        noise_floor=_add(a.noise_floor, b.noise_floor),
        quantization=_add(a.quantization, b.quantization),
        causes=dict(sorted((Counter(a.causes) + Counter(b.causes)).items())),
        evidence=_evidence(a, b),
        either=a.differing + b.differing,
        histogram=_add(a.histogram, b.histogram),
        problems=_both(a.problems, b.problems),
    )


def _both(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
    """Sentences of both, in an order that does not depend on which came first."""
    return a if a == b else tuple(sorted({*a, *b}))


def _evidence(a: Row, b: Row) -> dict[str, str]:
    """One sentence per cause; of two the first in the alphabet: no order of merging counts."""
    causes = sorted({*a.evidence, *b.evidence})
    return {c: min(row.evidence[c] for row in (a, b) if c in row.evidence) for c in causes}


def _coverage(a: Coverage, b: Coverage) -> Coverage:
    """What both reports compared; what one of them left out was left out."""
    if a == b:
        return a
    return Coverage(
        paired=tuple(pair for pair in sorted(a.paired) if pair in b.paired),
        unpaired=_gone(a.unpaired, b.unpaired),
        unsupported=_gone(a.unsupported, b.unsupported),
        lacking=_gone(a.lacking, b.lacking),
    )


def _gone(a: tuple[Uncovered, ...], b: tuple[Uncovered, ...]) -> tuple[Uncovered, ...]:
    return tuple(sorted({*a, *b}, key=lambda site: (site.side, site.name, site.reason)))


def _culprits(a: Report, b: Report) -> tuple[Culprit, ...] | None:
    """Of the sites that were corrected in both."""
    if a.corrected is None or b.corrected is None:
        return None
    others = {c.name: c for c in b.corrected}
    found = [c + others[c.name] for c in a.corrected if c.name in others]
    return tuple(sorted(found, key=lambda c: (c.after.noise, c.name)))

"""Observers and fake-quants: calibrated, at rest, on, and of the qparams that will be baked."""

from __future__ import annotations

from collections.abc import Iterator

from fxqfix import _torch
from fxqfix.checks._base import Check, Finding, Subject
from fxqfix.dialects import Site
from fxqfix.dialects.quantizer import observing

__all__ = ["CHECKS"]

_FREEZE = "convert fxqfix.freeze(prepared) instead of prepared"


def _uncalibrated(subject: Subject) -> Iterator[Finding]:
    for tap in subject.reading.taps:
        if not tap.site.calibrated:
            yield Finding(
                "uncalibrated",
                "error",
                tap.site.name,
                "it never saw data (min=inf, max=-inf, or scale=1 and zero_point=0)",
                "run calibration batches through the prepared model",
            )


def _moving(subject: Subject) -> Iterator[Finding]:
    if subject.training:
        return
    for path, module in subject.modules.items():
        if _torch.is_fake_quant(module) and observing(module):
            yield Finding(
                "moving-observer",
                "warning",
                path,
                "its observer is on in eval mode: every batch moves scale and zero_point",
                f"prepared.apply({subject.toolbox}.disable_observer), or fxqfix.freeze",
            )


def _differs(site: Site) -> bool:
    """Whether the forward quantizes on another grid than conversion would bake."""
    known = site.used is not None and site.baked is not None and site.calibrated
    return known and site.quantizes and not site.used.same_grid(site.baked)  # type: ignore[union-attr, arg-type]  # known


def _baked(subject: Subject, code: str) -> Iterator[Finding]:
    for tap in subject.reading.taps:
        site = tap.site
        stale = site.source.startswith("buffers")
        if stale != (code == "stale-qparams") or not _differs(site):
            continue
        yield Finding(
            code,
            "error",
            site.name,
            f"forward uses {site.used_text} ({site.source}), conversion bakes {site.baked_text}",
            _FREEZE,
        )


def _scale_formula(subject: Subject) -> Iterator[Finding]:
    return _baked(subject, "scale-formula")


def _stale(subject: Subject) -> Iterator[Finding]:
    return _baked(subject, "stale-qparams")


def _off(subject: Subject) -> Iterator[Finding]:
    for tap in subject.reading.taps:
        if not tap.site.quantizes and "switched off" in tap.site.source:
            yield Finding(
                "fake-quant-off",
                "error",
                tap.site.name,
                f"{tap.site.source}: the forward computes in float here, conversion quantizes",
                f"prepared.apply({subject.toolbox}.enable_fake_quant)",
            )


def _only(subject: Subject) -> Iterator[Finding]:
    sites = [t.site.name for t in subject.reading.taps if t.site.source.startswith("observer (")]
    off = {f.site for f in _off(subject)}
    sites = [name for name in sites if name not in off]
    if sites:
        yield Finding(
            "observer-only",
            "info",
            sites[0],
            f"{len(sites)} sites are observed and not quantized: the forward computes in float",
            "judge the quantized network by fxqfix.freeze(prepared), which quantizes them",
        )


PLACE = 10
CHECKS = (
    Check("uncalibrated", "an observer that never saw data", _uncalibrated),
    Check("moving-observer", "a fake-quant whose observer is on in eval mode", _moving),
    Check(
        "scale-formula", "the forward's qparams are not those that will be baked", _scale_formula
    ),
    Check("stale-qparams", "buffers that the observer has moved away from", _stale),
    Check("fake-quant-off", "a fake-quant that is switched off", _off),
    Check("observer-only", "observers, which don't quantize", _only),
)

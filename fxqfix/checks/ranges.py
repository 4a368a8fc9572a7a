"""Ranges and scales: what the engine drops, what shares a grid, and grids that say nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fxqfix import _torch
from fxqfix.checks._base import Check, Finding, Subject
from fxqfix.dialects import Tap, parents
from fxqfix.dialects._propagate import scalar_qparams
from fxqfix.dialects.prepared import shared_calls
from fxqfix.dialects.site import qparams_text
from fxqfix.qparams import FLOOR, QParams

__all__ = ["CHECKS"]

_EPSILON = 1.2e-7  # float32's, which observers add to a range


def _range_lost(subject: Subject) -> Iterator[Finding]:
    for tap in subject.reading.activations:
        used = tap.site.used
        if used is not None and used.is_narrow:
            low, high = used.container
            yield Finding(
                "range-lost",
                "warning",
                tap.site.name,
                f"declared [{used.quant_min},{used.quant_max}]; int8 kernels clamp at "
                f"[{low},{high}]",
                "fxqfix.to_int8 or fxqfix.to_decomposed, which hold the range",
            )


def _sub_8_bit(subject: Subject) -> Iterator[Finding]:
    for tap in subject.reading.taps:
        used = tap.site.used
        if used is not None and used.quant_max - used.quant_min < 2**7 - 2:
            steps = used.quant_max - used.quant_min + 1
            yield Finding(
                "narrow-range",
                "info",
                tap.site.name,
                f"{steps} codes in a container of {used.bits} bits",
                "none needed; no engine gains speed or memory from it",
            )


def _shared(subject: Subject) -> Iterator[Finding]:
    """What becomes one grid at conversion, and is several before it."""
    if subject.exported:  # each op requantizes to its own site's grid
        return
    yield from _shared_modules(subject)
    yield from _with_numbers(subject)
    # prepare_fx shares the observer wherever convert_fx keeps the grid, but for dropout, whose
    # kernel takes a scale and ignores it; eager mode leaves it to the user.
    is_eager = _torch.observed_attributes(subject.graph_module) is None
    for tap in subject.reading.activations:
        match = subject.matches.get(tap.producer)
        used = tap.site.used
        if match is None or used is None or not tap.site.calibrated:
            continue
        ups = [t for t in parents(tap.producer.all_input_nodes, subject.taps) if t.site.used]
        others = [t for t in ups if t.site.used and not t.site.used.same_grid(used)]
        kept = match.spec.output in ("input", "shape") and match.spec.key != "cat"
        if kept and others and (is_eager or match.spec.key == "dropout"):
            up = others[0]
            assert up.site.used is not None  # filtered above
            yield Finding(
                "shared-qparams",
                "warning",
                tap.site.name,
                f"it quantizes to {qparams_text(used)}; the int8 op keeps its input's "
                f"{qparams_text(up.site.used)} ({up.site.name})",
                "let both share one observer, as prepare_fx does for most such ops",
            )
        if match.spec.key == "cat" and others:
            yield Finding(
                "shared-qparams",
                "info",
                tap.site.name,
                f"{len(others)} of {len(ups)} inputs have another grid: cat rounds them anew",
                "let the inputs share one observer where that loss counts",
            )


def _shared_modules(subject: Subject) -> Iterator[Finding]:
    """Calls of one module whose outputs have several grids: its int8 module has the last one's."""
    for path, nodes in shared_calls(subject.graph_module).items():
        behind = {n: (n, *n.users) for n in nodes}
        taps = [t for n in nodes for t in subject.taps.values() if t.producer in behind[n]]
        last = taps[-1].site if taps else None
        if last is None or last.used is None:
            continue
        for tap in taps[:-1]:
            if tap.site.used is not None and not tap.site.used.same_grid(last.used):
                yield Finding(
                    "shared-qparams",
                    "error",
                    tap.site.name,
                    f"{path} is called {len(nodes)} times and converts to one output scale, that "
                    f"of {last.name}: {qparams_text(tap.site.used)} becomes "
                    f"{qparams_text(last.used)}",
                    "fxqfix.freeze, which gives each call a module of its own",
                )


def _with_numbers(subject: Subject) -> Iterator[Finding]:
    """``x * 2``, ``x + 1``: int8 kernels keep the codes and work the grid out of their input's."""
    picked: dict[Tap, QParams] = {}  # the grids that such kernels have
    for tap in subject.reading.activations:
        node, used = tap.producer, tap.site.used
        match = subject.matches.get(node)
        relu = match is not None and match.key == "relu" and len(node.all_input_nodes) == 1
        if relu and len(node.all_input_nodes[0].users) == 1:
            node = node.all_input_nodes[0]
            match = subject.matches.get(node)
        numbers = [a for a in node.args[:2] if isinstance(a, int | float)]
        ups = list(parents(node.all_input_nodes, subject.taps))
        if match is None or match.key not in ("add", "mul") or used is None or len(ups) != 1:
            continue
        source = picked.get(ups[0], ups[0].site.used)
        if not numbers or source is None or source.axis is not None or source.bits > 8:
            continue
        key = f"{match.key}_relu" if node is not tap.producer else match.key
        theirs = picked[tap] = scalar_qparams(key, numbers[0], source)
        close = math.isclose(theirs.scales[0], used.scales[0], rel_tol=2.0**-22)  # float32
        if not close or theirs.zero_points != used.zero_points:
            yield Finding(
                "shared-qparams",
                "warning",
                tap.site.name,
                f"it quantizes to {qparams_text(used)}; the int8 kernel of {match.key} with a "
                f"number keeps its input's codes, on {qparams_text(theirs)}",
                "convert with fxqfix.to_int8 or fxqfix.to_decomposed, which keep this grid",
            )


def _degenerate(subject: Subject) -> Iterator[Finding]:
    for tap in subject.reading.taps:
        used = tap.site.used
        if used is None or used.axis is not None or not tap.site.calibrated:
            continue
        # The floor is of 8-bit grids: with more codes, a scale that small may well be one.
        floor = FLOOR * min(1.0, 255 / (used.quant_max - used.quant_min))
        if used.scales[0] <= _EPSILON or (
            tap.site.kind == "activation" and used.scales[0] <= floor
        ):
            yield Finding(
                "degenerate-scale",
                "warning",
                tap.site.name,
                f"scale {used.scales[0]:.3g} is an observer's floor: the value was constant",
                "calibrate on real data, or keep this op in float",
            )


PLACE = 40
CHECKS = (
    Check("range-lost", "a declared range that int8 kernels don't know", _range_lost),
    Check("narrow-range", "ranges of less than 7 bits", _sub_8_bit),
    Check("shared-qparams", "ops that need one grid, and sites that differ", _shared),
    Check("degenerate-scale", "scales at an observer's floor", _degenerate),
)

"""What `certify` measured of a deployed form beside its decomposed graph: records, text, JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fxqfix._notebook import Shown
from fxqfix.measure.discrepancy import Discrepancy
from fxqfix.qparams import QParams
from fxqfix.report import json_, text
from fxqfix.report.findings import counted
from fxqfix.report.verdict import Judged, disallowed

__all__ = ["Certificate", "Certified"]


@dataclass(frozen=True)
class Certified(Shown):
    """One site, or one output, of the deployed form.

    Attributes:
        name: The site's name; "output" and its number for an output.
        op: The op that computes it.
        grid: Its declared qparams; None for a value that stays float.
        found: Against the decomposed graph. For a site on the same inputs; for an output at the
            end of the whole model. Of a float value `differing` counts values whose bits differ.
        causes: Cause -> codes; they add up to all that differ. Empty for outputs.
        shown_by: Of an output: name of the record in `sites` that has it on the same inputs, ""
            where none has.

    Example:
        >>> Certified("conv", "conv2d", None, Discrepancy(elements=8)).found.exact
        True
    """

    name: str
    op: str
    grid: QParams | None
    found: Discrepancy
    causes: Mapping[str, int] = field(default_factory=dict)
    shown_by: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        grid = None if self.grid is None else str(self.grid)
        causes = dict(self.causes)
        return {
            "name": self.name,
            "op": self.op,
            "grid": grid,
            "found": self.found.to_dict(),
            "causes": causes,
            "shown_by": self.shown_by,
        }


@dataclass(frozen=True)
class Certificate(Judged):
    """What a deployed form was seen to compute, beside the decomposed graph on the same data.

    Attributes:
        route: The route's name.
        versions: Package -> version, of what took part.
        batches: Batches read.
        sites: One record per site that the route lets one look at, on the same inputs.
        outputs: One record per output of the whole deployed model.
        narrow: Activations whose declared range is narrower than their dtype.
        pinned: Those of them that a clamp in the graph pins.
        kernels: (kernel, how many) that the deployed form computes on integers, as the route tells.
        notes: What a reader has to know.
        unchecked: (name, why) of what could not be looked at.
        identity: Versions of fxqfix and torch (its build too), the CPU's levels, threads, digests
            of the data and of the file.

    Example:
        >>> site = Certified("fc", "linear", None, Discrepancy(elements=8))
        >>> seen = Certified("output 0", "", None, Discrepancy(elements=8), shown_by="fc")
        >>> certificate = Certificate("export", {"torch": "2.13.0"}, 1, (site,), (seen,), 0, 0, ())
        >>> certificate.verdict, certificate.exact, certificate.differing
        ('ok', True, 0)
    """

    route: str
    versions: Mapping[str, str]
    batches: int
    sites: tuple[Certified, ...]
    outputs: tuple[Certified, ...]
    narrow: int
    pinned: int
    kernels: tuple[tuple[str, int], ...]
    notes: tuple[str, ...] = ()
    unchecked: tuple[tuple[str, str], ...] = ()
    identity: Mapping[str, str] = field(default_factory=dict)

    @property
    def differing(self) -> int:
        """Codes that differ at the sites, on the same inputs."""
        return sum(s.found.differing for s in self.sites if s.grid is not None)

    @property
    def out_of_range(self) -> int:
        """Codes outside of the declared range, at the sites and in the outputs."""
        return sum(r.found.out_of_range for r in (*self.sites, *self.outputs))

    @property
    def max_lsb(self) -> int:
        """The largest difference of two codes at a site, on the same inputs."""
        return max((s.found.max_lsb for s in self.sites), default=0)

    @property
    def causes(self) -> dict[str, int]:
        """Cause -> codes (and values that stay float), over all sites."""
        total: Counter[str] = Counter()
        for site in self.sites:
            total.update(site.causes)
        return dict(total.most_common())

    @property
    def unexplained(self) -> int:
        """Codes that differ on the same inputs for no cause that is known."""
        return self.causes.get("unexplained", 0)

    @property
    def integer_kernels(self) -> int:
        """How many kernels of the deployed form compute on integers."""
        return sum(count for _, count in self.kernels)

    @property
    def exact(self) -> bool:
        """Whether all was looked at, and every code and every bit of the outputs is the graph's."""
        return not self.left_out and all(r.found.exact for r in (*self.sites, *self.outputs))

    @property
    def faults(self) -> tuple[str, ...]:
        """Codes out of range or more than one apart, and causes that `ALLOWED` does not list."""
        bad = disallowed("Certificate", self.causes)
        found = [f"{name}: {count} codes" for name, count in bad.items()]
        if self.out_of_range:
            found.append(f"{self.out_of_range} codes out of range")
        if self.max_lsb > 1:
            found.append(f"codes are up to {self.max_lsb} apart on the same inputs")
        apart = [o.name for o in self.outputs if o.found.differing and self._shown(o) is not None]
        if apart and all(site.found.exact for site in self.sites):
            found.append(f"{', '.join(apart)} differs, and no site does on the same inputs")
        return tuple(found)

    @property
    def left_out(self) -> tuple[str, ...]:
        """What could not be looked at, outputs that differ for no site that was looked at."""
        found = [f"{name}: {reason}" for name, reason in self.unchecked]
        if not any(site.found.elements for site in self.sites):
            found.append("no site was looked at")
        else:
            empty = [record for record in (*self.sites, *self.outputs) if not record.found.elements]
            found += [f"{record.name}: the batches held no value of it" for record in empty]
        if not self.outputs:
            found.append("no output was looked at")
        found += [
            f"{o.name}: {o.found.differing} of {o.found.elements} values differ, and no site that "
            "was looked at shows why"
            for o in self.outputs
            if o.found.differing and self._shown(o) is None
        ]
        return tuple(found)

    def _shown(self, output: Certified) -> Certified | None:
        """The record that has an output on the same inputs."""
        return next((s for s in self.sites if s.name == output.shown_by), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        return {
            "route": self.route,
            "verdict": self.verdict,
            "ok": self.ok,
            "exact": self.exact,
            "reasons": list(self.reasons),
            "versions": dict(self.versions),
            "identity": dict(self.identity),
            "batches": self.batches,
            "differing": self.differing,
            "max_lsb": self.max_lsb,
            "out_of_range": self.out_of_range,
            "causes": self.causes,
            "narrow": self.narrow,
            "pinned": self.pinned,
            "kernels": [list(k) for k in self.kernels],
            "sites": [s.to_dict() for s in self.sites],
            "outputs": [o.to_dict() for o in self.outputs],
            "notes": list(self.notes),
            "unchecked": [list(u) for u in self.unchecked],
        }

    def to_json(self) -> str:
        """The same as JSON text."""
        return json_.record("certificate", self.to_dict())

    def __str__(self) -> str:
        """Render as text and a table."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        verdict = "exact" if self.exact else _VERDICTS[self.verdict]
        packages = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        batches = counted(self.batches, "batch", "es")
        yield f"certify: route {self.route}, {packages}; {batches}: {verdict}"
        yield from (f"- {o.name}: {_counted(o)}{self._set_off(o)}" for o in self.outputs)
        codes = sum(s.found.elements for s in self.sites if s.grid is not None)
        yield f"- sites, on the same inputs: {self.differing:,} of {codes:,} codes differ, " + (
            f"by at most {self.max_lsb}; {self.out_of_range:,} out of range"
        )
        yield f"- ranges narrower than their dtype: {self.narrow}, pinned by a clamp: {self.pinned}"
        kernels = ", ".join(f"{count} {name}" for name, count in self.kernels)
        yield f"- kernels on integers: {kernels or 'none'}"
        if self.sites:
            headers = ("site", "op", "range", "elements", "differ", "LSB", "out", "causes")
            yield "\n" + text.listing(headers, [_cells(s) for s in self.sites])
        if self.notes:
            yield "\nnotes:\n" + "\n".join(f"- {note}" for note in self.notes)
        if self.faults:
            yield "\nnot ok:\n" + "\n".join(f"- {fault}" for fault in self.faults)
        if self.unchecked:
            yield "\nnot checked:\n" + text.listing(("name", "reason"), self.unchecked)

    def _set_off(self, output: Certified) -> str:
        """Of an output that differs: what it is once the sites before it get the right codes."""
        shown = self._shown(output)
        if not output.found.differing:
            return ""
        if shown is None:
            return "; no site that was looked at shows why"
        if shown.found.exact:
            return "; given the decomposed graph's codes it is equal"
        left = ", ".join(f"{name} {count}" for name, count in shown.causes.items())
        return f"; given the decomposed graph's codes {shown.found.differing:,} differ ({left})"


_VERDICTS = {
    "ok": "ok",
    "not ok": "NOT what the graph computes",
    "not judged": "not judged, since not all could be checked",
}


def _counted(output: Certified) -> str:
    found = output.found
    if output.grid is None:
        most = f", by at most {found.max_abs:.3g}" if found.differing else ""
        return f"{found.differing:,} of {found.elements:,} floats differ{most}"
    most = f", by at most {found.max_lsb}" if found.differing else ""
    outside = f"; {found.out_of_range:,} out of range"
    if found.noise and not found.max_lsb:  # the same codes
        outside += f"; values are up to {found.max_abs:.3g} off those of their codes"
    return f"{found.differing:,} of {found.elements:,} codes differ{most}{outside}"


def _cells(site: Certified) -> tuple[Any, ...]:
    found = site.found
    causes = ", ".join(f"{name} {count}" for name, count in site.causes.items())
    declared = "float" if site.grid is None else site.grid.range_text
    apart = f"{found.max_abs:.3g}" if site.grid is None else found.max_lsb
    counts = (found.elements, found.differing, apart, found.out_of_range)
    return (site.name, site.op, declared, *counts, causes)

"""What `certify` measured of a deployed form beside its decomposed graph: records, text, JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fxqfix.measure.discrepancy import Discrepancy
from fxqfix.qparams import QParams
from fxqfix.report import json_, text
from fxqfix.report.findings import counted

__all__ = ["Certificate", "Certified"]


@dataclass(frozen=True)
class Certified:
    """One site, or one output, of the deployed form.

    Attributes:
        name: The site's name; "output" and its number for an output.
        op: The op that computes it.
        grid: Its declared qparams; None for a value that stays float.
        found: Against the decomposed graph. For a site on the same inputs; for an output at the
            end of the whole model. Of a float value `differing` counts values whose bits differ.
        causes: Cause -> codes; they add up to all that differ. Empty for outputs.

    Example:
        >>> Certified("conv", "conv2d", None, Discrepancy(elements=8)).found.exact
        True
    """

    name: str
    op: str
    grid: QParams | None
    found: Discrepancy
    causes: Mapping[str, int] = field(default_factory=dict)

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
        }


@dataclass(frozen=True)
class Certificate:
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

    Example:
        >>> seen = Certified("output 0", "", None, Discrepancy(elements=8))
        >>> certificate = Certificate("export", {"torch": "2.13.0"}, 1, (), (seen,), 0, 0, ())
        >>> certificate.ok, certificate.exact, certificate.differing
        (True, True, 0)
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
        """Whether every code of every site and every bit of the outputs is the graph's."""
        return all(r.found.exact for r in (*self.sites, *self.outputs))

    @property
    def ok(self) -> bool:
        """Whether no code leaves its range, and what differs is one code and explained.

        Outputs that differ are explained by the sites; where no site could be looked at, they may
        not differ.
        """
        judged = bool(self.sites) or self.exact
        return judged and not self.out_of_range and self.max_lsb <= 1 and not self.unexplained

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        return {
            "route": self.route,
            "ok": self.ok,
            "exact": self.exact,
            "versions": dict(self.versions),
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
        return json_.dumps(self.to_dict())

    def __str__(self) -> str:
        """Render as text and a table."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        verdict = "exact" if self.exact else "ok" if self.ok else "NOT what the graph computes"
        packages = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        batches = counted(self.batches, "batch", "es")
        yield f"certify: route {self.route}, {packages}; {batches}: {verdict}"
        yield from (f"- {o.name}: {_counted(o)}" for o in self.outputs)
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
        if self.unchecked:
            yield "\nnot checked:\n" + text.listing(("name", "reason"), self.unchecked)


def _counted(output: Certified) -> str:
    found = output.found
    if output.grid is None:
        most = f", by at most {found.max_abs:.3g}" if found.differing else ""
        return f"{found.differing:,} of {found.elements:,} floats differ{most}"
    most = f", by at most {found.max_lsb}" if found.differing else ""
    outside = f"; {found.out_of_range:,} out of range"
    return f"{found.differing:,} of {found.elements:,} codes differ{most}{outside}"


def _cells(site: Certified) -> tuple[Any, ...]:
    found = site.found
    causes = ", ".join(f"{name} {count}" for name, count in site.causes.items())
    declared = "float" if site.grid is None else site.grid.range_text
    apart = f"{found.max_abs:.3g}" if site.grid is None else found.max_lsb
    counts = (found.elements, found.differing, apart, found.out_of_range)
    return (site.name, site.op, declared, *counts, causes)

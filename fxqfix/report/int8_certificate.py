"""What `to_int8` proved of its result without data, as plain records and as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from fxqfix.report import json_, text
from fxqfix.report.verdict import Judged

__all__ = ["CheckedRange", "CheckedWeight", "Int8Certificate", "Routed", "Saturating"]


@dataclass(frozen=True)
class CheckedRange:
    """The declared range of one activation, and why the result can't leave it.

    Attributes:
        site: The site's name.
        quant_min: Lowest code declared.
        quant_max: Highest code declared.
        clamped: Whether a `hold_range` stands behind the op.
        reason: Why there is a clamp, or why none is needed.
        held: Whether the codes that the result can give all lie in the range.
        same_grid: Whether scale and zero point are the frozen model's.

    Example:
        >>> CheckedRange("x", 0, 127, True, "quantize can give 0..255", True, True).held
        True
    """

    site: str
    quant_min: int
    quant_max: int
    clamped: bool
    reason: str
    held: bool
    same_grid: bool


@dataclass(frozen=True)
class CheckedWeight:
    """One weight of the result against the frozen model's, code for code.

    Attributes:
        site: The weight site's name.
        elements: Number of codes.
        differing: How many differ.
        same_qparams: Whether scales and zero points are equal.
        bias: "equal", "none", or by how much it differs at most.

    Example:
        >>> CheckedWeight("conv.weight", 72, 0, True, "equal").equal
        True
    """

    site: str
    elements: int
    differing: int
    same_qparams: bool
    bias: str

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differing and self.same_qparams and self.bias in ("equal", "none")


@dataclass(frozen=True)
class Routed:
    """An op that does not run on its engine's own kernel as torch would have it.

    Attributes:
        node: Its node.
        op: Its key in the op table.
        way: "float island", "contiguous input" or "memory order".
        reason: The row of known-wrong kernels, or what the kernel can't do.

    Example:
        >>> Routed("up", "conv_transpose2d", "float island", "transposed-permutes").way
        'float island'
    """

    node: str
    op: str
    way: str
    reason: str


@dataclass(frozen=True)
class Saturating:
    """An op whose products can leave int16 on CPUs without VNNI, while its input is in range.

    fbgemm's kernels for depthwise convolutions add in int16 on any CPU.

    Attributes:
        node: Its node.
        pairs: Pairs of weights that can.
        highest: The highest code that its input can have.

    Example:
        >>> Saturating("conv", 36, 255).pairs
        36
    """

    node: str
    pairs: int
    highest: int


@dataclass(frozen=True)
class Int8Certificate(Judged):
    """What was checked on the int8 model that `to_int8` returned.

    Attributes:
        engine: The engine that it is packed for.
        torch: Version of torch.
        ranges: One record per activation whose range is declared.
        weights: One record per quantized weight.
        routed: Ops that go round a wrong kernel.
        saturating: Ops whose int16 sums can saturate on CPUs without VNNI.
        unchecked: (name, why) of what could not be checked.
        defects: (name, why) of ops that run on a kernel that is known to be wrong.
        possible: (name, why) of ops that may run on one: the graph can't tell.
        unless: (ops, when): sizes of inputs for which a kernel is wrong; the certificate holds for
            all others.
        notes: What else a reader has to know, the device that the model was on for one.
        broken: (name, why) of ops that get floats where they take codes, or the other way round:
            the model can't run.

    Example:
        >>> certificate = Int8Certificate("fbgemm", "2.13.0", (), (), (), (), ())
        >>> certificate.verdict, certificate.left_out
        ('not judged', ('no range and no weight was checked',))
    """

    engine: str
    torch: str
    ranges: tuple[CheckedRange, ...]
    weights: tuple[CheckedWeight, ...]
    routed: tuple[Routed, ...]
    saturating: tuple[Saturating, ...]
    unchecked: tuple[tuple[str, str], ...]
    defects: tuple[tuple[str, str], ...] = ()
    possible: tuple[tuple[str, str], ...] = ()
    unless: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    broken: tuple[tuple[str, str], ...] = ()

    @property
    def exact(self) -> bool:
        """False: no output was computed. `certify` and `compare` run the model."""
        return False

    @property
    def faults(self) -> tuple[str, ...]:
        """Ranges not held or on another grid, other weights, wrong kernels, what can't run."""
        ranges = [r for r in self.ranges if not (r.held and r.same_grid)]
        found = [f"{r.site}: range {_range_text(r)}" for r in ranges]
        found += [f"{w.site}: {_weight_text(w)}" for w in self.weights if not w.equal]
        found += [f"{name}: the model can't run: {problem}" for name, problem in self.broken]
        return (*found, *(f"{name}: {reason}" for name, reason in self.defects))

    @property
    def left_out(self) -> tuple[str, ...]:
        """What could not be checked, and what the graph can't tell."""
        found = tuple(f"{name}: {reason}" for name, reason in (*self.unchecked, *self.possible))
        nothing = not self.ranges and not self.weights
        return (*found, "no range and no weight was checked") if nothing else found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        judged = {"verdict": self.verdict, "ok": self.ok, "exact": self.exact}
        return {**judged, "reasons": list(self.reasons), **asdict(self)}

    def to_json(self) -> str:
        """The same as JSON text."""
        return json_.record("int8-certificate", self.to_dict())

    def __str__(self) -> str:
        """Render as tables."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        clamps = sum(r.clamped for r in self.ranges)
        held = sum(r.held for r in self.ranges)
        equal = sum(w.equal for w in self.weights)
        verdict = "NOT as declared" if self.faults else self.verdict
        yield f"to_int8: {self.engine}, torch {self.torch}: {verdict}"
        yield f"- ranges held: {held} of {len(self.ranges)}, {clamps} by a clamp"
        yield f"- weights equal, code for code: {equal} of {len(self.weights)}"
        yield from (f"- {note}" for note in self.notes)
        yield ""
        rows = [
            (r.site, f"[{r.quant_min},{r.quant_max}]", _range_text(r), r.reason)
            for r in self.ranges
        ]
        yield text.listing(("site", "declared", "held", "reason"), rows)
        different = [(w.site, _weight_text(w)) for w in self.weights if not w.equal]
        yield from _section("weights that differ", ("weight", "how"), different)
        routed = [(r.node, r.op, r.way, r.reason) for r in self.routed]
        yield from _section("ways round", ("node", "op", "way", "reason"), routed)
        saturating = [(s.node, s.pairs, s.highest) for s in self.saturating]
        headers = ("node", "pairs of weights", "input codes up to")
        yield from _section("int16 saturation possible without VNNI", headers, saturating)
        heads = ("name", "reason")
        yield from _section("can't run", heads, self.broken)
        yield from _section("runs on a kernel that is wrong", heads, self.defects)
        yield from _section("may run on a kernel that is wrong", heads, self.possible)
        yield from _section("not checked", heads, self.unchecked)
        yield from _section("holds unless an input has these sizes", ("ops", "when"), self.unless)


def _range_text(record: CheckedRange) -> str:
    if not record.same_grid:
        return "on another grid"
    if not record.held:
        return "NOT held"
    return "clamp" if record.clamped else "by itself"


def _weight_text(record: CheckedWeight) -> str:
    said = [f"{record.differing} of {record.elements} codes differ"] if record.differing else []
    if not record.same_qparams:
        said.append("other qparams")
    return ", ".join([*said, *([] if record.bias in ("equal", "none") else [record.bias])])


def _section(title: str, headers: tuple[str, ...], rows: Any) -> Iterator[str]:
    if rows:
        yield f"\n{title}:"
        yield text.listing(headers, rows)

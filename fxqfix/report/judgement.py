"""What `judge` found: record, text, JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fxqfix._notebook import Shown
from fxqfix.errors import DataError, UnknownNameError
from fxqfix.measure.discrepancy import Discrepancy
from fxqfix.report import json_, text
from fxqfix.report.verdict import ALLOWED, Judged

__all__ = ["Explanation", "JudgedOp", "Judgement"]

_KIND = "judgement"
_SURE = 5  # bits: less than one chance in 32 that one of those tried fits by chance


@dataclass(frozen=True)
class Explanation(Shown):
    """One deviation, or two together, and the codes that it gives.

    Attributes:
        deviations: Their names; see `fxqfix deviations`.
        summary: What the device does, in one sentence.
        remedy: What to change.
        explained: Codes that differ from the reference and that this gives.
        differing: Codes that differ from the reference.
        broken: Codes that are the reference's and that this would change.
        variant: The form of it that was computed, e.g. "rounding=up".

    Example:
        >>> print(Explanation(("half-up",), "it rounds halves up", "round to even", 3, 3, 0))
        half-up: it rounds halves up (3 of 3 codes); to change: round to even
    """

    deviations: tuple[str, ...]
    summary: str
    remedy: str
    explained: int
    differing: int
    broken: int
    variant: str = ""

    @property
    def complete(self) -> bool:
        """Whether it gives every code of the op."""
        return self.explained == self.differing and not self.broken

    @property
    def allowed(self) -> bool:
        """Whether a healthy deployment does so."""
        return self.complete and set(self.deviations) <= ALLOWED["Judgement"]

    def __str__(self) -> str:
        """Render in one line."""
        counted = f"{self.explained:,} of {self.differing:,} codes"
        if self.broken:
            counted += f", and {self.broken:,} others would change"
        name = " + ".join(self.deviations)
        if not self.complete:
            return f"{name} ({counted})"
        return f"{name}: {self.summary} ({counted}); to change: {self.remedy}"


@dataclass(frozen=True)
class JudgedOp(Shown):
    """One op of a device.

    Attributes:
        name: Its name in the parameters.
        op: Its key.
        local: Against what the reference gives on the device's own inputs; None where that is not
            known (see `reason`).
        cumulative: Against the golden vectors; None without them.
        named: What gives every code; they are equal on these data.
        best: Where nothing does: what leaves least, or None.
        separation: An input on which those that are named differ.
        through: Ops before it that the device did not give: the reference stands in for them.
        reason: Why nothing can be said, "" where something can.
        tried: How many hypotheses were computed.
        constant: The one number that the device gives everywhere; None where it gives several.

    Example:
        >>> JudgedOp("fc", "linear", Discrepancy(elements=8)).equal
        True
    """

    name: str
    op: str
    local: Discrepancy | None = None
    cumulative: Discrepancy | None = None
    named: tuple[Explanation, ...] = ()
    best: Explanation | None = None
    separation: str = ""
    through: tuple[str, ...] = ()
    reason: str = ""
    tried: int = 0
    constant: float | None = None

    @property
    def equal(self) -> bool:
        """Whether every code is the reference's, on the device's own inputs."""
        return self.local is not None and not self.local.differing

    @property
    def allowed(self) -> bool:
        """Whether what differs is what a healthy deployment does."""
        return self.equal or any(e.allowed for e in self.named)

    @property
    def few(self) -> bool:
        """Whether the codes are too few to tell a true explanation from one that fits by chance.

        What differs has about log2(elements choose differing) bits, and a sign and a size for each
        code. A wrong hypothesis fits all of it with a chance of 2 ** -bits, and `tried` of them had
        that chance.
        """
        if not self.named or self.local is None:
            return False
        n, k = self.local.elements, self.local.differing
        places = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        bits = places / math.log(2) + k * (1 + math.log2(max(1.0, self.local.sum_lsb / k)))
        return bits < math.log2(max(1, self.tried)) + _SURE

    def sentences(self) -> Iterator[str]:
        """What differs and why; nothing where nothing does."""
        if self.local is None or self.equal:
            return
        yield f"{self.local.differing:,} of {self.local.elements:,} codes differ" + (
            f" (with {', '.join(self.through)} as the reference has it)" if self.through else ""
        )
        if self.constant is not None:
            yield (
                f"the device gives {self.constant:g} everywhere, as a buffer that nothing was "
                "written to would"
            )
        yield from map(str, self.named)
        if self.named and self.separation:
            yield f"equal on these data; {self.separation}"
        if self.few:
            yield (
                f"these are few codes, and {self.tried:,} hypotheses were tried: one may fit by "
                "chance; give more inputs"
            )
        if not self.named and self.best is not None:
            left = self.best.differing - self.best.explained + self.best.broken
            yield (
                f"nothing gives all of them; nearest is {self.best}, which leaves {left:,}: "
                "no finding"
            )
        elif not self.named:
            yield "no deviation that is known explains them"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("local", "cumulative"):
            value = found[name]
            found[name] = None if value is None else value.to_dict()
        found["named"] = [asdict(e) for e in self.named]
        found["best"] = None if self.best is None else asdict(self.best)
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> JudgedOp:
        """The inverse of `to_dict`."""
        found = dict(data)
        for name in ("local", "cumulative"):
            if found[name] is not None:
                found[name] = Discrepancy.from_dict(found[name])
        found["named"] = tuple(map(_explanation, found["named"]))
        found["best"] = None if found["best"] is None else _explanation(found["best"])
        return cls(**{**found, "through": tuple(found["through"])})


def _explanation(data: Mapping[str, Any]) -> Explanation:
    return Explanation(**{**data, "deviations": tuple(data["deviations"])})


@dataclass(frozen=True)
class Judgement(Judged):
    """What a device computes, op by op, beside the reference.

    Attributes:
        arithmetic: What the reference is.
        ops: The ops that the device gave, in graph order.
        unchecked: (name, why) of what was not looked at.
        other_inputs: Inputs of the model that are not the golden ones.
        unknown: Names in the answers that are no op's.
        notes: What else a reader has to know.

    Example:
        >>> judgement = Judgement("qnnpack, isa vnni, 1 thread", ())
        >>> judgement.verdict, judgement.left_out
        ('not judged', ('no op was looked at',))
    """

    arithmetic: str
    ops: tuple[JudgedOp, ...]
    unchecked: tuple[tuple[str, str], ...] = ()
    other_inputs: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def op(self, name: str) -> JudgedOp:
        """The op of that name.

        Raises:
            UnknownNameError: The device gave none.
        """
        for found in self.ops:
            if found.name == name:
                return found
        raise UnknownNameError(
            f"no op is named {name!r}",
            where="Judgement.op",
            expected=", ".join(op.name for op in self.ops) or "nothing: no op was judged",
        )

    @property
    def exact(self) -> bool:
        """Whether everything was looked at, and every code is the reference's."""
        apart = any(op.cumulative is not None and op.cumulative.differing for op in self.ops)
        return not self.reasons and not apart and all(op.equal for op in self.ops)

    @property
    def faults(self) -> tuple[str, ...]:
        """Codes that no healthy deployment has, and inputs that are not the golden ones."""
        found = [f"the model's input {name} is not the golden one" for name in self.other_inputs]
        wrong = (op for op in self.ops if op.local is not None and not op.allowed)
        return (*found, *(f"{op.name}: {'; '.join(op.sentences())}" for op in wrong))

    @property
    def left_out(self) -> tuple[str, ...]:
        """What was not looked at."""
        found = [f"{name}: {why}" for name, why in self.unchecked]
        found += [
            f"{op.name}: {op.local.differing:,} of {op.local.elements:,} codes differ, too few to "
            "tell why"
            for op in self.ops
            if op.local is not None and not op.equal and op.allowed and op.few
        ]
        if not any(op.local is not None for op in self.ops):
            found.append("no op was looked at")
        return tuple(found)

    @property
    def causes(self) -> dict[str, int]:
        """Names of deviations -> codes that they explain; those that are equal share a key.

        Codes that nothing explains count under "unexplained".
        """
        found: dict[str, int] = {}
        for op in self.ops:
            if op.local is None or op.equal:
                continue
            name = " or ".join("+".join(e.deviations) for e in op.named) or "unexplained"
            found[name] = found.get(name, 0) + op.local.differing
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "verdict": self.verdict,
            "ok": self.ok,
            "exact": self.exact,
            "reasons": list(self.reasons),
            "arithmetic": self.arithmetic,
            "ops": [op.to_dict() for op in self.ops],
            "unchecked": [list(pair) for pair in self.unchecked],
            "other_inputs": list(self.other_inputs),
            "unknown": list(self.unknown),
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """The same as JSON text."""
        return json_.record(_KIND, self.to_dict())

    @classmethod
    def from_json(cls, given: str) -> Judgement:
        """The record that `to_json` wrote.

        Raises:
            DataError: The text is something else.
        """
        try:
            data = json.loads(given)
            if data["format"] != f"fxqfix.{_KIND}/1":
                raise ValueError(f"the format is {data['format']!r}")
            return cls(
                data["arithmetic"],
                tuple(map(JudgedOp.from_dict, data["ops"])),
                tuple((name, why) for name, why in data["unchecked"]),
                *(tuple(data[name]) for name in ("other_inputs", "unknown", "notes")),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                "the text is no judgement",
                where="Judgement.from_json",
                found=f"{type(error).__name__}: {error}",
                expected="what Judgement.to_json wrote",
            ) from error

    def table(self, fmt: str = "simple") -> str:
        """A line per op.

        Args:
            fmt: A format of tabulate.
        """
        heads = ("op", "kind", "codes", "differ", "largest", "against golden", "named")
        return text.listing(heads, map(_cells, self.ops), fmt)

    def __str__(self) -> str:
        """Render the verdict, the table, and a sentence or two per op that differs."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        said = "every code is the reference's" if self.exact else self.verdict
        yield f"judge: reference {self.arithmetic}: {said}"
        yield from (f"- {note}" for note in self.notes)
        yield from (f"- the model's input {n} is not the golden one" for n in self.other_inputs)
        if self.unknown:
            yield f"- in the answers, but no op: {', '.join(self.unknown)}"
        if self.ops:
            yield f"\n{self.table()}"
        for op in self.ops:
            told = list(op.sentences())
            if told:
                yield f"\n{op.name} ({op.op}): {told[0]}"
                yield from (f"- {line}" for line in told[1:])
        if self.unchecked:
            yield "\nnot looked at:"
            yield text.listing(("name", "reason"), self.unchecked)


def _cells(op: JudgedOp) -> tuple[str, ...]:
    local, golden = op.local, op.cumulative
    named = " or ".join(" + ".join(e.deviations) for e in op.named)
    if local is not None and local.differing and not op.named:
        named = "?"
    return (
        op.name,
        op.op,
        f"{local.elements}" if local is not None else "-",
        f"{local.differing}" if local is not None else "-",
        f"{local.max_lsb}" if local is not None else "-",
        f"{golden.differing}" if golden is not None else "-",
        named or op.reason,
    )

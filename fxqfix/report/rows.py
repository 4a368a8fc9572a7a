"""What a report is made of: a row per site and per output, and what has no row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fxqfix._notebook import Shown
from fxqfix.errors import UnknownNameError
from fxqfix.measure.discrepancy import Discrepancy, decibels
from fxqfix.measure.histogram import Histogram
from fxqfix.names import RowKind
from fxqfix.qparams import QParams

__all__ = ["GRIDS", "Coverage", "Row", "Uncovered", "names_own_grid"]


@dataclass(frozen=True)
class Uncovered(Shown):
    """A site that is in no row, and why.

    Attributes:
        name: The site's name in its own model.
        side: "prepared" or "converted".
        reason: Why it has no row.

    Example:
        >>> from fxqfix.report import Uncovered
        >>> Uncovered("add_1", "prepared", "no site of the converted model has its inputs").side
        'prepared'
    """

    name: str
    side: str
    reason: str


@dataclass(frozen=True)
class Coverage(Shown):
    """Which sites were compared, and why the rest was not.

    Attributes:
        paired: (prepared name, converted name, how it was paired: "name" or "dataflow").
        unpaired: Sites without a partner, with the reason.
        unsupported: Sites that can't be read or compared, with the reason.
        lacking: What the prepared model returns and the converted one does not: a fault.

    Example:
        >>> from fxqfix.report import Coverage
        >>> Coverage((("conv", "conv", "name"),)).ratio
        1.0
    """

    paired: tuple[tuple[str, str, str], ...] = ()
    unpaired: tuple[Uncovered, ...] = ()
    unsupported: tuple[Uncovered, ...] = ()
    lacking: tuple[Uncovered, ...] = ()

    @property
    def ratio(self) -> float:
        """Paired sites over all sites of the prepared model (1.0 where it has none)."""
        missing = sum(u.side == "prepared" for u in (*self.unpaired, *self.unsupported))
        return len(self.paired) / (len(self.paired) + missing) if self.paired or missing else 1.0


@dataclass(frozen=True)
class Row(Shown):
    """One paired site, or one output of the model.

    Attributes:
        name: The site's name in the prepared model; "output" and its number for an output.
        kind: "activation", "weight" or "output". Of an output `differing` counts values whose bits
            differ.
        module: Module path.
        op: Key of the op table.
        kernel: What computes the value in the converted model, e.g. "quantized.conv2d_relu".
        prepared: The qparams that the prepared model uses; None for an output, which is no site.
        converted: The qparams that the converted model holds; None for an output.
        local: Given the same inputs: what this op adds. None where there is nothing to re-compute.
        cumulative: Against the prepared model's own value.
        noise_floor: The prepared model against itself, every pre-quantize value scaled by
            (1 + 1e-6); None for weights.
        quantization: The frozen prepared model's own value against the float model's: what
            quantization costs up to here; `differing` and LSB are of the float value's code. None
            without `float_model`, and for weights.
        causes: Cause name -> number of codes; adds up to all codes that differ locally or
            cumulatively.
        evidence: Cause name -> the numbers that it rests on, as a sentence.
        inputs: Names of the sites that this one is computed from.
        note: What is special about this row, "" as a rule.
        problems: What could not be computed at this site, so that its causes are less sure: a
            recomputation that failed, and why. Empty as a rule.
        engine: The engine whose kernel computes the value: what "x86" picks, or what qnnpack
            leaves to the shared kernels; "" where no quantized kernel does.
        accumulator: Largest sum of products, in absolute value, that the integer weights and the
            container of the input's codes allow; None for ops without a weight.
        saturation: Pairs of weights whose products can leave int16 on CPUs without VNNI; 0: no
            input can make one saturate, on any CPU. None for ops without a weight.
        either: Codes that differ locally or cumulatively, as counted; None: not counted.
        histogram: The codes of both models, counted; None where they are wider than 8 bits.
        source: The line of the user's code that calls the op, "" where the graph does not say.

    Example:
        >>> import torch
        >>> q, same = QParams(0.5, 0, 0, 255, torch.quint8), Discrepancy(elements=8)
        >>> row = Row("relu", "activation", "", "relu", "quantized.relu", q, q, same, same)
        >>> row.exact, row.local_share
        (True, 0.0)
    """

    name: str
    kind: RowKind
    module: str
    op: str
    kernel: str
    prepared: QParams | None
    converted: QParams | None
    local: Discrepancy | None
    cumulative: Discrepancy
    noise_floor: Discrepancy | None = None
    causes: Mapping[str, int] = field(default_factory=dict, hash=False)
    evidence: Mapping[str, str] = field(default_factory=dict, hash=False)
    inputs: tuple[str, ...] = ()
    note: str = ""
    problems: tuple[str, ...] = ()
    engine: str = ""
    accumulator: int | None = None
    saturation: int | None = None
    either: int | None = None
    histogram: Histogram | None = field(default=None, repr=False)
    source: str = ""
    quantization: Discrepancy | None = None

    def __post_init__(self) -> None:
        """Copy the mappings: plain dicts pickle, so that reports come back from workers."""
        object.__setattr__(self, "causes", dict(self.causes))
        object.__setattr__(self, "evidence", dict(self.evidence))

    def __str__(self) -> str:
        """One line: what differs, and why."""
        found, values = (
            self.local or self.cumulative,
            "values" if self.kind == "output" else "codes",
        )
        why = ", ".join(f"{cause} {count}" for cause, count in self.causes.items())
        parts = [
            f"{found.differing} of {found.elements} {values} differ on the same inputs",
            f"{self.cumulative.differing} by now",
            f"SQNR {decibels(self.cumulative.sqnr_db)}",
            why,
        ]
        return f"{self.name} ({self.op}): {'; '.join(filter(None, parts))}"

    @property
    def grids(self) -> tuple[QParams, QParams]:
        """The prepared and the converted qparams.

        Raises:
            UnknownNameError: The row is a float output, which has none.
        """
        if self.prepared is None or self.converted is None:
            raise UnknownNameError(
                "a float output has no qparams",
                where=f"row {self.name!r}",
                remedy="ask the rows of the sites that it is computed from, row.inputs",
            )
        return self.prepared, self.converted

    @property
    def noise_floor_db(self) -> float:
        """SQNR of the nudged prepared model against itself, dB; inf where nothing flipped."""
        return self.noise_floor.sqnr_db if self.noise_floor is not None else math.inf

    @property
    def local_share(self) -> float:
        """Share of the codes that differ given the same inputs; of all codes where no local is."""
        return _share(self.local or self.cumulative)

    @property
    def cumulative_share(self) -> float:
        """Share of the codes that differ from the prepared model's own."""
        return _share(self.cumulative)

    @property
    def differing(self) -> int:
        """Codes that differ locally or cumulatively: what the causes add up to, where asked for."""
        return sum(self.causes.values()) if self.either is None else self.either

    @property
    def exact(self) -> bool:
        """True where no value and no integer differs, locally and cumulatively."""
        return self._same_values and self.shift == 0

    @property
    def shift(self) -> int:
        """By how much the converted integers are higher where values are equal: another zero point.

        0 where the containers differ (quint8, qint8), whose integers can't be the same. Of several
        channels the largest shift.
        """
        mine, theirs = self.prepared, self.converted
        if mine is None or theirs is None or mine.storage != theirs.storage:
            return 0
        points = zip(mine.zero_points, theirs.zero_points, strict=False)
        return int(max((b - a for a, b in points), key=abs, default=0))

    @property
    def off_grid(self) -> bool:
        """True where values differ and no code does: the converted grid is another one."""
        codes = self.cumulative.differing + (self.local.differing if self.local else 0)
        return codes == 0 and not self._same_values

    @property
    def rescaled(self) -> bool:
        """True where values differ and the converted scales are not the prepared ones."""
        mine, theirs = self.prepared, self.converted
        if mine is None or theirs is None or self._same_values:
            return False
        return [_float32(s) for s in mine.scales] != [_float32(s) for s in theirs.scales]

    @property
    def _same_values(self) -> bool:
        return self.cumulative.exact and (self.local is None or self.local.exact)


def _float32(scale: float) -> float:
    """As kernels have it."""
    return float(torch.tensor(scale, dtype=torch.float32))


def _share(found: Discrepancy) -> float:
    return found.differing / max(found.elements, 1)


# Causes of another grid: who accepts one accepts grids that differ where no code shows it.
GRIDS = frozenset(
    {"scale-formula", "stale-qparams", "moving-observer", "shared-qparams", "other-qparams"}
)


def names_own_grid(row: Row) -> bool:
    """Whether a cause of another grid stands in a row for the row's own, not for its weight's.

    Args:
        row: A row with causes.
    """
    said = (row.evidence.get(cause, "") for cause in GRIDS & row.causes.keys())
    return any(text.startswith(f"{row.name}: ") for text in said)

"""Site and Inspection: every place where values become quantized, whatever the dialect."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fxqfix._notebook import Shown
from fxqfix.errors import UnknownNameError
from fxqfix.names import RowKind
from fxqfix.qparams import QParams

__all__ = ["Inspection", "Site", "closest", "digits_apart", "grid_text", "qparams_text"]


@dataclass(frozen=True)
class Site(Shown):
    """One place where values become quantized.

    Attributes:
        name: The node that produces the value ("conv1", or "x" for an input); weights are
            "<node>.weight".
        kind: "activation" or "weight".
        module: Path of the module that the value comes from, "" where no module is involved.
        op: Key of the op table's row, e.g. "conv2d_relu"; "input" for a placeholder.
        used: The qparams that the forward pass uses; None for a dynamic or a float site.
        baked: The qparams that conversion would bake; None where nothing is left to convert.
        source: Where `used` was read, e.g. "fused kernel (FusedMovingAvgObsFakeQuantize)".
        quantizes: Whether the forward pass quantizes here; False for observers, fake-quants that
            are switched off, and dynamic placeholders.
        calibrated: False where an observer never saw data, so that the qparams mean nothing.
        shape: Shape of a weight; None for activations, whose shape depends on the data.

    Example:
        >>> from fxqfix import Site
        >>> Site("conv", "activation", "conv", "conv2d").name
        'conv'
    """

    name: str
    kind: RowKind
    module: str
    op: str
    used: QParams | None = None
    baked: QParams | None = None
    source: str = ""
    quantizes: bool = True
    calibrated: bool = True
    shape: tuple[int, ...] | None = None

    @property
    def used_text(self) -> str:
        """`used` in a few characters, or why it means nothing."""
        if not self.calibrated:
            return "uncalibrated"
        if self.used is None:
            return "-"
        return qparams_text(self.used, self._digits) + (
            "" if self.quantizes else " (observed only)"
        )

    @property
    def baked_text(self) -> str:
        """`baked` in a few characters, "" where conversion would change nothing."""
        if self.baked is None or self.baked == self.used:
            return ""
        return qparams_text(self.baked, self._digits)

    @property
    def _digits(self) -> int:
        if self.used is None or self.baked is None or self.used.same_grid(self.baked):
            return 6
        return digits_apart(self.used, self.baked)

    @property
    def bytes_text(self) -> str:
        """Bytes of a weight, as float32 and as codes; "" for activations."""
        if self.shape is None:
            return ""
        return f"{self.float_bytes} -> {self.code_bytes}" if self.used else f"{self.float_bytes}"

    @property
    def cells(self) -> tuple[str, ...]:
        """What a table shows of the site, under `Inspection.HEADERS`."""
        return (
            self.name,
            self.kind,
            self.module,
            self.op,
            self.used_text,
            self.baked_text,
            self.bytes_text,
            self.source,
        )

    @property
    def float_bytes(self) -> int:
        """Bytes of a weight held as float32; 0 for activations."""
        return 4 * self._elements

    @property
    def code_bytes(self) -> int:
        """Bytes of a weight's integer codes; 0 for activations and unquantized weights."""
        return (self._elements * self.used.bits + 7) // 8 if self.used else 0

    @property
    def _elements(self) -> int:
        count = 1 if self.shape is not None else 0
        for size in self.shape or ():
            count *= size
        return count


@dataclass(frozen=True)
class Inspection(Shown):
    """All sites of a model, in graph order.

    Attributes:
        dialect: The flow that the model comes from, e.g. "fx-prepared".
        sites: The sites, in graph order; a weight stands before the op that uses it.
        unsupported: (name, reason) of what could not be read as a site.

    Example:
        >>> from fxqfix import Inspection, Site
        >>> found = Inspection("fx-prepared", (Site("x", "activation", "", "input"),))
        >>> [s.name for s in found], found.site("x").op
        (['x'], 'input')
    """

    HEADERS: ClassVar[tuple[str, ...]] = (
        "site",
        "kind",
        "module",
        "op",
        "used",
        "baked where it differs",
        "bytes",
        "source",
    )

    dialect: str
    sites: tuple[Site, ...]
    unsupported: tuple[tuple[str, str], ...] = ()

    def site(self, name: str) -> Site:
        """Return the site of that name, or of that module path where only one has it.

        Raises:
            UnknownNameError: There is no such site; the nearest names are listed.
        """
        for site in self.sites:
            if site.name == name:
                return site
        same = [s for s in self.sites if s.module == name and s.kind == "activation"]
        if len(same) == 1:
            return same[0]
        raise UnknownNameError(
            f"no site is named {name!r}",
            where="inspect",
            remedy=f"use one of {closest(name, [s.name for s in self.sites])}",
        )

    def __iter__(self) -> Iterator[Site]:
        """Iterate over the sites in graph order."""
        return iter(self.sites)

    def __len__(self) -> int:
        """Count the sites."""
        return len(self.sites)

    @property
    def weight_bytes(self) -> tuple[int, int]:
        """(bytes as float32, bytes as integer codes) of all weights together."""
        weights = [s for s in self.sites if s.kind == "weight"]
        return sum(s.float_bytes for s in weights), sum(s.code_bytes for s in weights)

    @property
    def total(self) -> str:
        """The count of sites and the bytes of all weights, in one line."""
        line = f"{self.dialect}: {len(self)} site{'' if len(self) == 1 else 's'}"
        weights = [site for site in self.sites if site.kind == "weight"]
        quantized = sum(site.float_bytes for site in weights if site.used)
        kept = sum(site.float_bytes for site in weights if not site.used)
        if quantized:
            codes = self.weight_bytes[1]
            line += f", weights {quantized} bytes as float32, {codes} as codes"
        return f"{line}, {kept} bytes of weights stay float32" if kept else line

    def __str__(self) -> str:
        """Render the sites in padded columns, then the total and what could not be read."""
        lines = [self.HEADERS, *(site.cells for site in self.sites)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = (map(str.ljust, line, widths) for line in lines)
        unread = (f"not read: {name}: {reason}" for name, reason in self.unsupported)
        return "\n".join([*("  ".join(line).rstrip() for line in padded), self.total, *unread])


def closest(name: str, names: list[str], count: int = 5) -> list[str]:
    """The names most like `name`, or the first few where none is alike."""
    return difflib.get_close_matches(str(name), names, n=count, cutoff=0.3) or names[:count]


def grid_text(qparams: QParams, digits: int = 6) -> str:
    """Scale and zero point in a few characters.

    Args:
        qparams: Where they stand.
        digits: Significant digits of one scale; a span over channels shows three less.

    Returns:
        "scale/zero point", with lowest..highest where channels differ.

    Example:
        >>> import torch
        >>> grid_text(QParams(1 / 255, -128, 0, 255, torch.quint8))
        '0.00392157/-128'
        >>> grid_text(QParams((0.1, 2 / 3), (0, 0), -128, 127, torch.qint8, axis=0))
        '0.1..0.667/0'
    """
    return f"{_span(qparams.scales, digits)}/{_span(qparams.zero_points, digits)}"


def digits_apart(first: QParams, second: QParams) -> int:
    """As many significant digits as it takes until `grid_text` of the two differs.

    Example:
        >>> import torch
        >>> grids = [QParams(scale, 0, 0, 255, torch.quint8) for scale in (0.1, 0.10000001)]
        >>> [grid_text(grid, digits_apart(*grids)) for grid in grids]
        ['0.1/0', '0.10000001/0']
    """
    # float32 has 9; where 12 don't tell, channels between the lowest and the highest differ.
    return next((d for d in (6, 9) if grid_text(first, d) != grid_text(second, d)), 12)


def qparams_text(qparams: QParams, digits: int = 6) -> str:
    """Grid, declared range and dtype in a few characters.

    Example:
        >>> import torch
        >>> qparams_text(QParams(0.5, 3, 0, 127, torch.quint8))
        '0.5/3 [0,127] quint8'
    """
    kind = str(qparams.dtype).removeprefix("torch.")
    return f"{grid_text(qparams, digits)} {qparams.range_text} {kind}"


def _span(values: Sequence[float], digits: int) -> str:
    low, high = min(values), max(values)
    if low == high:
        return f"{low:.{digits}g}"
    return f"{low:.{digits - 3}g}..{high:.{digits - 3}g}"

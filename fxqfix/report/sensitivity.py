"""What leaving layers in float would win: record, table, and the qconfig that says so."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fxqfix._notebook import Shown
from fxqfix.errors import UnknownNameError
from fxqfix.measure import Discrepancy, decibels
from fxqfix.report import text
from fxqfix.report.findings import counted

__all__ = ["LeftInFloat", "Sensitivity"]


@dataclass(frozen=True)
class LeftInFloat(Shown):
    """One module left in float, all else quantized.

    Attributes:
        name: Its path.
        quantizers: Fake-quants that go with it: of its weights, and of values that nothing else
            wants quantized.
        after: The model's outputs against the float model's.
        gain_db: SQNR of the outputs, less that of the model quantized as a whole, dB.

    Example:
        >>> LeftInFloat("head", 2, Discrepancy(signal=100.0, noise=1.0), 3.0).after.sqnr_db
        20.0
    """

    name: str
    quantizers: int
    after: Discrepancy
    gain_db: float


@dataclass(frozen=True)
class Sensitivity(Shown):
    """Modules by what leaving each alone in float would win, the most first.

    Attributes:
        rows: One per module.
        quantized: Outputs of the model quantized as a whole against the float model's.
        batches: Batches read.
        in_float: Outputs of the prepared model without any quantizer against the float model's: far
            from exact where it was trained since, or other weights were given.

    Example:
        >>> whole, better = (Discrepancy(signal=100.0, noise=n) for n in (2.0, 1.0))
        >>> print(Sensitivity((LeftInFloat("head", 2, better, 3.0103),), whole, 1))
        sensitivity: outputs at 17.0 dB SQNR against the float model, 1 batch
        in float    quantizers    SQNR dB    gain dB
        ----------  ------------  ---------  ---------
        head        2             20.0       +3.01
    """

    rows: tuple[LeftInFloat, ...]
    quantized: Discrepancy
    batches: int
    in_float: Discrepancy | None = None

    def row(self, name: str) -> LeftInFloat:
        """The row of a module.

        Raises:
            UnknownNameError: It has none.
        """
        for found in self.rows:
            if found.name == name:
                return found
        raise UnknownNameError(
            f"no module {name!r} was left in float",
            where="Sensitivity.row",
            expected=", ".join(found.name for found in self.rows),
        )

    def qconfig_mapping(self, mapping: Any, *, least_db: float = 1.0) -> Any:
        """A copy of a QConfigMapping with the modules in float that win enough.

        Args:
            mapping: What the model was prepared with.
            least_db: What a module has to win alone, dB.

        Returns:
            The copy; prepare the float model with it. Eager models have no mapping: set
            ``model.get_submodule(name).qconfig = None``.
        """
        found = copy.deepcopy(mapping)
        for row in self.rows:
            if row.gain_db >= least_db:
                found.set_module_name(row.name, None)
        return found

    def table(self, fmt: str = "simple") -> str:
        """A line per module.

        Args:
            fmt: A format of tabulate.
        """
        return text.listing(
            ("in float", "quantizers", "SQNR dB", "gain dB"),
            [
                (r.name, str(r.quantizers), decibels(r.after.sqnr_db), f"{r.gain_db:+.2f}")
                for r in self.rows
            ],
            fmt,
        )

    def __str__(self) -> str:
        """The figure of the whole, and the table."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        sqnr = decibels(self.quantized.sqnr_db)
        batches = counted(self.batches, "batch", "es")
        yield f"sensitivity: outputs at {sqnr} dB SQNR against the float model, {batches}"
        if self.in_float is not None:
            plain = decibels(self.in_float.sqnr_db)
            yield f"without any quantizer: {plain}{' dB' if self.in_float.noise else ''}"
        yield self.table()

"""Which arithmetic parameters come from: the decomposed ops', or the kernels' of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fxqfix.engines import ENGINES, Isa, isa_of, threads_of
from fxqfix.engines._releases import release
from fxqfix.qparams import zero_point_first
from fxqfix.registry import check_name

__all__ = ["DECOMPOSED", "Arithmetic"]

DECOMPOSED = "decomposed"


@dataclass(frozen=True)
class Arithmetic:
    """What computes the ops that parameters were read from.

    Attributes:
        engine: "fbgemm", "x86", "onednn" or "qnnpack"; "decomposed" for float ops between quantize
            and dequantize, whose ranges are the declared ones.
        isa: The levels of the engine's kernels; None for "decomposed".
        threads: Number of threads that they run on.
        point_first: Whether native quantize adds the zero point before it rounds.
        release: The release of oneDNN, by what its kernels do.

    Example:
        >>> print(Arithmetic.of("qnnpack", isa="vnni", threads=1))
        qnnpack, isa vnni, 1 thread
    """

    engine: str
    isa: Isa | None = None
    threads: int = 1
    point_first: bool = field(default_factory=zero_point_first)
    release: str = field(default_factory=release)

    @classmethod
    def of(
        cls, engine: str, isa: str | Isa | None = None, threads: int | None = None
    ) -> Arithmetic:
        """That of an engine, or of decomposed ops, in this process.

        Args:
            engine: Its name, or "decomposed".
            isa: Levels, or their name; None for what this process runs.
            threads: Number of threads; None for torch.get_num_threads().

        Raises:
            UnknownNameError: There is no such engine or isa.
            OptionError: `isa` or `threads` has a value that it can't have.
        """
        where = "Arithmetic.of"
        check_name("engine", engine, (*ENGINES, DECOMPOSED), where)
        levels = None if engine == DECOMPOSED else isa_of(isa, where)
        return cls(engine, levels, threads_of(threads, where))

    @property
    def decomposed(self) -> bool:
        """Whether the ops are float ops between quantize and dequantize."""
        return self.engine == DECOMPOSED

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Arithmetic:
        """The inverse of `to_dict`."""
        isa = entry["isa"]
        return cls(**{**entry, "isa": None if isa is None else Isa(**isa)})

    def __str__(self) -> str:
        """Render in one line."""
        if self.decomposed:
            return "decomposed ops"
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        return f"{self.engine}, isa {self.isa}, {threads}"

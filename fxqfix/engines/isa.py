"""The instruction set, as data: torch's kernels choose their arithmetic by it, each part by itself.

oneDNN, fbgemm and ATen each look at the CPU and at a cap of their own (ONEDNN_MAX_CPU_ISA,
FBGEMM_ENABLE_INSTRUCTIONS, ATEN_CPU_CAPABILITY); x86's choice between fbgemm and onednn, and
fbgemm's kernel for grouped convolutions, look at the CPU alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import torch

from fxqfix import _torch
from fxqfix._notebook import Shown
from fxqfix._settings import entry
from fxqfix.engines import _levels
from fxqfix.errors import OptionError, UnknownNameError, counting

__all__ = ["ISAS", "PARTS", "UNKNOWN", "VNNI", "Isa", "isa_of", "threads_of"]

UNKNOWN = "unknown"
PARTS = {
    "onednn": ("avx2", "avx2_vnni", "avx512", "vnni", "amx"),
    "fbgemm": ("avx2", "avx512", "vnni"),
    "aten": ("default", "avx2", "avx512"),
    "cpu": ("avx2", "avx512", "vnni"),
}
_LEAST = {"default": "avx2", "avx2_vnni": "avx2", "amx": "vnni"}  # a CPU that has a part's level


@dataclass(frozen=True)
class Isa(Shown):
    """The level of each part of torch's int8 kernels.

    Attributes:
        onednn: "avx2", "avx2_vnni", "avx512" (without VNNI), "vnni" (AVX512-VNNI) or "amx".
        fbgemm: "avx2" or "avx512", where pairs of products saturate (alike), or "vnni".
        aten: "default" (scalar code), "avx2" or "avx512": how many numbers a vector holds.
        cpu: What the CPU has whatever caps say: "avx2", "avx512" or "vnni" (AVX512-VNNI). Left
            out, it is the least that has the other three.

    A part is "unknown" where nobody has measured its kernels (on ARM, say); what runs on it can't
    be emulated.

    Raises:
        UnknownNameError: A part has no such level.

    Example:
        >>> from fxqfix import Isa
        >>> print(Isa(onednn="avx2", fbgemm="avx2", aten="avx2"))
        avx2
        >>> print(Isa(onednn="amx", fbgemm="avx2", aten="default"))
        onednn=amx fbgemm=avx2 aten=default cpu=vnni
    """

    onednn: str
    fbgemm: str
    aten: str
    cpu: str = ""

    def __post_init__(self) -> None:
        if not self.cpu:
            levels = PARTS["cpu"]
            parts = (_LEAST.get(p, p) for p in (self.onednn, self.fbgemm, self.aten))
            least = max((levels.index(p) for p in parts if p in levels), default=None)
            object.__setattr__(self, "cpu", UNKNOWN if least is None else levels[least])
        for part, known in PARTS.items():
            found = getattr(self, part)
            if found not in (*known, UNKNOWN):
                raise UnknownNameError(
                    f"{part} has no level {found!r}",
                    where="Isa",
                    found=found,
                    expected=", ".join(known),
                )

    def __str__(self) -> str:
        """Its name where it has one, else its parts."""
        name = next((name for name, isa in _NAMED.items() if isa == self), None)
        return name or " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))

    def unmeasured(self, engine: str) -> str:
        """Why an engine's kernels can't be judged at these levels; "" where they can.

        Args:
            engine: "fbgemm", "x86", "onednn" or "qnnpack".

        Example:
            >>> from fxqfix import Isa
            >>> Isa(onednn="unknown", fbgemm="vnni", aten="avx2").unmeasured("fbgemm")
            ''
        """
        own = {"x86": ("onednn", "fbgemm")}.get(engine, (engine,))
        if UNKNOWN in (self.cpu, self.aten, *(getattr(self, part, "") for part in own)):
            return f"nobody has measured the kernels of this CPU and build ({self})"
        return ""


_NAMED = {
    "avx2": Isa("avx2", "avx2", "avx2"),
    "avx2_vnni": Isa("avx2_vnni", "avx2", "avx2"),
    "avx512": Isa("avx512", "avx512", "avx512"),
    "vnni": Isa("vnni", "vnni", "avx512"),
    "amx": Isa("amx", "vnni", "avx512"),
}
ISAS, VNNI = tuple(_NAMED), _NAMED["vnni"]


def isa_of(given: str | Isa | None, where: str = "emulate") -> Isa:
    """The levels that an option means.

    Args:
        given: A name of all parts together, the parts, or None for what this process runs.
        where: The function that it was given to, for messages.

    Raises:
        UnknownNameError: There is no such name.
        OptionError: It is neither a name nor an `Isa`.

    Example:
        >>> isa_of("avx512").fbgemm
        'avx512'
    """
    if given is None:
        return _native()
    if isinstance(given, Isa):
        return given
    if not isinstance(given, str):
        raise OptionError(
            "isa names a level",
            where=where,
            found=repr(given),
            expected=f"{', '.join(ISAS)}, an Isa, or None for what this process runs",
        )
    if given not in _NAMED:
        raise UnknownNameError(
            f"there is no isa {given!r}",
            where=where,
            found=given,
            expected=", ".join(ISAS),
            remedy="for parts at different levels: fxqfix.Isa(onednn=..., fbgemm=..., aten=...)",
        )
    return _NAMED[given]


@functools.cache
@entry
def _native() -> Isa:
    return Isa(_levels.onednn(), _levels.fbgemm(), _levels.aten(), _torch.cpu_level())


def threads_of(given: int | None, where: str = "emulate") -> int:
    """The number of threads that an option means; None: torch.get_num_threads().

    Raises:
        OptionError: It is no positive whole number.

    Example:
        >>> threads_of(2)
        2
    """
    if given is None:
        return torch.get_num_threads()
    counting(given, where, "threads counts the threads of the kernels")
    if not given:
        raise OptionError(
            "threads counts the threads of the kernels",
            where=where,
            found="0",
            expected="1 or more, or None for torch.get_num_threads()",
        )
    return given

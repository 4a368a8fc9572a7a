"""What an engine is made of: a kernel per op, found by (engine, key of the op's row).

A kernel is a row: which op, on which engines, and the function that builds the module which
computes it. To add one is to write a builder and decorate it; listing, docs and tests read the
table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import fx, nn

from fxqfix._settings import exact
from fxqfix.dialects.weights import WeightView
from fxqfix.engines._releases import release
from fxqfix.engines.isa import VNNI, Isa, isa_of
from fxqfix.errors import UnsupportedError
from fxqfix.names import Engine
from fxqfix.ops import OPS, OpSpec
from fxqfix.qparams import QParams, zero_point_first
from fxqfix.registry import Registry

__all__ = ["ENGINES", "OWN_KERNELS", "Call", "Exact", "Kernel", "Present", "kernel", "table"]

OWN_KERNELS: tuple[Engine, ...] = ("fbgemm", "onednn", "qnnpack")
ENGINES: tuple[Engine, ...] = ("fbgemm", "x86", "onednn", "qnnpack")  # x86 runs two others'


class Exact(nn.Module):
    """Base of the modules that compute a kernel: none of the user's switches reaches them.

    Example:
        >>> import torch
        >>> class Sums(Exact):
        ...     def forward(self, x, w):
        ...         return x @ w
        >>> x = torch.full((1, 1), 4095.0)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     (x @ x).item(), Sums()(x, x).item()
        (16777216.0, 16769025.0)
    """

    def __init_subclass__(cls) -> None:
        """Guard the forward that the class itself brings."""
        super().__init_subclass__()
        if "forward" in cls.__dict__:
            cls.forward = exact(cls.__dict__["forward"])


class Present(Protocol):
    """Where the parameters of an op come from while they are trained.

    Attributes:
        closed: Whether they are those of parts that its graph does not open.
    """

    closed: bool

    def of(self, call: Call) -> Call:
        """The call with its parameters as they are now."""

    def inside(self, path: str) -> Present | None:
        """The same for a part of a closed module, by its path; None: it stays as it is."""


@dataclass(frozen=True)
class Call:
    """One int8 op of a converted model, as a kernel's builder gets it.

    Attributes:
        node: The node's name, for messages.
        engine: The engine whose arithmetic is wanted: "fbgemm", "onednn" or "qnnpack"; x86 has
            been dispatched.
        key: Key of the op's row, without "_relu"; with "_dynamic" where the kernel chooses its
            input's grid for each batch.
        relu: Whether a relu is fused.
        arguments: The op's arguments by name. Values of the graph are `fx.Node`s; constants are
            fetched. Of a module: those of its forward.
        module: The module that is called, or None.
        target: The function or method name that is called, or None.
        inputs: The values of the graph that the op takes, in order; the module that is built gets
            them, as codes where they are quantized.
        qparams: The grid of each input; None where it is a float.
        output: The grid of the result; None where it is a float.
        weight: The integer weight, or None.
        isa: The levels of the kernels.
        threads: Number of threads that the kernel runs on.
        point_first: Whether native quantize adds the zero point before it rounds; where nothing is
            said, as this torch has it (`fxqfix.qparams.zero_point_first`).
        release: The release of oneDNN, by what its kernels do: "3.5", "3.10", "3.12" or "3.13";
            where nothing is said, that of this torch.
        in_memory_order: Whether the kernel gets its input as it lies in memory (`InMemoryOrder`).
        others: The grids of the first input wherever else the same packed weight is called.
        fused_otherwise: Whether the same packed weight is called on the same grids elsewhere, with
            another activation fused.
        rereads: Of an op that writes over an input: names of the nodes that read it behind the op,
            and of the op itself where it takes that memory twice.
        present: Gives the call with its parameters as they are at the moment, where they are
            trained; None: they stay as they are (see `_moving`).

    Example:
        >>> from fxqfix.engines import Call
        >>> Call("pool", "qnnpack", "avg_pool2d", arguments={"padding": 1}).option("padding")
        1
    """

    node: str
    engine: str
    key: str
    relu: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None
    target: Any = None
    inputs: tuple[fx.Node, ...] = ()
    qparams: tuple[QParams | None, ...] = ()
    output: QParams | None = None
    weight: WeightView | None = None
    isa: Isa = VNNI
    threads: int = 1
    point_first: bool = field(default_factory=zero_point_first)
    release: str = field(default_factory=release)
    in_memory_order: bool = False
    others: tuple[QParams | None, ...] = ()
    fused_otherwise: bool = False
    rereads: tuple[str, ...] = ()
    present: Present | None = None

    @property
    def spec(self) -> OpSpec:
        """The op's row."""
        return OPS[self.key.removesuffix("_dynamic")]

    def without_graph(self) -> Call:
        """The call with nothing of its model: options and sizes, grids and levels."""
        names = ("stride", "padding", "dilation", "groups")
        weight = self.weight
        if weight is not None:
            codes = torch.empty(weight.codes.shape, dtype=weight.codes.dtype, device="meta")
            weight = replace(weight, codes=codes, bias=None, values=None)
        options = {name: self.option(name) for name in names}
        bare = replace(self, arguments=options, module=None, inputs=(), target=None, weight=weight)
        return replace(bare, present=None)

    @property
    def source(self) -> QParams:
        """The grid of the first input.

        Raises:
            UnsupportedError: It is a float.
        """
        return self.grid_of(0)

    def grid_of(self, index: int) -> QParams:
        """The grid of an input.

        Raises:
            UnsupportedError: It is a float, or there is none.
        """
        found = self.qparams[index] if index < len(self.qparams) else None
        if found is None:
            raise self.refuse("its input is not quantized")
        return found

    @property
    def grid(self) -> QParams:
        """The grid of the result.

        Raises:
            UnsupportedError: It is a float.
        """
        if self.output is None:
            raise self.refuse("its output is not quantized")
        return self.output

    def option(self, name: str, default: Any = None) -> Any:
        """An option by name: of the module, of the packed weight, or an argument of the call."""
        if self.module is not None:
            return getattr(self.module, name, default)
        packed = next((v for v in self.arguments.values() if hasattr(v, "unpack")), None)
        if packed is not None and hasattr(packed, name):
            return getattr(packed, name)()
        return self.arguments.get(name, default)

    @property
    def scalar(self) -> bool:
        """Whether ATen runs scalar code: no vectors, and no fused products."""
        return self.isa.aten == "default"

    def check_vectors(self) -> None:
        """Refuse ATen's scalar code.

        Raises:
            UnsupportedError: The call is for it.
        """
        if self.scalar:
            raise self.refuse("no row follows ATen's scalar code (aten level 'default') here")

    def check_native(self) -> None:
        """Refuse other levels and threads than those of this process.

        Raises:
            UnsupportedError: They are others.
        """
        here = isa_of(None), torch.get_num_threads()
        if (self.isa, self.threads) != here:
            raise self.refuse(
                "it runs a float kernel of torch, whose bits are known for what this process runs "
                f"({here[0]}, threads={here[1]}), and the call is for {self.isa}, "
                f"threads={self.threads}: leave isa and threads out, or run there",
            )

    def refuse(self, reason: str) -> UnsupportedError:
        """An error that says what of this op can't be emulated."""
        return UnsupportedError(
            f"{self.key} can't be emulated on {self.engine}: {reason}",
            where=f"node {self.node!r}",
            remedy="see `fxqfix engines` for what each engine runs",
        )


Builder = Callable[[Call], nn.Module]


@dataclass(frozen=True)
class Kernel:
    """A row of the engines' table.

    Attributes:
        engine: "fbgemm", "onednn" or "qnnpack".
        key: Key of the op's row in `fxqfix.ops.TABLE`, with "_dynamic" for dynamic kernels.
        build: Makes the module that computes the op; None where the op only moves codes, so that
            the node itself runs on codes as it stands.
        native: Whether it calls a float kernel of torch, which gives other bits on other CPUs: the
            row holds for the levels and threads of this process, and is refused for others.

    Example:
        >>> from fxqfix.engines import table
        >>> table()["fbgemm", "max_pool2d"].native
        False
    """

    engine: str
    key: str
    build: Builder | None
    native: bool = False


def _problem(row: Kernel) -> str | None:
    if row.engine not in OWN_KERNELS:
        return f"there is no engine {row.engine!r} with kernels of its own"
    key = row.key.removesuffix("_dynamic")
    return None if key in OPS else f"the op table has no row {key!r}"


_TABLE: Registry[tuple[str, str], Kernel] = Registry(
    "kernel", key=lambda row: (row.engine, row.key), check=_problem
)


def kernel(
    *keys: str, engines: tuple[str, ...], native: bool = False
) -> Callable[[Builder], Builder]:
    """Register a builder for ops on engines.

    Raises:
        RegistryError: There is no such engine or op, or it has a builder already.
    """

    def register(build: Builder) -> Builder:
        rows = (Kernel(engine, key, build, native) for engine in engines for key in keys)
        _TABLE.add(*rows, module=build.__module__)
        return build

    return register


def moves_codes(*keys: str, engines: tuple[str, ...], module: str) -> None:
    """Register ops that only move codes, for the module of that name."""
    _TABLE.add(*(Kernel(engine, key, None) for engine in engines for key in keys), module=module)


def table() -> dict[tuple[str, str], Kernel]:
    """All kernels by (engine, op key).

    Example:
        >>> from fxqfix.engines import table
        >>> table()["qnnpack", "conv2d"].native
        False
    """
    return dict(_TABLE)

"""The small modules that `InsertShadows` weaves into a converted graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxqfix import _torch
from fxqfix.errors import PairingError
from fxqfix.passes._codes import codes_of, fits, strides_of
from fxqfix.passes._draws import Draws, Replaying
from fxqfix.qparams import QParams, dequantize, quantize

__all__ = [
    "NUDGE",
    "Clone",
    "Later",
    "Local",
    "Nudge",
    "Settle",
    "Shadow",
    "Snapshot",
    "Tail",
]

# The noise floor's nudge: about 17 float32 steps, what reordered float arithmetic may well do.
NUDGE = 1e-6


Settle = Callable[[Collection[str]], Tensor]


@dataclass(frozen=True)
class Local:
    """What a shadow computed at one site on one batch.

    Attributes:
        inputs: The values that it started from, as floats.
        codes: Integer inputs and their grids, where the input is a site (None for placeholders).
        raw: The same integers, laid out as the converted model has them.
        value: The value before quantization.
        expected: The codes that the prepared op gives.
        settle: From nodes that the prepared model leaves in float to the codes that the prepared op
            gives on the prepared model's own inputs, with these quantized; None where all are.
    """

    inputs: tuple[Any, ...]
    codes: tuple[tuple[Tensor, QParams] | None, ...]
    raw: tuple[Tensor | None, ...]
    value: Tensor
    expected: Tensor
    settle: Settle | None = None


class Snapshot(nn.Module):
    """Integer codes of a site's value, in a tensor of their own that no in-place op can reach.

    Attributes:
        qparams: The grid of the codes. A quantized tensor tells its own: where the kernel's output
            has another one than the graph let expect, the tensor is right.
        strides: How the last value seen lay in memory; () where it had gaps.
        floats: Its dtype, where it was a float; a fake-quant gives back what it gets.
    """

    def __init__(self, qparams: QParams) -> None:
        super().__init__()
        self.qparams = qparams
        self.strides: tuple[int, ...] = ()
        self.floats = torch.float32

    def forward(self, value: Tensor) -> Tensor:
        """Take the codes of a float, integer or quantized tensor."""
        self.seen(value)
        if value.is_quantized:
            if self.qparams.axis is None:
                scale, point = value.q_scale(), value.q_zero_point()
                low, high = self.qparams.quant_min, self.qparams.quant_max
                self.qparams = QParams(scale, point, low, high, value.dtype)
            return value.int_repr()
        if not value.is_floating_point():
            return value.detach().clone()
        return codes_of(value, self.qparams)

    def seen(self, value: Tensor) -> None:
        """Note how a value lies in memory, and the dtype of a float."""
        self.strides = strides_of(value)
        if value.is_floating_point():
            self.floats = value.dtype


Source = tuple[Snapshot, Snapshot]


def _as_laid_out(codes: Tensor, prepared: Snapshot) -> Tensor:
    if len(prepared.strides) != codes.dim():
        return codes.contiguous()
    if codes.stride() == prepared.strides:
        return codes
    found = torch.empty_strided(
        codes.shape, prepared.strides, dtype=codes.dtype, device=codes.device
    )
    return found.copy_(codes)


class _Part(nn.Module):
    """A part of the prepared model on the converted model's codes.

    Args:
        region: The prepared graph's computation between the part's inputs and its end.
        sources: Per input the snapshots of the converted and of the prepared value; None for a
            float input. The codes are the converted ones; the layout is the prepared one's, since
            the order in which a pool or a norm sums up depends on it.
        mutates: Whether the region writes in place, so that it has to get copies.
        draws: What the converted model drew, which the region draws again.
    """

    def __init__(
        self,
        region: fx.GraphModule,
        sources: tuple[Source | None, ...],
        mutates: bool,
        draws: Draws | None = None,
    ) -> None:
        super().__init__()
        self.region, self.mutates = region, mutates
        drawing = draws is not None and any(n.name in draws.names for n in region.graph.nodes)
        self.draws = draws if drawing else None
        self.sources = sources  # a tuple, so that nn.Module does not own them twice

    def computed(self, inputs: tuple[Any, ...]) -> tuple[Any, Any, Any, Any]:
        """What `Local` begins with: values and codes of the inputs, their integers, the value."""
        codes, values = self.floats(inputs)
        given = tuple(_clone(v) for v in values) if self.mutates else values
        raw = tuple(
            None if source is None else x for x, source in zip(inputs, self.sources, strict=True)
        )
        return values, codes, raw, self._run(given)

    def _run(self, given: tuple[Any, ...]) -> Any:
        if self.draws is None:
            return self.region(*given)
        again = Replaying(self.region)
        again.draws = self.draws
        return again.run(*given)

    def floats(
        self, inputs: tuple[Any, ...]
    ) -> tuple[tuple[tuple[Tensor, QParams] | None, ...], tuple[Any, ...]]:
        """The codes of the inputs with their grids, and the values that they stand for."""
        codes = tuple(
            None if source is None else (_as_laid_out(value, source[1]), source[0].qparams)
            for value, source in zip(inputs, self.sources, strict=True)
        )
        values = tuple(
            value if pair is None or source is None else dequantize(*pair).to(source[1].floats)
            for value, pair, source in zip(inputs, codes, self.sources, strict=True)
        )
        return codes, values


class Shadow(_Part):
    """The prepared op on the converted model's own inputs: codes in, `Local` out.

    Args:
        region: See `_Part`.
        qparams: The site's qparams in the prepared model.
        sources: See `_Part`.
        mutates: See `_Part`.
        draws: See `_Part`.
    """

    def __init__(
        self,
        region: fx.GraphModule,
        qparams: QParams,
        sources: tuple[Source | None, ...],
        mutates: bool,
        draws: Draws | None = None,
    ) -> None:
        super().__init__(region, sources, mutates, draws)
        self.qparams = qparams

    def forward(self, *inputs: Any) -> Local:
        """Dequantize the inputs, run the region, quantize its result."""
        found = self.computed(inputs)
        take = codes_of if fits(self.qparams) else quantize  # in storage, where all of them fit
        return Local(*found, take(found[-1], self.qparams))


class Tail(_Part):
    """What the prepared model computes behind its last sites, up to one of its outputs."""

    def forward(self, *inputs: Any) -> Local:
        """Dequantize the inputs and run the region; its value stands in for the codes too."""
        found = self.computed(inputs)
        return Local(*found, found[-1])


class Later(nn.Module):
    """Adds `settle` to a shadow's record: it runs only if a probe asks for it.

    Args:
        shadow: The prepared op, which takes the prepared model's own codes.
        inputs: Names of the nodes that these are of.
        loose: Nodes that the prepared model leaves in float: those among `inputs`, whose values
            come behind the codes, and those of modules whose weight is not quantized.
        held: The prepared model, held still; it is not run, copies of its modules are.
    """

    def __init__(
        self,
        shadow: Shadow,
        inputs: tuple[str, ...],
        loose: tuple[str, ...],
        held: fx.GraphModule,
    ) -> None:
        super().__init__()
        self.shadow, self.inputs = shadow, inputs
        self.raw = tuple(name for name in loose if name in inputs)
        self.weights = tuple(name for name in loose if name not in inputs)
        self._held = (held,)  # owned by its branch

    def forward(self, local: Local, *given: Any) -> Local:
        """The record, with the inputs' prepared codes and float values tied into `settle`."""
        count = len(self.inputs)
        codes, raw = given[:count], dict(zip(self.raw, given[count:], strict=True))

        def settle(names: Collection[str]) -> Tensor:
            values = self.shadow.floats(codes)[1]
            chosen = [
                raw[name] if name in raw and name not in names else value
                for name, value in zip(self.inputs, values, strict=True)
            ]
            left = [name for name in self.weights if name not in names]
            region = _InFloat(self.shadow.region, self._held[0], left)
            region.draws = self.shadow.draws
            return quantize(region.run(*(_clone(v) for v in chosen)), self.shadow.qparams)

        return replace(local, settle=settle)


class _InFloat(Replaying):
    """Runs a region with some of its modules as they are in another model."""

    def __init__(self, region: fx.GraphModule, other: fx.GraphModule, names: list[str]) -> None:
        super().__init__(region)
        self._other, self._names = other, names

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_module" or n.name not in self._names:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        # A copy: a BatchNorm in train mode would move the statistics of its owner once more.
        return copy.deepcopy(self._other.get_submodule(str(n.target)))(*args, **kwargs)


class Nudge(nn.Module):
    """x * (1 + 1e-6): the perturbation that the noise floor is measured with."""

    def forward(self, x: Any) -> Any:
        """Scale floats; anything else passes."""
        if isinstance(x, Tensor) and x.is_floating_point():
            return x * (1.0 + NUDGE)
        return x


class Clone(nn.Module):
    """A copy of an input for one branch, so that its in-place ops reach nobody else."""

    def forward(self, x: Any) -> Any:
        """Copy tensors, also inside tuples, lists and dicts."""
        return _clone(x)


def _clone(x: Any) -> Any:
    return _torch.tree_map_tensors(Tensor.clone, x)


def check_shape(where: str, expected: Tensor, actual: Tensor, order: str = "") -> None:
    """Raise where two values that should be compared have different shapes."""
    if expected.shape != actual.shape:
        raise PairingError(
            "the two models give values of different shapes here",
            where=where,
            found=f"converted {tuple(actual.shape)}",
            expected=f"prepared {tuple(expected.shape)}",
            remedy=f"pass the prepared model and what was converted from it{order}",
        )

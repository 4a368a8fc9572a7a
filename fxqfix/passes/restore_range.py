"""restore-range: a clamp of the codes behind each int8 op that can leave the declared range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

from torch import fx, nn

from fxqfix import dialects
from fxqfix.dialects import Reading, int8
from fxqfix.engines import intervals
from fxqfix.errors import DialectError, PassError
from fxqfix.inserted import hold_range
from fxqfix.passes._base import Pass, Rewriter

__all__ = ["RestoreRange"]


@dataclass(frozen=True)
class RestoreRange(Pass):
    """Hold the declared [quant_min, quant_max] of an int8 graph, which conversion has dropped.

    A `hold_range` follows each quantize and each kernel whose codes can leave the range. Where they
    provably can't (the range is the whole container; ops that move codes; pools, relus and cats on
    one grid; tables that stay inside), there is none; the result's `remarks` say why.

    Attributes:
        ranges: Site name -> (quant_min, quant_max).

    Raises:
        DialectError: The model is neither an int8 nor a reference model.

    Example:
        >>> import torch
        >>> from torch import fx
        >>> from fxqfix.passes import RestoreRange
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         return torch.relu(torch.quantize_per_tensor(x, 0.5, 3, torch.quint8))
        >>> result = RestoreRange({"x": (0, 127), "relu": (0, 127)})(fx.symbolic_trace(Net()))
        >>> result.edits
        ('x: held in [0,127], quantize can give 0..255',)
        >>> result.remarks
        ('relu: stays in [0,127], relu of these codes gives 3..127',)
    """

    name: ClassVar[str] = "restore-range"
    requires: ClassVar[tuple[str, ...]] = ("avoid-defects",)
    ranges: Mapping[str, tuple[int, int]] = field(
        default_factory=lambda: MappingProxyType({}), hash=False
    )

    def rewrite(self, rewriter: Rewriter) -> None:
        """Insert the clamps."""
        reading = _int8(self.name, rewriter.graph_module)
        limits = {tap.node: limit for tap, limit in self._declared(reading)}
        found = intervals(rewriter.graph_module, limits)
        staying: dict[str, tuple[int, int]] = {}
        for tap, (low, high) in self._declared(reading):
            name, interval = tap.site.name, found[tap.node]
            if not interval.within(low, high):
                _hold(rewriter, tap.node, low, high)
                rewriter.note(f"{name}: held in [{low},{high}], {interval.reason}")
                continue
            rewriter.remark(f"{name}: stays in [{low},{high}], {interval.reason}")
            if tap.held is None:
                staying[name] = (low, high)
        int8.declare(rewriter.graph_module, staying)

    def _declared(self, reading: Reading) -> list[tuple[dialects.Tap, tuple[int, int]]]:
        taps = [tap for tap in reading.activations if tap.site.used is not None]
        return [(tap, self.ranges[tap.site.name]) for tap in taps if tap.site.name in self.ranges]

    def ensures(self, after: nn.Module) -> None:
        """No declared range can be left any more."""
        reading = _int8(self.name, after)
        found = intervals(reading.graph_module)
        for tap, (low, high) in self._declared(reading):
            if not found[tap.node].within(low, high):
                raise PassError(
                    "codes can still leave the declared range",
                    where=f"{self.name}, site {tap.site.name!r}",
                    found=found[tap.node],
                    expected=f"[{low},{high}]",
                )


def _int8(where: str, model: nn.Module) -> Reading:
    reading = dialects.read(model)
    if reading.has_kernels:
        return reading
    if reading.prepared or reading.carries_ranges:
        raise DialectError(
            "only int8 models lose their ranges to kernels",
            where=where,
            found=f"a model of dialect {reading.dialect}",
            expected="an int8 model",
            remedy="pass what convert_fx returned; decomposed models take pin-ranges",
        )
    return int8.read(reading.graph_module)  # a reference model's values are quantized tensors


def _hold(rewriter: Rewriter, node: fx.Node, low: int, high: int) -> None:
    with rewriter.graph.inserting_after(node):
        hold = rewriter.call(hold_range, (node, low, high), f"{node.name}_hold")
    hold.meta["is_wrapped"] = True  # fx traces anew what it unpickles, and has to stop there
    node.replace_all_uses_with(hold, delete_user_cb=lambda user: user is not hold)

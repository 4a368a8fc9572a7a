"""Which codes each value of an int8 graph can have, whatever the data: what needs a clamp.

Quantize ops, and kernels that round to a grid of their own, give any code of their container. Ops
that move codes, clamp or average them on one grid stay between their inputs' codes, and a function
of one code is a table, which is asked. All engines' tables are asked: the answer holds for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxqfix import ops
from fxqfix.dialects._base import modules_of
from fxqfix.engines._base import Call, table
from fxqfix.engines._lookup import Lookup
from fxqfix.engines.activations import Clamp
from fxqfix.engines.calls import calls
from fxqfix.errors import UnsupportedError
from fxqfix.inserted import round_to_grid
from fxqfix.qparams import QParams, quantize_native

__all__ = ["Interval", "intervals"]

_OWN = ("fbgemm", "onednn", "qnnpack")


@dataclass(frozen=True)
class Interval:
    """The codes that a value can have.

    Attributes:
        low: The lowest.
        high: The highest.
        reason: Why, in a few words.

    Example:
        >>> from fxqfix.engines import Interval
        >>> Interval(3, 100, "").within(0, 127)
        True
    """

    low: int
    high: int
    reason: str

    def within(self, low: int, high: int) -> bool:
        """Whether no code leaves [low, high]."""
        return low <= self.low and self.high <= high

    def held(self, low: int, high: int, reason: str = "") -> Interval:
        """Behind a clamp to [low, high]."""
        lowest, highest = (min(max(code, low), high) for code in (self.low, self.high))
        return Interval(lowest, highest, reason or self.reason)


def intervals(
    graph_module: fx.GraphModule, limits: Mapping[fx.Node, tuple[int, int]] | None = None
) -> dict[fx.Node, Interval]:
    """The interval of every quantized value of an int8 graph, in graph order.

    Args:
        graph_module: A model of dialect "fx-int8".
        limits: Node -> (lowest, highest) code of values that are going to be held; the intervals
            are those in front of that, and of what is behind follow from it.

    Returns:
        Node -> its interval; sound, not always the narrowest.

    Example:
        >>> from torch.ao.nn.quantized import Quantize
        >>> from fxqfix.dialects import trace
        >>> model = trace(torch.nn.Sequential(Quantize(0.5, 3, torch.quint8), torch.nn.ReLU()))
        >>> [(found.low, found.high) for found in intervals(model).values()]
        [(0, 255), (3, 255)]
    """
    limits, modules = limits or {}, modules_of(graph_module)
    found: dict[fx.Node, Interval] = {}
    behind: dict[fx.Node, Interval] = {}
    # The engine's name only says which kernel runs; all of them are asked.
    for node, call in calls(graph_module, "qnnpack", strict=False).items():
        if call.output is None:
            continue
        match = ops.match_node(node, modules)
        ups = [behind.get(n) for n, q in zip(call.inputs, call.qparams, strict=True) if q]
        known = [up for up in ups if up is not None]
        moves = match is not None and match.spec.output == "shape" and match.key != "stack"
        if not known or len(known) < len(ups):
            found[node] = _rounded(call) or _anything(call)
        elif moves:
            found[node] = _hull(known, "it only moves codes")
        else:
            found[node] = _of_kernel(call, match, known)
        behind[node] = found[node].held(*limits.get(node, call.output.container))
    return found


def _rounded(call: Call) -> Interval | None:
    """Of a quantize behind a `round_to_grid` of its own grid."""
    source = call.inputs[0] if call.key == "quantize" and call.inputs else None
    if source is None or source.target is not round_to_grid or len(source.args) != 5:
        return None
    given: Any = source.args[1:]
    scale, point, low, high = given
    if point != call.grid.zero_points[0] or scale != float(torch.tensor(call.grid.scales[0])):
        return None
    return Interval(low, high, "it is rounded to its range, as in training")


def _anything(call: Call) -> Interval:
    low, high = call.grid.container
    if call.relu:
        return Interval(
            int(call.grid.zero_points[0]),
            high,
            f"{call.key} with relu is requantized, up to {high}",
        )
    return Interval(low, high, f"{call.key} can give {low}..{high}")


def _hull(ups: list[Interval], reason: str) -> Interval:
    return Interval(min(up.low for up in ups), max(up.high for up in ups), reason)


def _of_kernel(call: Call, match: ops.Match | None, ups: list[Interval]) -> Interval:
    grids = [q for q in call.qparams if q is not None]
    same = all(q.same_grid(call.grid) for q in grids)
    if call.key == "hold_range":
        return ups[0].held(call.grid.quant_min, call.grid.quant_max, "a clamp holds it")
    stays = match is not None and (
        match.spec.values in ("picked", "between") or match.spec.output == "shape"
    )
    if stays and same and not call.relu and call.option("divisor_override") is None:
        return _with_zero(call, _hull(ups, "it stays between its inputs' codes, on their grid"))
    if call.key == "pad" and same:
        value = float(call.option("value", 0.0) or 0.0)
        return _with_code(_hull(ups, "it adds a constant"), _code(value, call.grid))
    if call.key in ("add_scalar", "mul_scalar") and _keeps_codes(call):
        return _hull(ups, "it keeps codes and moves their grid")
    return (_of_table(call, ups[0]) if len(ups) == 1 else None) or _anything(call)


def _with_zero(call: Call, interval: Interval) -> Interval:
    """An average pool counts the zeros that it pads with."""
    pads = call.key.startswith("avg_pool") and call.option("count_include_pad", True)
    return _with_code(interval, int(call.grid.zero_points[0])) if pads else interval


def _with_code(interval: Interval, code: int) -> Interval:
    return replace(interval, low=min(interval.low, code), high=max(interval.high, code))


def _code(value: float, grid: QParams) -> int:
    return int(quantize_native(torch.tensor([value]), grid))


def _keeps_codes(call: Call) -> bool:
    number = call.option("b")
    return not call.relu and (call.key == "add_scalar" or float(number) > 0)


def _of_table(call: Call, up: Interval) -> Interval | None:
    """A function of one code, on every engine; None where the op is none."""
    if up.high - up.low >= 2**16:  # of 32 bits: too many to ask one by one
        return None
    codes = torch.arange(up.low, up.high + 1)
    seen: list[int] = []
    for engine in _OWN:
        row = table().get((engine, call.key))
        try:
            module = row.build(replace(call, engine=engine)) if row and row.build else None
        except UnsupportedError:
            return None
        if isinstance(module, Clamp):
            seen += [
                module.low if c < module.low else min(c, module.high) for c in (up.low, up.high)
            ]
        elif isinstance(module, Lookup):
            tables = [t for t in (module.body, module.tail) if t is not None]
            given = torch.cat([t[codes - module.lows[0]] for t in tables])
            seen += [int(given.min()), int(given.max())]
        elif module is not None:
            return None
    if not seen:
        return None
    return Interval(
        min(seen), max(seen), f"{call.key} of these codes gives {min(seen)}..{max(seen)}"
    )

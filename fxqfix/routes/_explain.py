"""Why a deployed form's codes differ at a site: causes asked in order, each takes its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxqfix._reasons import innermost
from fxqfix.passes._region import Cutter
from fxqfix.routes._base import SiteView
from fxqfix.routes._lapses import lapsed
from fxqfix.routes._wide import Wide

__all__ = ["explain", "float_error"]

# What float arithmetic may do to a sum of products, in units of its largest value: half a unit
# in the last place at each of the few roundings behind the sum. What the sum's own order does is
# measured: the decomposed graph's own value against the same in float64.
_ROUNDINGS = {torch.float32: 8}
_HALF_ROUNDINGS = 2  # of values in half precision: their kernels compute in float32, and round


def explain(
    view: SiteView,
    arithmetic: Callable[[SiteView], Tensor | None],
    lapses: tuple[str, ...] = (),
) -> tuple[dict[str, int], str]:
    """Count the differing codes of a site by cause.

    Args:
        view: The site on one batch.
        arithmetic: What the route's own integers give, if that is known.
        lapses: What its kernels are known to compute otherwise.

    Returns:
        Cause -> codes, which add up to all that differ; and why a cause could not be asked, or "".
    """
    wanted, found = view.wanted.to(torch.int32), view.found.to(torch.int32)
    low, high = view.grid.quant_min, view.grid.quant_max
    left = wanted != found
    counts: dict[str, int] = {}

    def take(cause: str, mask: Tensor) -> None:
        nonlocal left
        if count := int((left & mask).sum()):
            counts[cause] = count
        left = left & ~mask

    if bool(left.any()):
        take("range-lost", ((found < low) | (found > high)) & (found.clamp(low, high) == wanted))
    if bool(left.any()) and (own := arithmetic(view)) is not None:
        own = own.to(torch.int32)
        # Where the range is lost too, the integers are the route's own, unclamped.
        take("requantization", (own == found) | (own.clamp(low, high) == found))
    problem = ""
    if bool(left.any()):
        graph_module, end = view.reading.graph_module, view.tap.producer
        exact, width, problem = float_error(graph_module, view.codes, end, view.value)
        take("rounding", _rounds(view, exact, width, found))
        for count, lapse in enumerate(lapses if not problem else (), start=1):
            if bool(left.any()):
                lapsing = _exact(graph_module, end, view.codes, lapses[:count])
                take(lapse, _rounds(view, lapsing, width, found))
    take("unexplained", left)
    return counts, problem


def _rounds(view: SiteView, exact: Tensor, width: float, found: Tensor) -> Tensor:
    """Mask of the codes that are a rounding of a value, give or take a width."""
    scale, point = (t.double() for t in view.grid.tensors(exact))
    low, high = (torch.round((exact + side * width) / scale) + point for side in (-1, 1))
    limits = view.grid.quant_min, view.grid.quant_max
    return (low.clamp(*limits) <= found) & (found <= high.clamp(*limits))


def float_error(
    graph_module: fx.GraphModule, given: Mapping[fx.Node, Any], end: fx.Node, value: Tensor
) -> tuple[Tensor, float, str]:
    """The value of a node in float64, and how far its own arithmetic may be from it.

    Args:
        graph_module: The decomposed graph.
        given: The values that it is computed from: codes of sites, and inputs.
        end: The node.
        value: Its value in the graph.

    Returns:
        The exact value, the width, and why there is no float64 value ("" where there is one).
    """
    problem = ""
    try:
        exact = _exact(graph_module, end, given)
    except (RuntimeError, TypeError, AssertionError) as error:  # an op for float32 only
        exact, problem = value.double(), f"no float64 recomputation: {innermost(error)}"
    own_error = float((exact - value.double()).abs().max()) if value.numel() else 0.0
    largest = float(value.abs().max()) if value.numel() else 0.0
    unit = torch.finfo(value.dtype).eps / 2 if value.is_floating_point() else 0.0
    return exact, own_error + _ROUNDINGS.get(value.dtype, _HALF_ROUNDINGS) * unit * largest, problem


def _exact(
    graph_module: fx.GraphModule,
    end: fx.Node,
    given: Mapping[fx.Node, Any],
    lapses: tuple[str, ...] = (),
) -> Tensor:
    codes = (n for n, v in given.items() if isinstance(v, Tensor) and not v.is_floating_point())
    region = Cutter(graph_module, frozenset(codes)).region(end)
    result: Tensor = _Lapsing(graph_module, region.graph, lapses).run(
        *(given[node] for node in region.inputs)
    )
    return result.double()


class _Lapsing(Wide):
    """In float64, with what kernels compute otherwise."""

    def __init__(self, module: fx.GraphModule, graph: fx.Graph, lapses: tuple[str, ...]) -> None:
        super().__init__(module, garbage_collect_values=not lapses, graph=graph)
        self._lapses = lapses

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, or its lapse."""
        own = lapsed(self, n, self._lapses) if self._lapses else None
        return super().run_node(n) if own is None else own

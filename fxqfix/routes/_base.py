"""What a route is: how a decomposed graph is deployed, and what is known of its arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxqfix.dialects import Reading, Tap
from fxqfix.measure import Discrepancy, discrepancy, float_discrepancy
from fxqfix.passes import Pass, PinRanges
from fxqfix.qparams import QParams, quantize
from fxqfix.report import Certificate

__all__ = ["Deployed", "Route", "SiteView", "output_discrepancy", "unlike"]

_ROUNDINGS = 8  # that a dequantize may do otherwise


@dataclass(frozen=True)
class Deployed:
    """A graph as a route runs it.

    Attributes:
        run: Takes the graph's inputs in order and returns its outputs in order, as tensors.
        kernels: (kernel, how many) of those that compute on integers, as the route tells.
        notes: What a reader of the certificate has to know.
        state: The module that runs, where it can write buffers of its own: they are put back behind
            every run.

    Example:
        >>> Deployed(lambda x: (x,)).kernels
        ()
    """

    run: Callable[..., Sequence[Tensor]]
    kernels: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()
    state: Any = None


@dataclass(frozen=True)
class SiteView:
    """One site on one batch: what the decomposed graph and the deployed form compute there.

    Attributes:
        reading: The reading of the decomposed graph.
        tap: The site.
        grid: Its qparams.
        codes: Node of an upstream quantize op -> its codes, the same for both.
        value: What the decomposed graph quantizes, float32 or half precision.
        wanted: The codes of the decomposed graph.
        found: The codes of the deployed form, as integers of any dtype.

    Example:
        >>> from fxqfix.routes import SiteView
        >>> def explain(view: SiteView) -> int:  # of a route: how many codes are clamped there
        ...     limits = view.grid.quant_min, view.grid.quant_max
        ...     return int((view.found.clamp(*limits) != view.found).sum())
    """

    reading: Reading
    tap: Tap
    grid: QParams
    codes: Mapping[fx.Node, Tensor]
    value: Tensor
    wanted: Tensor
    found: Tensor


@dataclass(frozen=True)
class Route:
    """A way of deploying a decomposed graph.

    Attributes:
        name: What `certify` calls it.
        summary: What it is, in one sentence.
        deploy: (decomposed graph, one batch of inputs, whether the batch's first dimension is
            dynamic, or which axes are) -> the deployed form. It may raise anything; `certify` says
            which route failed.
        about: What else a reader of the docs should know, in Markdown.
        extra: The pip extra of fxqfix that it needs, "" for none.
        packages: The packages whose versions stand in the certificate, beside torch.
        arithmetic: The codes that the route's own integer arithmetic gives at a site, None where
            that is not known. Codes that differ and are these have the cause `requantization`.
        lapses: Names of `fxqfix.routes.LAPSES`: what its kernels are known to compute otherwise, in
            the order in which they are asked. They are causes too.
        passes: What a prepared model's decomposed graph goes through for it; a graph that the user
            decomposed is deployed as it is.
        anywhere: Whether it runs where the model is. Else a model that is not on the CPU is
            deployed from a copy there, and the certificate says so.
        certify: In place of `deploy`, where a route does not start from the decomposed graph:
            (model, data, progress) -> the certificate.

    Example:
        >>> from fxqfix.routes import registry
        >>> registry()["export"].extra
        ''
    """

    name: str
    summary: str
    deploy: Callable[..., Deployed] | None = None
    about: str = ""
    extra: str = ""
    packages: tuple[str, ...] = ()
    arithmetic: Callable[[SiteView], Tensor | None] = field(default=lambda _: None)
    lapses: tuple[str, ...] = ()
    passes: tuple[Pass, ...] = (PinRanges(),)
    anywhere: bool = False
    certify: Callable[[nn.Module, Iterable[Any], bool | None], Certificate] | None = None


def unlike(wanted: Sequence[Tensor], found: Sequence[Any]) -> str:
    """Why what a route gives can't be compared: its kind, its shapes, NaN and inf; "" if it can."""
    kinds = sorted({type(value).__name__ for value in found if not isinstance(value, Tensor)})
    if kinds:
        return f"it gives {', '.join(kinds)}, and tensors are due"
    mine, theirs = ([tuple(t.shape) for t in values] for values in (wanted, found))
    if mine != theirs:
        return f"it gives outputs of shapes {theirs}, the graph {mine}"
    for i, (due, value) in enumerate(zip(wanted, found, strict=True)):
        if bool(due.isfinite().all()) and not bool(value.isfinite().all()):
            return f"it gives NaN or inf in output {i}, where the graph gives numbers"
    return ""


def output_discrepancy(wanted: Tensor, found: Tensor, grid: QParams) -> Discrepancy:
    """Compare an output that shows a site's codes: the codes, and where these are equal the bits.

    Args:
        wanted: What the graph gives, floats on the grid.
        found: What the route gives.
        grid: The grid.

    Returns:
        Codes; where all are equal and bits are not, the noise of the values, and as differing those
        that no rounding of a dequantize makes.
    """
    wide = grid.with_range(*grid.container)
    codes = discrepancy(quantize(wanted, grid), quantize(found, wide), grid, wide)
    if not codes.exact or torch.equal(wanted, found):
        return codes
    values = float_discrepancy(wanted, found)
    largest = max(float(wanted.abs().max()), grid.scales[0])
    most = _ROUNDINGS * torch.finfo(wanted.dtype).eps * largest
    beyond = int(((wanted - found).abs() > most).sum())
    return replace(codes, differing=beyond, noise=values.noise, max_abs=values.max_abs)

"""XNNPACK's int8 arithmetic, exactly (measured on XNNPACK of executorch 1.5.1, x86).

``xs, ws, os`` are float32 scales of input, weight and output, ``acc`` the exact integer sum with
zero points taken off; zero points are those of signed codes.

* Convolution and linear: ``rne(f(f(acc + bi) * m)) + zo`` with ``m = f(f(xs * ws) / os)``. The
  bias is an int32, ``bi = rne(b * f(1 / (ws * xs)))``: the product is rounded to float32 where the
  weight is per channel, and is a double where it is not. 0 of 325k codes differ.
* Add, sub: ``(a * ma + b * mb + 2^(shift - 1)) >> shift``, a tie goes up. The larger one of
  ``as / os``, ``bs / os`` gets a multiplier of 21 bits. 0 of 1.3M, all pairs of codes on ten grids.
* Mul: ``rne(f(a * b * m)) + zo`` with ``m = f(f(as * bs) / os)``. 0 of 0.7M.
* Mean over an image: ``rne(f(f(S * m) + zo))`` with ``m = f(xs / f(n * os))``, the zero point added
  before rounding. 0 of 295k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxqfix import ops
from fxqfix.dialects._base import modules_of
from fxqfix.dialects.decomposed import is_dequantize, qparams_of_op
from fxqfix.passes._region import Cutter, Region
from fxqfix.passes.suit_xnnpack import FUSED
from fxqfix.qparams import QParams
from fxqfix.routes._base import SiteView

__all__ = ["codes_of_site"]

_BITS = 20  # of the larger multiplier of a sum


def codes_of_site(view: SiteView) -> Tensor | None:
    """The codes that XNNPACK's kernel gives at a site; None for an op that it runs in float32.

    Args:
        view: The site on one batch.
    """
    site = _Site(view)
    found = ops.match_node(site.core, site.modules)
    if found is None or view.grid.axis is not None:
        return None
    if found.spec.family == "weighted":
        steps = site.weighted()
    elif found.key in ("add", "sub"):
        steps = site.sum(-1 if found.key == "sub" else 1)
    elif found.key == "mul":
        steps = site.product()
    elif found.key in ("mean", "adaptive_avg_pool2d"):
        steps = site.mean()
    else:
        return None
    return None if steps is None else site.clamped(steps)


class _Site:
    """A site's op: the one in front of a fused activation, and its inputs."""

    def __init__(self, view: SiteView) -> None:
        self.view, self.graph_module = view, view.reading.graph_module
        self.modules = modules_of(self.graph_module)
        self.core, self.limits = view.tap.producer, (-torch.inf, torch.inf)
        found = ops.match_node(self.core, self.modules)
        if found is not None and found.key in FUSED:
            ends = torch.tensor([-torch.inf, torch.inf])
            starts = frozenset({self.core.all_input_nodes[0]})
            act = Cutter(self.graph_module, starts).region(self.core)
            low, high = act.module(self.graph_module)(ends).tolist()
            self.core, self.limits = self.core.all_input_nodes[0], (low, high)
        self.scale = _single(view.grid)
        self.point = _signed_point(view.grid)

    def clamped(self, steps: Tensor) -> Tensor:
        """Codes on the site's grid, of whole steps from its zero point."""
        low, high = (
            torch.round(torch.tensor(end, dtype=torch.float32) / self.scale) + self.point
            for end in self.limits
        )
        signed = (steps.double() + self.point).clamp(-128, 127).clamp(low.double(), high.double())
        return signed.to(torch.int32) + (self.view.grid.container[0] + 128)

    def inputs(self, count: int) -> list[tuple[Tensor, QParams]] | None:
        """Codes less their zero points, int64, and grids of inputs that are all quantized."""
        given = [a for a in self.core.args[:count] if isinstance(a, fx.Node)]
        found = []
        for node in given:
            if not is_dequantize(node) or node.all_input_nodes[0] not in self.view.codes:
                return None
            grid = qparams_of_op(node, self.graph_module)
            if grid is None:
                return None
            codes = self.view.codes[node.all_input_nodes[0]]
            found.append((codes.to(torch.int64) - int(grid.zero_points[0]), grid))
        return found if len(found) == count else None

    def weighted(self) -> Tensor | None:
        """Steps of a convolution or linear."""
        sites = frozenset(tap.node for tap in self.view.reading.activations)
        region = Cutter(self.graph_module, sites).region(self.core)
        integers = _Integers(self.graph_module, region, self.core)
        sums = integers.sums([self.view.codes[node] for node in region.inputs])
        if sums is None or integers.source is None or integers.weight is None:
            return None
        multiplier = _single(integers.source) * _scales(integers.weight) / self.scale
        return torch.round(sums.float() * _along(multiplier, sums, self.core, self.modules))

    def sum(self, sign: int) -> Tensor | None:
        """Steps of an addition or subtraction."""
        found = self.inputs(2)
        if found is None or self.core.kwargs.get("alpha", 1) != 1:
            return None
        ratios = torch.stack([_single(grid) / self.scale for _, grid in found])
        shift = _BITS + 1 - int(torch.frexp(ratios.max()).exponent)
        factors = torch.round(ratios.double() * 2.0**shift).to(torch.int64)
        (a, _), (b, _) = found
        return (a * factors[0] + sign * b * factors[1] + (1 << (shift - 1))) >> shift

    def product(self) -> Tensor | None:
        """Steps of a multiplication."""
        found = self.inputs(2)
        if found is None:
            return None
        (a, mine), (b, theirs) = found
        multiplier = _single(mine) * _single(theirs) / self.scale
        return torch.round((a * b).float() * multiplier)

    def mean(self) -> Tensor | None:
        """Steps of an average over each whole image."""
        found, shape = self.inputs(1), self.view.value.shape
        if found is None or len(shape) != 4 or shape[2:] != (1, 1):
            return None
        ((codes, grid),) = found
        if codes.dim() != 4:
            return None
        count = torch.tensor(float(codes.shape[2] * codes.shape[3]))
        multiplier = _single(grid) / (count * self.scale)
        total = codes.sum((2, 3), keepdim=True).float()
        return torch.round(total * multiplier + self.point) - self.point


class _Integers(fx.Interpreter):
    """Runs a convolution or linear on integers, in float64; the bias as int32.

    Attributes:
        source: The grid of the input.
        weight: The grid of the weight.
    """

    def __init__(self, graph_module: fx.GraphModule, region: Region, core: fx.Node) -> None:
        super().__init__(graph_module, graph=region.graph)
        self.root = graph_module
        self.core = list(region.graph.nodes)[-1].all_input_nodes[0]
        given = [*self.core.args[:3], self.core.kwargs.get("bias")]
        self.values = [n if isinstance(n, fx.Node) else None for n in given]
        self.source = self._grid(self.values[0])
        self.weight = self._grid(self.values[1])
        self.bias = next((n for n in self.values[2:] if n is not None), None)

    def _grid(self, node: fx.Node | None) -> QParams | None:
        return qparams_of_op(node, self.root) if node is not None and is_dequantize(node) else None

    def sums(self, codes: list[Tensor]) -> Tensor | None:
        """Exact sums of products and biases; None where an input is no integer."""
        if self.source is None or self.weight is None:
            return None
        found: Tensor = self.run(*codes)
        return found

    def run_node(self, n: fx.Node) -> Any:
        """Run a node on integers."""
        if n in self.values[:2]:
            grid = self._grid(n)
            codes = self.env[n.all_input_nodes[0]].double()
            assert grid is not None
            return codes - grid.tensors(codes)[1]
        value = super().run_node(n)
        return self._int32(value) if n is self.bias else value

    def _int32(self, bias: Tensor) -> Tensor:
        assert self.source is not None
        assert self.weight is not None
        if self.weight.axis is None:
            inverse = torch.tensor(1.0 / (self.weight.scales[0] * self.source.scales[0]))
        else:
            inverse = 1.0 / (_scales(self.weight) * _single(self.source))
        return torch.round(bias * inverse.float()).double().clamp(-(2**31), 2**31 - 1)


def _single(grid: QParams) -> Tensor:
    return torch.tensor(grid.scales[0], dtype=torch.float32)


def _scales(grid: QParams) -> Tensor:
    return torch.tensor(grid.scales, dtype=torch.float32)


def _signed_point(grid: QParams) -> int:
    """The zero point of the same grid in signed codes."""
    return int(grid.zero_points[0]) - 128 - grid.container[0]


def _along(multiplier: Tensor, sums: Tensor, core: fx.Node, modules: Any) -> Tensor:
    """A multiplier per output channel, shaped to the sums."""
    found = ops.match_node(core, modules)
    linear = found is not None and found.key.startswith("linear")
    if multiplier.numel() == 1 or linear:
        return multiplier
    shape = [1] * sums.dim()
    shape[1 if sums.dim() > 1 else 0] = -1
    return multiplier.reshape(shape)

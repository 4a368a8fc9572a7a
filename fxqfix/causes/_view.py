"""What a cause gets to see of one site on one batch, and the recomputations it may ask for.

Recomputations run only where codes differ, in float64 and on copies that are dropped at once, so
that a model without discrepancies pays nothing and memory stays flat.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxqfix import _torch
from fxqfix.dialects.weights import WeightView, holder
from fxqfix.pairing import Pair
from fxqfix.passes import FrozenFakeQuantize
from fxqfix.passes._region import cut
from fxqfix.passes._shadow_modules import Local
from fxqfix.qparams import QParams, quantize, regrid

__all__ = ["Recompute", "View"]

# Float32 roundings that a quantized kernel may spend on one value (scale product, bias, zero
# point, the product with the requantization multiplier): each is half a unit of 2**-23.
_ROUNDINGS = 4
_HALF_UNIT = 2.0**-24
# The shadow's own float32 error counts up to this many codes; one that is further from float64 is
# not rounding but another computation (BatchNorm or dropout in train mode, say).
_MOST = 2.0**-6


@dataclass(frozen=True)
class Recompute:
    """Computes a site anew under a hypothesis, from the folded and frozen prepared graph.

    Attributes:
        graph_module: The prepared graph, frozen, BatchNorm folded.
        end: The node whose value the site quantizes.
        starts: The site nodes that a region may start from.
        weights: Module path -> (prepared, converted) weight, for the pairs of weights.
        unfolded: The same graph before BatchNorm was folded.
        inner: Node name -> qparams of values that only the converted model quantizes, inside what
            is one float computation for the prepared model (a pool that eager mode observes not).
    """

    graph_module: fx.GraphModule
    end: fx.Node
    starts: frozenset[fx.Node]
    weights: Mapping[str, tuple[WeightView, WeightView]]
    unfolded: fx.GraphModule
    inner: Mapping[str, QParams] = field(default_factory=dict)

    @cached_property
    def own_weights(self) -> dict[str, tuple[WeightView, WeightView]]:
        """The weights that this site's own region uses."""
        paths = set(_paths(self._region()))
        return {path: pair for path, pair in self.weights.items() if path in paths}

    def _region(self) -> fx.GraphModule:
        return cut(self.graph_module, self.end, self.starts).module

    def trains(self, *kinds: type[nn.Module]) -> str:
        """Path of a module of these kinds in train mode that the region runs, "" without one."""
        for path in _paths(self._region()):
            for name, module in self.unfolded.get_submodule(path).named_modules():
                if module.training and isinstance(module, kinds):
                    return f"{path}.{name}" if name else path
        return ""

    def folded(self, local: Local) -> Tensor:
        """The site's value in float32, with BatchNorm folded."""
        inputs = _torch.tree_map_tensors(Tensor.clone, local.inputs)
        result: Tensor = self._region()(*inputs)
        return result

    @cached_property
    def own_inner(self) -> dict[str, QParams]:
        """Those of `inner` that lie in this site's region."""
        names = {n.name for n in self._region().graph.nodes if n.op != "placeholder"}
        return {name: q for name, q in self.inner.items() if name in names - {self.end.name}}

    def exact(
        self, local: Local, weights: Mapping[str, WeightView], *, inner: bool = False
    ) -> Tensor:
        """The site's value in float64 and eval mode, with the given weights.

        Args:
            local: The shadow's inputs.
            weights: Module path -> weight, in place of the region's own.
            inner: Whether to quantize in between where only the converted model does.
        """
        region = copy.deepcopy(self._region())
        if inner:
            _requantize(region, self.own_inner)
        for path, weight in weights.items():
            _fix_weight(region, path, weight)
        for path, module in list(region.named_modules()):
            if isinstance(module, FrozenFakeQuantize):
                _set(region, path, _Double(module))
        region.double().eval()
        inputs = [
            _wide(value) if pair is None else _dequantize_wide(*pair)
            for value, pair in zip(local.inputs, local.codes, strict=True)
        ]
        result: Tensor = region(*inputs)
        return result


def _paths(region: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in region.graph.nodes if n.op == "call_module"]


def _set(root: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, new)


def _fix_weight(region: fx.GraphModule, path: str, weight: WeightView) -> None:
    """Put a weight's exact real values where the region reads it."""
    module: Any = region.get_submodule(path)
    values = _dequantize_wide(weight.codes, weight.qparams)
    if isinstance(module, FrozenFakeQuantize):  # the weight of a functional op
        _set(region, path, _Constant(values))
        return
    inner = holder(module)
    inner.weight = nn.Parameter(values, requires_grad=False)
    if hasattr(module, "weight_fake_quant"):
        module.weight_fake_quant = nn.Identity()
    if weight.bias is not None and getattr(inner, "bias", None) is not None:
        inner.bias = nn.Parameter(weight.bias.detach().clone(), requires_grad=False)


def _requantize(region: fx.GraphModule, inner: Mapping[str, QParams]) -> None:
    """Round values to a grid in the middle of a region."""
    for node in [n for n in region.graph.nodes if n.name in inner]:
        path = f"requantize_{node.name}"
        region.add_module(path, _Requantize(inner[node.name]))
        with region.graph.inserting_after(node):
            new = region.graph.call_module(path, (node,))
        node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
    region.recompile()


class _Requantize(nn.Module):
    def __init__(self, qparams: QParams) -> None:
        super().__init__()
        self._qparams = qparams

    def forward(self, x: Tensor) -> Tensor:
        scale, point = (t.double() for t in self._qparams.tensors(x))
        low, high = self._qparams.container
        # Kernels add the zero point before they round: an odd one flips the parity of a tie.
        return (torch.round(x / scale + point).clamp(low, high) - point) * scale


class _Constant(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, _: Tensor) -> Tensor:
        value: Tensor = self.get_buffer("value")
        return value


class _Double(nn.Module):
    """A fake-quant inside a float64 region: it still quantizes float32 values."""

    def __init__(self, inner: FrozenFakeQuantize) -> None:
        super().__init__()
        self._inner = (inner,)  # hidden from .double()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self._inner[0](x.float())
        return result.double()


def _wide(value: Any) -> Any:
    return _torch.tree_map_tensors(
        lambda t: t.double() if t.is_floating_point() else t.clone(), value
    )


def _dequantize_wide(codes: Tensor, qparams: QParams) -> Tensor:
    scale, point = qparams.tensors(codes)
    return (codes.double() - point.double()) * scale.double()


@dataclass
class View:
    """One site on one batch.

    Attributes:
        pair: The prepared and the converted site.
        grid: The prepared qparams.
        target: The converted qparams.
        value: The value before quantization that the prepared op gives, float32.
        expected: The prepared op's codes, int32 on `grid`.
        raw: The converted model's codes on its own grid.
        own: The prepared model's own codes on `grid`, int32.
        local: The shadow's record; None for weights.
        recompute: Recomputations; None for weights.
        weight: For a weight site, the prepared weight.
        left: Mask of the codes that no cause before the present one explained.
        problem: Why a recomputation failed, "" where none did.
    """

    pair: Pair
    grid: QParams
    target: QParams
    value: Tensor
    expected: Tensor
    raw: Tensor
    own: Tensor
    local: Local | None = None
    recompute: Recompute | None = None
    weight: WeightView | None = None
    left: Tensor = field(init=False)
    problem: str = field(default="", init=False)

    def __post_init__(self) -> None:
        """All differing codes are left to explain."""
        self.left = self.differs_locally | self.differs

    @cached_property
    def actual(self) -> Tensor:
        """The converted model's codes on the prepared grid, int32."""
        return regrid(self.raw, self.target, self.grid)

    @cached_property
    def differs_locally(self) -> Tensor:
        """Mask of the codes that differ with the same inputs."""
        return self.actual != self.expected

    @cached_property
    def differs(self) -> Tensor:
        """Mask of the codes that differ from the prepared model's own."""
        return self.actual != self.own

    @cached_property
    def exact(self) -> Tensor:
        """The site's value in float64 with the prepared weights."""
        return self.recomputed({path: a for path, (a, _) in self._weights.items()})

    @cached_property
    def converted(self) -> Tensor:
        """The site's value in float64 with the converted weights."""
        return self.recomputed({path: b for path, (_, b) in self._weights.items()})

    @property
    def _weights(self) -> Mapping[str, tuple[WeightView, WeightView]]:
        return self.recompute.own_weights if self.recompute is not None else {}

    @cached_property
    def requantized(self) -> Tensor | None:
        """Like `converted`, quantized in between where the converted model is; None if nowhere."""
        if self.recompute is None or not self.recompute.own_inner:
            return None
        return self.recomputed({path: b for path, (_, b) in self._weights.items()}, inner=True)

    def recomputed(self, weights: Mapping[str, WeightView], *, inner: bool = False) -> Tensor:
        """The site's value in float64 with these weights; the float32 value where that fails."""
        if self.recompute is None or self.local is None:
            return self.value.double()
        try:
            return self.recompute.exact(self.local, weights, inner=inner)
        except (RuntimeError, TypeError, AttributeError) as error:
            # A user's module may not run in float64; the cause then works on float32 values.
            self.problem = f"no float64 recomputation: {error}"
            return self.value.double()

    @cached_property
    def folded(self) -> Tensor | None:
        """The codes in float32 with BatchNorm folded; None where there is none to fold."""
        if self.recompute is None or self.local is None:
            return None
        if not any(mine.folded for mine, _ in self.recompute.own_weights.values()):
            return None
        return quantize(self.recompute.folded(self.local), self.grid)

    @cached_property
    def weights_differ(self) -> bool:
        """Whether a weight that this site uses has other qparams than in the prepared model."""
        return any(not a.qparams.same_grid(b.qparams) for a, b in self._weights.values())

    def agrees(self, value: Tensor, qparams: QParams, codes: Tensor) -> Tensor:
        """Mask of the codes that are a rounding of `value`, within float32 arithmetic.

        The width is what float32 rounding can do to the value: a few roundings of its largest
        term, and the shadow's own measured deviation from float64.

        Args:
            value: Exact values, float64.
            qparams: The grid and range to quantize on.
            codes: The codes to judge, on that grid.
        """
        scale, point = (t.double() for t in qparams.tensors(value))
        scaled = value / scale
        own_error = ((self.value.double() - self.exact).abs().max() / scale).clamp(max=_MOST)
        terms = scaled.abs() + point.abs() + 2.0 * self._bias(scale) + 1.0
        width = _ROUNDINGS * _HALF_UNIT * terms + own_error
        low = torch.round(scaled - width) + point
        high = torch.round(scaled + width) + point
        low, high = (t.clamp(qparams.quant_min, qparams.quant_max) for t in (low, high))
        return (codes >= low) & (codes <= high)

    def _bias(self, scale: Tensor) -> float | Tensor:
        biases = [a.bias for a, _ in self._weights.values() if a.bias is not None]
        return max((float(b.detach().abs().max()) for b in biases), default=0.0) / scale

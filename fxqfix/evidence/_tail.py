"""Which part of a region can be computed at single places, and where exact sums take its place.

Ops that give each element of their own element of the input (relu, an addition) are computed at
the places that are asked about. In front of them, a convolution or linear of integer codes gives
exact sums: its products of integers are added in float32, where no sum can leave 2^24, and the
scale and the bias are applied in float64, at these places alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxqfix import ops
from fxqfix._settings import direct_sums
from fxqfix.dialects._writes import is_inplace
from fxqfix.dialects.weights import WeightView, holder
from fxqfix.evidence.places import Places
from fxqfix.qparams import QParams

__all__ = ["EXACT", "Product", "Tail"]

EXACT = 2**24
_SUMS = frozenset({"conv1d", "conv2d", "conv3d", "linear"})
_POINTWISE = frozenset(row.key for row in ops.TABLE if row.pointwise)


@dataclass(frozen=True)
class Product:
    """An op whose sums of products are exact integers.

    Attributes:
        node: The op.
        path: The path of its weight.
        source: The node of its input.
        function: (x, w) -> sums, linear in both.
        dims: Of the image; 0 of a linear.
        relu: Whether a relu is fused.
        bias: Its own bias, where the weight has none; a tensor, or None.
    """

    node: fx.Node
    path: str
    source: fx.Node
    function: Callable[[Tensor, Tensor], Tensor]
    dims: int
    relu: bool
    bias: Tensor | None = None

    @property
    def axis(self) -> int:
        """The axis of the channels, of input and output."""
        return -1 - self.dims

    def takes(self, weight: WeightView, grid: QParams) -> bool:
        """Whether integers tell all of this weight on this grid of inputs."""
        whole = weight.qparams.whole and grid.whole
        return whole and grid.axis is None and weight.qparams.axis in (None, 0)

    @staticmethod
    def steps(codes: Tensor, grid: QParams) -> tuple[Tensor, float]:
        """Codes with their zero point taken off, in float32, and how large they are at most.

        Args:
            codes: Of the input.
            grid: Of the input.
        """
        x = codes.to(torch.float32, copy=True).sub_(grid.zero_points[0])
        low, high = codes.aminmax() if codes.numel() else (0, 0)  # a byte each
        point = grid.zero_points[0]
        return x, max(point - int(low), int(high) - point)

    def sums(self, steps: tuple[Tensor, float], weight: WeightView, places: Places) -> Tensor:
        """The sums at some places, float64.

        Args:
            steps: What `steps` gave.
            weight: Its codes.
            places: Where.
        """
        x, reach = steps
        w = _integers(weight)
        with direct_sums():
            grouped = self.dims > 0 and w.shape[1] != x.shape[self.axis]
            sizes = _parts(w, reach, grouped)
            if not sizes:
                return places.take(self.function(x.double(), w.double()))
            if len(sizes) == 1:
                return places.take(self.function(x, w)).double()
            parts = torch.split(x, sizes, self.axis), torch.split(w, sizes, 1)
            pairs = zip(*parts, strict=True)
            return sum(  # type: ignore[return-value]  # of one tensor at least
                places.take(self.function(a.contiguous(), b.contiguous())).double()
                for a, b in pairs
            )

    def value(self, sums: Tensor, grid: QParams, weight: WeightView, places: Places) -> Tensor:
        """The op's value at some places, float64.

        Args:
            sums: What `sums` gave.
            grid: Of the input.
            weight: The weight.
            places: Where.
        """
        step = float(torch.tensor(grid.scales[0], dtype=torch.float32, device="cpu"))
        scale = torch.tensor(weight.qparams.scales, dtype=torch.float32, device=sums.device)
        scale = scale.double() * step
        own = scale.numel() > 1
        found = sums * (places.spread(scale, self.axis) if own else scale)
        bias = weight.bias if weight.bias is not None else self.bias
        if bias is not None:
            found.add_(places.spread(bias.detach().double(), self.axis))
        return found.relu_() if self.relu else found


def _integers(weight: WeightView) -> Tensor:
    """Codes with their zero points taken off, float32."""
    found = weight.codes.to(torch.float32, copy=True)
    if any(weight.qparams.zero_points):
        found.sub_(weight.qparams.tensors(found)[1])
    return found


def _parts(weight: Tensor, reach: float, grouped: bool) -> list[int]:
    """Sizes of the parts, along the input channels, whose sums are exact; [] where none are."""
    if _largest(weight) * reach < EXACT:
        return [weight.shape[1]]
    if grouped:
        return []
    for count in range(2, min(weight.shape[1], 16) + 1):
        chunks = weight.tensor_split(count, dim=1)
        if all(_largest(chunk) * reach < EXACT for chunk in chunks):
            return [chunk.shape[1] for chunk in chunks]
    return []


def _largest(weight: Tensor) -> float:
    """The largest sum of absolute values of an output, and a bit more: it is added in float32."""
    if not weight.numel():
        return 0.0
    return float(torch.linalg.vector_norm(weight.flatten(1), 1, dim=1).max()) * (1.0 + 2.0**-10)


@dataclass(frozen=True)
class Tail:
    """How a region is computed at single places.

    Attributes:
        nodes: What is computed at the places alone, the end of the region among them.
        products: By node, in front of these: ops whose sums are exact.
        given: Inputs that nothing else reads: their values are needed at the places alone.
    """

    nodes: frozenset[fx.Node]
    products: Mapping[fx.Node, Product]
    given: frozenset[fx.Node]

    @classmethod
    def of(
        cls,
        graph: fx.Graph,
        modules: Mapping[str, nn.Module],
        weights: Collection[str],
        left_out: Collection[str] = (),
    ) -> Tail:
        """Look at a region.

        Args:
            graph: The region.
            modules: What it calls, by path.
            weights: Paths of the weights whose codes are known.
            left_out: Names of nodes that need all of their values.
        """
        nodes = set[fx.Node]()
        for node in reversed(list(graph.nodes)):
            behind = all(user in nodes or user.op == "output" for user in node.users)
            behind = behind and bool(node.users) and _writes_its_own(node, modules)
            if behind and node.name not in left_out and _is_pointwise(node, modules):
                nodes.add(node)

        def alone(node: fx.Node) -> bool:
            return all(user in nodes or user.op == "output" for user in node.users)

        products = {}
        for node in graph.nodes:
            if node not in nodes and alone(node) and node.name not in left_out:
                found = _product(node, modules, weights)
                if found is not None:
                    products[node] = found
        inputs = (n for n in graph.nodes if n.op == "placeholder" and n.users and alone(n))
        return cls(frozenset(nodes), products, frozenset(inputs))


def _of_torch(target: Any) -> bool:
    return type(target).__module__.startswith("torch.")  # a subclass may compute otherwise


def _is_pointwise(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module" and not _of_torch(modules[str(node.target)]):
        return False
    found = ops.match_node(node, modules)
    return found is not None and found.key in _POINTWISE


def _writes_its_own(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether an op writes nowhere, or over what nobody else reads: no view of something else."""
    if not is_inplace(node, modules):
        return True
    source = node.all_input_nodes[0]
    found = ops.match_node(source, modules)
    new = source.op == "placeholder" or (found is not None and found.spec.key in _SUMS | _POINTWISE)
    return new and len(source.users) == 1


def _product(
    node: fx.Node, modules: Mapping[str, nn.Module], weights: Collection[str]
) -> Product | None:
    found = ops.match_node(node, modules)
    if found is None or found.spec.key not in _SUMS or not node.args:
        return None
    source: Any = node.args[0]
    if not isinstance(source, fx.Node) or source.op != "placeholder":
        return None
    if node.op == "call_module":
        path, module = str(node.target), modules[str(node.target)]
        inner = holder(module)
        known = path in weights and len(node.args) == 1 and not node.kwargs
        if not known or not _of_torch(module) or hasattr(module, "bn"):
            return None
        if getattr(inner, "padding_mode", "zeros") != "zeros":
            return None
        function, dims = _functional(found.spec.dims, inner), found.spec.dims
        return Product(node, path, source, function, dims, found.relu, inner.bias)
    return _called(node, source, found, weights)


def _functional(dims: int, module: Any) -> Callable[[Tensor, Tensor], Tensor]:
    if not dims:
        return F.linear
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    options = {n: getattr(module, n) for n in ("stride", "padding", "dilation", "groups")}
    return functools.partial(function, **options)


def _called(
    node: fx.Node, source: fx.Node, found: ops.Match, weights: Collection[str]
) -> Product | None:
    """A function of a weight's fake-quant, whose bias is that of the weight."""
    if node.op != "call_function" or len(node.args) < 2 or {"weight", "bias"} & node.kwargs.keys():
        return None
    weight: Any = node.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "call_module":
        return None
    rest = node.args[3:]
    if str(weight.target) not in weights or any(isinstance(a, fx.Node) for a in rest):
        return None

    def function(x: Tensor, w: Tensor) -> Tensor:
        result: Tensor = node.target(x, w, None, *rest, **node.kwargs)  # type: ignore[operator]
        return result

    return Product(node, str(weight.target), source, function, found.spec.dims, found.relu)

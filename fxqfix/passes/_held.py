"""Modules of a prepared graph whose forward is known, in a form that costs less.

They give the same bits: a weight that no run changes is quantized once, and an activation once for
its codes and its value. The first batch checks that module by module; where one gives other bits,
the user's own runs from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxqfix import _torch
from fxqfix.dialects._code import around
from fxqfix.dialects.weights import batch_norm_factor, effective_weight
from fxqfix.passes._codes import codes_and_values, fits
from fxqfix.passes._shadow_modules import Snapshot
from fxqfix.qparams import QParams

__all__ = [
    "Checked",
    "HeldQuantize",
    "HeldWeight",
    "held_weights",
    "is_known_quantizer",
    "owned",
    "put",
]

_QAT, _FUSED = "torch.ao.nn.qat", "torch.ao.nn.intrinsic.qat"
# Their forward is one op on a weight that a fake-quant of their own quantizes.
_WEIGHTED = (
    *(f"{_QAT}.Conv{n}d" for n in (1, 2, 3)),
    *(f"{_FUSED}.{kind}{n}d" for kind in ("ConvBn", "ConvBnReLU") for n in (1, 2, 3)),
    *(f"{_FUSED}.ConvReLU{n}d" for n in (1, 2, 3)),
    *(f"{_QAT}.Linear", f"{_FUSED}.LinearReLU", f"{_FUSED}.LinearBn1d"),
)
_QUANTIZERS = (
    "torch.ao.quantization.FakeQuantize",
    "torch.ao.quantization.FusedMovingAvgObsFakeQuantize",
    "fxqfix.passes._frozen.FrozenFakeQuantize",
)
_ELEMENTWISE = (nn.ReLU, nn.ReLU6, nn.Hardtanh)


class Checked:
    """What stands in for a module, and is held against it on its first call.

    Attributes:
        trusted: Whether it gives the same bits; None where nobody has looked yet.
    """

    trusted: bool | None = None
    site = ""  # for messages
    _own: tuple[Any, ...] = ()  # owned by its branch

    def judged(self, found: Tensor, wanted: Tensor) -> Tensor:
        """What to go on with; says whether both are the same."""
        self.trusted = _same_bits(found, wanted)
        return wanted


class HeldWeight(Checked, nn.Module):
    """A convolution or linear of torch's QAT, its weight quantized once.

    Args:
        own: The module, in eval mode.
        known: Weights by path, shared among branches.
        path: Its path.
    """

    def __init__(self, own: nn.Module, known: dict[str, Tensor], path: str) -> None:
        super().__init__()
        self._own = (own,)
        self._known, self.site = known, path
        self._modules.update(own._modules)  # eager models call quantizers inside of it
        self._relu = "ReLU" in type(own).__name__
        self._weight: Tensor | None = None
        self._factor: Tensor | None = None

    def forward(self, x: Any) -> Any:
        """The module's value."""
        own = self._own[0]
        if self.trusted is False or not isinstance(x, Tensor):
            return own(x)
        found = self._computed(x)
        return found if self.trusted else self.judged(found, own(x))

    def _computed(self, x: Tensor) -> Tensor:
        own = self._own[0]
        bn = getattr(own, "bn", None)
        if self._weight is None:
            self._fill()
        assert self._weight is not None  # filled
        bias = own.bias
        if bn is not None:
            bias = self._weight.new_zeros(self._weight.shape[0])
        if isinstance(own, nn.Linear):
            value = F.linear(x, self._weight, bias)
        else:
            value = own._conv_forward(x, self._weight, bias)
        if bn is not None:
            assert self._factor is not None  # there is one with every BatchNorm
            value.div_(self._factor)
            if own.bias is not None:
                value.add_(own.bias.reshape(self._factor.shape))
            value = bn(value)
        return value.relu_() if self._relu else value

    def _fill(self) -> None:
        """Quantize the weight; one that another branch has already is not kept twice."""
        own = self._own[0]
        found = own.weight_fake_quant(effective_weight(own))
        other = self._known.setdefault(self.site, found)
        self._weight = other if _same_bits(other, found) else found
        factor = batch_norm_factor(own)
        if factor is not None:
            self._factor = factor.reshape([1, -1] + [1] * (found.dim() - 2))


class HeldQuantize(Checked, Snapshot):
    """A fake-quant and the snapshot of its codes, in one go over the values.

    Args:
        site: Its name, for messages.
        qparams: The grid.
        own: The fake-quant.
        overwrites: Whether nobody else reads its input.
    """

    def __init__(self, site: str, qparams: QParams, own: nn.Module, overwrites: bool) -> None:
        super().__init__(qparams)
        self.site = site
        self._own, self._overwrites = (own,), overwrites

    def forward(self, value: Any) -> Any:
        """Codes and values."""
        wanted = None if self.trusted else self._own[0](value)
        found = None
        if self.trusted is not False and isinstance(value, Tensor):
            found = codes_and_values(value, self.qparams, overwrite=self._overwrites)
        if found is not None and wanted is not None:
            self.judged(found[1], wanted)
        if found is None or self.trusted is False:
            wanted = self._own[0](value) if wanted is None else wanted
            return super().forward(wanted), wanted
        self.seen(found[1])
        return found


def held_weights(model: fx.GraphModule, known: dict[str, Tensor]) -> dict[str, HeldWeight]:
    """Stand-ins for the modules of a held model whose forward is known, by path.

    Args:
        model: The model.
        known: Weights by path, shared among branches.
    """
    kinds, read = (
        _resolved(_WEIGHTED),
        [str(n.target) for n in model.graph.find_nodes(op="get_attr")],
    )
    return {
        path: HeldWeight(module, known, path)
        for path, module in model.named_modules()
        if type(module) in kinds
        and _is_still(module)
        and not any(target.startswith(f"{path}.") for target in read)
    }


def put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules at their paths.

    Args:
        model: The model; it is changed.
        modules: By path.
    """
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)


@contextmanager
def doubted(model: nn.Module) -> Iterator[list[str]]:
    """Hold all stand-ins against what they stand for once more.

    Args:
        model: A twin, or a part of one.

    Yields:
        A list, which gets the sites that give other bits now.
    """
    before = [m for m in model.modules() if isinstance(m, Checked) and m.trusted]
    for module in before:
        module.trusted = None
    found = list[str]()
    yield found
    found += [m.site for m in before if m.trusted is False]


def is_known_quantizer(module: nn.Module, grid: QParams) -> bool:
    """Whether a module fake-quantizes to a grid, and does nothing else.

    Args:
        module: The module, held still.
        grid: The grid.
    """
    known: Any = module
    if type(module) not in _resolved(_QUANTIZERS) or not _is_plain(module) or not fits(grid):
        return False
    return bool(known.fake_quant_enabled[0]) and not bool(known.observer_enabled[0])


def owned(node: fx.Node, modules: Mapping[str, nn.Module], sites: Any) -> bool:
    """Whether a value lies in memory that nothing but the node's only user reads.

    Args:
        node: What gives the value.
        modules: What the graph calls, by path.
        sites: Nodes whose fake-quant is held.
    """
    if len(node.users) != 1 or node.op != "call_module":
        return False
    if node in sites:  # a tensor of its own, or its input's, which nobody else read
        return True
    module: Any = modules.get(str(node.target))
    if isinstance(module, HeldWeight):
        return True
    if type(module) not in _ELEMENTWISE or not _is_plain(module):
        return False
    return not module.inplace or owned(node.all_input_nodes[0], modules, sites)


def _is_still(module: Any) -> bool:
    """Whether no run changes its weight: in eval mode, without code of the user's."""
    quantizer, bn = module.weight_fake_quant, getattr(module, "bn", None)
    parts = [m for m in (module, quantizer, bn) if m is not None]
    if not all(map(_is_plain, parts)) or type(quantizer) not in _resolved(_QUANTIZERS):
        return False
    if module.training or bool(quantizer.observer_enabled[0]):
        return False
    if getattr(module, "_enable_slow_path_for_better_numerical_stability", False):
        return False
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if bn is None:
        return True
    return type(bn) in kinds and not bn.training and bn.running_var is not None and bn.affine


def _is_plain(module: nn.Module) -> bool:
    """Whether nothing runs around its forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not hooks and "forward" not in vars(module) and next(around(module), None) is None


def _resolved(names: tuple[str, ...]) -> set[Callable[..., Any]]:
    return {kind for name in names if (kind := _torch.resolve(name)) is not None}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype == torch.float32
    alike = alike and one.shape == other.shape and one.stride() == other.stride()
    return alike and torch.equal(one.view(torch.int32), other.view(torch.int32))

"""fold-batchnorm: fold the BatchNorm of QAT's conv-BN and linear-BN modules into the weight."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx, nn

from fxqfix import _torch
from fxqfix.dialects._base import is_exported
from fxqfix.dialects.weights import batch_norm_factor, folded_parameters, holder
from fxqfix.errors import UnsupportedError
from fxqfix.passes._base import Pass, Rewriter
from fxqfix.passes._fold_exported import fold_exported
from fxqfix.passes._frozen import FrozenFakeQuantize

__all__ = ["FoldBatchNorm"]

_QAT, _IQAT = "torch.ao.nn.qat", "torch.ao.nn.intrinsic.qat"

# QAT module with BatchNorm -> QAT module without. One row per module that torch has.
_FOLDED = {
    **{f"{_IQAT}.ConvBn{d}d": f"{_QAT}.Conv{d}d" for d in (2, 3)},
    f"{_IQAT}.ConvBn1d": f"{_QAT}.Conv1d",
    **{f"{_IQAT}.ConvBnReLU{d}d": f"{_IQAT}.ConvReLU{d}d" for d in (1, 2, 3)},
    f"{_IQAT}.LinearBn1d": f"{_QAT}.Linear",
}


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold BatchNorm into QAT convolutions and linears, in eval semantics (running statistics).

    QAT computes ``conv(x, fq(w * g / std)) / (g / std)``, then BatchNorm; conversion folds. The
    folded weight here is ``w * g / std`` by the very arithmetic of the QAT module, so that its
    fake-quant sees the same bits and gives the same codes. In a PT2E graph, which spells that out,
    it is the value of the graph's own nodes.

    Example:
        >>> from fxqfix.passes import FoldBatchNorm
        >>> FoldBatchNorm()
        FoldBatchNorm()
    """

    name: ClassVar[str] = "fold-batchnorm"
    requires: ClassVar[tuple[str, ...]] = ("freeze-qparams",)

    def rewrite(self, rewriter: Rewriter) -> None:
        """Swap each module with a BatchNorm for its twin without one; in PT2E, nodes."""
        if isinstance(rewriter.module, fx.GraphModule) and is_exported(rewriter.module):
            fold_exported(rewriter)
            return
        table = {
            source: target
            for a, b in _FOLDED.items()
            if (source := _torch.resolve(a)) is not None
            and (target := _torch.resolve(b)) is not None
        }
        for path, module in list(rewriter.module.named_modules(remove_duplicate=False)):
            target = table.get(type(module))
            if target is not None:
                folded = _fold(module, target)
                if not isinstance(rewriter.module, fx.GraphModule):
                    folded = _convertible(folded)
                rewriter.set_module(path, folded, f"{type(module).__name__} -> {target.__name__}")

    def ensures(self, after: nn.Module) -> None:
        """No module that computes with a BatchNorm of its own may be left."""
        for path, module in after.named_modules():
            if batch_norm_factor(module) is not None and hasattr(module, "weight_fake_quant"):
                raise UnsupportedError(
                    f"{type(module).__name__} has no form without BatchNorm",
                    where=f"{self.name}, {path}",
                    remedy="subclass one of torch's QAT modules, or fold this BatchNorm by hand",
                )


def _fold(module: nn.Module, target: type[nn.Module]) -> nn.Module:
    source: Any = module
    weight, bias = folded_parameters(module)
    assert bias is not None  # the table lists modules with a BatchNorm
    options: dict[str, Any] = {"bias": True, "qconfig": source.qconfig}
    if isinstance(source, nn.Linear):
        new: Any = target(source.in_features, source.out_features, **options)
    else:
        new = target(
            source.in_channels,
            source.out_channels,
            source.kernel_size,
            stride=source.stride,
            padding=source.padding,
            dilation=source.dilation,
            groups=source.groups,
            padding_mode=source.padding_mode,
            **options,
        )
    new.weight, new.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    new.weight_fake_quant = source.weight_fake_quant
    _move_extras(source, new)
    folded: nn.Module = new.train(source.training)
    return folded


def _convertible(folded: nn.Module) -> nn.Module:
    """The module itself where torch's eager conversion knows its kind, else a float twin.

    Eager mode has QAT modules of one dimension with BatchNorm only. The twin holds the frozen
    weight's values, and conversion finds the frozen qparams in its qconfig.
    """
    known = _torch.resolve("torch.ao.quantization.get_default_static_quant_module_mappings")()
    source: Any = folded
    frozen = source.weight_fake_quant
    if type(folded) in known or not isinstance(frozen, FrozenFakeQuantize):
        return folded
    twin: nn.Module = source.to_float()
    inner = holder(twin)
    inner.weight = nn.Parameter(frozen(source.weight))
    qconfig = source.qconfig._replace(weight=functools.partial(copy.deepcopy, frozen))
    for owner in (twin, inner):
        owner.qconfig = qconfig
    _move_extras(folded, twin)
    return twin.train(folded.training)


def _move_extras(source: nn.Module, new: nn.Module) -> None:
    """Keep what eager prepare attached: the observer and the hooks that run it."""
    observer = getattr(source, "activation_post_process", None)
    if observer is not None:
        new.add_module("activation_post_process", observer)
    new._forward_hooks.update(source._forward_hooks)
    new._forward_pre_hooks.update(source._forward_pre_hooks)

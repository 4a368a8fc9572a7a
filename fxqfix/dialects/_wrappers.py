"""How users hold a model: what wraps it, and what another tool quantized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, fx, nn
from torch.optim.swa_utils import AveragedModel

from fxqfix import _torch
from fxqfix.dialects._code import around
from fxqfix.errors import DialectError, FxqfixError, TraceError, UnsupportedError

__all__ = ["check_tool", "copied", "held_graphs", "refuse_code", "unwrapped"]

M = TypeVar("M", bound=nn.Module)

_HOLD = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
# Packages that quantize by modules or tensors of their own.
_TOOLS = frozenset(
    {"aimet_torch", "auto_gptq", "awq", "bitsandbytes", "brevitas", "compressed_tensors"}
    | {"gptqmodel", "hqq", "modelopt", "mqbench", "nncf", "optimum", "pytorch_quantization"}
    | {"quanto", "torchao"}
)


def unwrapped(model: Any) -> Any:
    """The model inside torch.compile, as_deployed, DataParallel and its like, and AveragedModel.

    Args:
        model: Anything; what is no wrapper is returned as it is.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> unwrapped(nn.DataParallel(AveragedModel(net))).weight.equal(net.weight)
        True
    """
    while isinstance(model, nn.Module):
        # torch.compile's wrapper is told by its part: its class would import the compiler.
        if isinstance(model, _HOLD):
            model = model._modules["module"]
        elif "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]
        elif (held := getattr(type(model), "fxqfix_holds", None)) is not None:  # as_deployed's
            model = model._modules[held]
        else:
            break
    return model


def held_graphs(model: nn.Module) -> list[tuple[str, fx.GraphModule]]:
    """The prepared GraphModules that a module holds, by path, without those inside of others.

    Args:
        model: A module; a GraphModule holds none in this sense.

    Example:
        >>> held_graphs(nn.Linear(2, 2))
        []
    """
    found: list[tuple[str, fx.GraphModule]] = []
    inside: tuple[str, ...] = ()
    for path, module in () if isinstance(model, fx.GraphModule) else model.named_modules():
        if isinstance(module, fx.GraphModule) and not path.startswith(inside):
            inside = (*inside, f"{path}.")
            if any(_torch.is_quantizer(m) for m in module.modules()):
                found.append((path, module))
    return found


def copied(model: M, where: str, kind: type[FxqfixError] = TraceError) -> M:
    """A deep copy of a model.

    Args:
        model: The user's.
        where: Who asks, for messages.
        kind: What to raise.

    Raises:
        FxqfixError: torch can't copy it; the tensor in its way is named.

    Example:
        >>> copied(nn.Linear(2, 2), "trace")
        Linear(in_features=2, out_features=2, bias=True)
    """
    try:
        return _torch.copied(model)
    except Exception as error:  # whatever a user's module raises
        name = type(model).__name__
        found = next(_tracked(model), None)
        if found is not None:
            raise kind(
                f"{name} can't be copied: a tensor that it keeps tracks gradients",
                where=where,
                found=found[0],
                remedy=_permanent(found[1])
                or "run what made it (calibration, conversion) under torch.no_grad(), or put its "
                "detach() there",
            ) from error
        raise kind(
            f"{name} can't be copied: {error}",
            where=where,
            remedy="make copy.deepcopy(model) work; a converted model needs its engine in force",
        ) from error


def _permanent(module: nn.Module) -> str:
    """How to make weights permanent that a hook of torch.nn.utils computes; "" without one."""
    for hook in module._forward_pre_hooks.values():
        home, kind = type(hook).__module__, type(hook).__name__
        if home == "torch.nn.utils.prune":
            return (
                "call torch.nn.utils.prune.remove(module, name) first: it makes pruning permanent"
            )
        if home.startswith("torch.nn.utils."):
            call = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}
            return (
                f"a hook ({kind}) computes it before each forward: torch.nn.utils."
                f"{call.get(kind, 'parametrize.remove_parametrizations')}(module) makes it a "
                "parameter again: call it first"
            )
    return ""


def _tracked(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Where modules keep tensors that track gradients and are no leaves; deepcopy refuses them."""
    for path, module in model.named_modules():
        for name, value in (vars(module) | module._buffers).items():
            kept = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(v, Tensor) and not v.is_leaf for v in kept):
                yield f"{name!r} of {type(module).__name__} at {path!r}", module


def check_tool(model: nn.Module, where: str) -> None:
    """Refuse what another tool quantized: its fake-quants and tensors are none that torch.ao has.

    Args:
        model: A model, not wrapped.
        where: Who asks, for messages.

    Raises:
        DialectError: It holds such modules or tensors, and nothing of torch.ao's.
    """
    found = next(_strange(model), None)
    if found is None or any(_torch.is_quantizer(m) for m in model.modules()):
        return
    path, kind = found
    made = _tool(kind)
    if made == "torchao":
        made = "torchao's quantize_, or prepared for it by a QATConfig"
    raise DialectError(
        f"{type(model).__name__} was quantized by {made}: such tensors and modules are not read",
        where=where,
        found=f"{kind.__name__} of {kind.__module__} at {path!r}",
        expected="observers, fake-quants or kernels of torch.ao, or of prepare_pt2e",
        remedy="start from the float model with prepare_fx, prepare_pt2e or eager prepare; this "
        "one can be checked against its float model's outputs only",
    )


def refuse_code(model: Any, where: str) -> None:
    """Refuse code of the user's that no graph shows: what is made of the graph would leave it out.

    Args:
        model: A model, wrapped or not.
        where: Who asks, for messages.

    Raises:
        UnsupportedError: A module has a forward hook, a forward put on, or parametrized weights.
    """
    model = unwrapped(model)
    for site, what in around(model):
        module = model if site.module == "the model" else model.get_submodule(site.module)
        raise UnsupportedError(
            "code that runs around a module would be left out of what is made here",
            where=f"{where}, {site.name}",
            found=f"{type(module).__name__} with {what}",
            remedy=_permanent(module)
            or "remove it (handle.remove() for a hook), or put what it does into the model's "
            "forward, so that it is traced",
        )


def _strange(model: nn.Module) -> Iterator[tuple[str, type]]:
    """Path and class of the modules and tensors that other tools made."""
    for path, module in model.named_modules():
        if _tool(type(module)) in _TOOLS:
            yield path, type(module)
        for name, value in module._parameters.items():
            if value is not None and _tool(type(value.data)) in _TOOLS:
                yield f"{path}.{name}".lstrip("."), type(value.data)


def _tool(kind: type) -> str:
    return kind.__module__.partition(".")[0]

"""Code that runs with a model and that no graph shows: hooks, forwards put on, parametrizations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from fxqfix.dialects.site import Site

__all__ = ["CODE", "around", "hooks", "keep_hooks"]

CODE = "code around the module"  # source of a site that stands for it
# Hooks of torch's own flows: observers of eager mode, input checks of exported programs.
_HOOKS_OF_TORCH = ("torch.ao.", "torch.export.", "torchao.")
# torch.compile puts its forward on the instance.
_FORWARDS_OF_TORCH = (*_HOOKS_OF_TORCH, "torch._dynamo.")
_FORWARDS_OF_FX = ("eval_with_key", "torch/fx/")


def _own_code(module: nn.Module) -> str:
    """What runs around a module's forward that a trace does not show; "" where nothing does.

    Forward hooks of the user's, a forward that was put on the instance or on the class of an FX
    graph, and parametrizations. Observer hooks of eager quantization are known.
    """
    for hook in _hooks(module):
        return f"a forward hook ({getattr(hook, '__name__', type(hook).__name__)})"
    if "forward" in vars(module) and not type(module).__module__.startswith(_FORWARDS_OF_TORCH):
        return "a forward of its own, put on the instance"
    if isinstance(module, fx.GraphModule):
        code = getattr(type(module).forward, "__code__", None)
        if code is not None and not any(f in code.co_filename for f in _FORWARDS_OF_FX):
            return "a forward of its own, put on its class"
    if "parametrizations" in module._modules:
        return "parametrized weights"
    return ""


def _hooks(module: nn.Module) -> Iterator[Any]:
    held = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return (hook for hook in held if not _is_torchs(hook))


def hooks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Path of the module and hook, of every forward hook that isn't torch's own.

    Args:
        model: The user's model.
    """
    return ((path, hook) for path, module in model.named_modules() for hook in _hooks(module))


def around(model: nn.Module) -> Iterator[tuple[Site, str]]:
    """Modules with hooks and the like, each as a site that stands for them, and what they have.

    Args:
        model: The user's model.
    """
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if what := _own_code(module):
            place = path or "the model", type(module).__name__
            yield Site(place[0], "activation", *place, source=CODE), f"{what}: no reader opens it"


def keep_hooks(source: Any, result: nn.Module) -> None:
    """Put the hooks of a model on what a pass made of it: copies of FX graphs lose them.

    Args:
        source: The user's model.
        result: What takes its place; it has the same inputs and outputs.
    """
    if result is source or not isinstance(source, fx.GraphModule):
        return
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        for key, hook in getattr(source, kind).items():
            if _is_torchs(hook):
                continue
            getattr(result, kind)[key] = hook
            for flags in (f"{kind}_with_kwargs", f"{kind}_always_called"):
                if key in getattr(source, flags, ()):
                    getattr(result, flags)[key] = True


def _is_torchs(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_HOOKS_OF_TORCH)

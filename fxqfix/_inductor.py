"""What fxqfix needs of Inductor beyond torch.compile: freezing, and which kernels it chose.

Freezing is no option of one compilation: Dynamo reads it from the global configuration when it
traces, and Inductor when it compiles, so that it is set around every call and put back.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from fxqfix import _extras, _torch

__all__ = ["Freezing", "lowered_to_x86", "without_compiler"]

# Of Inductor's counters those that count kernels on integers: "qconv_unary_lower_count", ...
_KERNEL = re.compile(r"(q\w+?)_lower_count|(qmaxpool2d|qcat)_matcher_count")

_ONEDNN = re.compile(r"onednn\.q(conv|linear)\w*pointwise")


class Freezing:
    """A module compiled by Inductor with its weights frozen, as its int8 kernels need it.

    Args:
        module: The module; its weights are constants from the first call on.
        dynamic: Whether sizes may vary without compiling anew.
    """

    def __init__(self, module: nn.Module, dynamic: bool) -> None:
        # fullgraph: where Dynamo would fall back to the module itself, it has to say so.
        self._call = torch.compile(module, fullgraph=True, dynamic=dynamic or None)

    def __call__(self, *inputs: Any) -> Any:
        """Call it; the first call compiles."""
        with _torch.inductor_freezing(), torch.no_grad(), _torch.quiet():
            return self._call(*inputs)

    def compiled_for(self, *inputs: Any) -> dict[str, int]:
        """Call it on inputs that it was not compiled for yet: the int8 kernels that it then has."""
        known = _torch.inductor_counts()
        before = Counter(known)
        self(*inputs)
        counts = _torch.inductor_counts()
        if counts is not known:  # Dynamo starts them anew with its first compilation
            before.clear()
        found = {_kernel(n): count - before[n] for n, count in counts.items()}
        return {name: count for name, count in sorted(found.items()) if name and count > 0}


def _kernel(counter: str) -> str:
    found = _KERNEL.fullmatch(counter)
    return (found[1] or found[2]) if found else ""


def lowered_to_x86(
    module: fx.GraphModule, inputs: tuple[Any, ...], what_for: str
) -> tuple[Callable[..., Any], dict[str, int]]:
    """Lower with torchao: Inductor's int8 patterns without its code generation.

    Args:
        module: The graph.
        inputs: Its inputs; their sizes become constants.
        what_for: The call that needs it, for the message.

    Returns:
        The lowered graph, and its kernels on integers.

    Raises:
        MissingDependencyError: torchao is not installed.
    """
    with _torch.quiet():
        torchao = _extras.require("torchao.quantization.pt2e.lowering", "pt2e", what_for)
        lowered: fx.GraphModule = torchao.lower_pt2e_quantized_to_x86(module, inputs)
    names = (str(node.target).removesuffix(".default") for node in lowered.graph.nodes)
    kernels = Counter(name for name in names if _ONEDNN.match(name))
    return lowered, dict(sorted(kernels.items()))


def without_compiler(error: BaseException) -> bool:
    """Whether an error, or one that it wraps, says that Inductor found no C++ compiler."""
    missing = _torch.no_compiler_error()
    last: BaseException | None = error
    while last is not None and missing is not None:
        if isinstance(last, missing):
            return True
        last = getattr(last, "inner_exception", None) or last.__cause__
    return False

"""A decomposed graph in float64, between the same quantize ops."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx

from fxqfix.dialects._dtypes import HALVES
from fxqfix.dialects.decomposed import is_quantize

__all__ = ["Wide"]

_NARROW = (torch.float32, *HALVES)


class Wide(fx.Interpreter):
    """Runs a graph in float64.

    What a dequantize gives is exact in float32, or rounded to half precision by the graph, and
    widened. A quantize op gets the float32 value that is next to the exact one, so that only the
    arithmetic in between differs.
    """

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A parameter or buffer, widened: one copy per run, which later ops may have written."""
        if target not in self._read:
            self._read[target] = _widened(super().get_attr(target, args, kwargs))
        return self._read[target]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph."""
        self._read: dict[str, Any] = {}
        return super().run(*args, **kwargs)

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An input, widened."""
        return _widened(super().placeholder(target, args, kwargs))

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and widen what it gives."""
        if is_quantize(n) or "choose_qparams" in str(n.target):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            narrow = [_cast(value, (torch.float64,), torch.float32) for value in args]
            return n.target(*narrow, **kwargs)  # type: ignore[operator]  # an OpOverload
        if "_assert_tensor_metadata" in str(n.target):  # of export: the dtype that was traced
            return None
        return _widened(super().run_node(n))

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a copy of the module, in float64."""
        return copy.deepcopy(self.fetch_attr(target)).double()(*args, **kwargs)


def _widened(value: Any) -> Any:
    return _cast(value, _NARROW, torch.float64)


def _cast(value: Any, given: tuple[torch.dtype, ...], wanted: torch.dtype) -> Any:
    return value.to(wanted) if isinstance(value, Tensor) and value.dtype in given else value

"""Trace an eager prepared or converted model to FX, with quantization modules as leaves.

Eager mode runs observers from forward hooks, which FX does not see. The tracer works on a copy,
takes those hooks off and writes the same calls into the graph, so that an eager model reads like
an FX one from here on.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import fx, nn

from fxqfix import _pt2e, _rng, _torch, ops
from fxqfix._settings import entry
from fxqfix.dialects._wrappers import copied, unwrapped
from fxqfix.errors import DeviceError, TraceError
from fxqfix.inserted import FloatIsland, InMemoryOrder

__all__ = ["call", "check_kind", "trace"]


class _Tracer(fx.Tracer):
    """FX's tracer, with every quantization module a leaf and hooked observers as nodes."""

    def __init__(self) -> None:
        super().__init__()
        self._hooks: dict[nn.Module, str] = {}

    def take_hooks(self, root: nn.Module) -> None:
        """Take off the observer hooks that become nodes: not those inside leaves (LSTM)."""
        inside: tuple[str, ...] = ()
        for path, module in root.named_modules():
            if path.startswith(inside):
                continue
            kind = _torch.observer_hook(module)
            if kind is not None:
                self._hooks[module] = kind
                _torch.strip_observer_hook(module)
            called = type(module).forward is not nn.Module.forward  # not so a ModuleList
            if path and called and self.is_leaf_module(module, path):
                inside = (*inside, f"{path}.")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if _torch.is_quantizer(m) or _torch.is_fused_module(m):
            return True
        if isinstance(m, FloatIsland | InMemoryOrder):
            return True
        found = ops.match(type(m))  # a user's subclass of LSTM or attention stays closed
        if found is not None and found.spec.family in ("recurrent", "attention"):
            return True
        name = type(m).__module__
        if name.startswith("torch.ao.quantization"):
            # Stubs are leaves, with or without an observer; QuantWrapper is opened.
            return all(name == "activation_post_process" for name, _ in m.named_children())
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        hook = self._hooks.get(m)
        if hook is None:
            return super().call_module(m, forward, args, kwargs)
        observer = m.activation_post_process
        assert isinstance(observer, nn.Module)  # narrows an nn.Module attribute
        if hook == "pre":
            return super().call_module(m, forward, (observer(args[0]), *args[1:]), kwargs)
        return observer(super().call_module(m, forward, args, kwargs))


@entry
def trace(model: nn.Module, example_inputs: Any = None) -> fx.GraphModule:
    """Turn an eager prepared or converted model into FX; a GraphModule passes through.

    Args:
        model: A module that `torch.ao.quantization.prepare / prepare_qat / convert` returned, any
            GraphModule, or a torch.export.ExportedProgram; torch.compile's wrapper, DataParallel,
            DistributedDataParallel and AveragedModel are taken off. It is not changed.
        example_inputs: One batch (tensor, tuple of arguments, or dict of keyword arguments). Where
            given, the traced model has to compute the very same bits on it.

    Returns:
        The GraphModule itself, a new GraphModule with copies of the model's modules, or an
        exported program's `.module()`.

    Raises:
        TraceError: FX cannot trace the model, or the trace computes something else.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU())
        >>> [n.name for n in trace(net, torch.ones(1, 4)).graph.nodes]
        ['input_1', '_0', '_1', 'output']
    """
    model = unwrapped(model)
    if isinstance(model, fx.GraphModule):
        return model
    if _pt2e.is_program(model):
        return _module_of(model)
    check_kind(model, "trace")
    root = copied(model, "trace")
    modes = {path: module.training for path, module in root.named_modules(remove_duplicate=False)}
    tracer = _Tracer()
    # Else the integer weights of a decomposed graph inside would be dequantized once and for all.
    tracer.proxy_buffer_attributes = any(isinstance(m, fx.GraphModule) for m in root.modules())
    tracer.take_hooks(root)
    try:
        graph = tracer.trace(root)
    except Exception as error:  # FX raises many kinds; each means the same to the caller
        raise TraceError(
            f"FX can't trace {type(model).__name__}: {error}",
            where="trace",
            remedy="move control flow that depends on data into a function at the top of a file "
            "and decorate it with torch.fx.wrap, or pass a GraphModule",
        ) from error
    traced = fx.GraphModule(root, graph, type(model).__name__)
    for path, module in traced.named_modules(remove_duplicate=False):
        module.training = modes.get(path, model.training)
    if example_inputs is not None:
        _check_same(model, traced, example_inputs)
    return traced


def check_kind(model: Any, where: str) -> None:
    """Refuse what is no model that fxqfix can read.

    Args:
        model: What the user gave.
        where: The call that it was given to, for the message.

    Raises:
        TraceError: It is no module, or a scripted one.
        DeviceError: Its tensors are on the meta device.

    Example:
        >>> check_kind(nn.Linear(2, 2), "trace")
    """
    if _pt2e.is_program(model):
        return
    model = unwrapped(model)
    problem = remedy = None
    if not isinstance(model, nn.Module):
        problem, remedy = "not a module", _what_to_pass(model)
    elif isinstance(model, torch.jit.ScriptModule):
        problem = "TorchScript can't be read"
        remedy = "pass the module that torch.jit.script or torch.jit.trace was given"
    if problem is not None:
        raise TraceError(
            problem,
            where=where,
            found=type(model).__name__,
            expected="torch.nn.Module",
            remedy=remedy,
        )
    # Asked of one tensor: to_empty and device("meta") move all, and lint has milliseconds.
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    if first is not None and first.is_meta:
        raise DeviceError(
            "the model has tensors on the meta device, which hold no values",
            where=where,
            found=type(model).__name__,
            remedy="give it storage, model.to_empty(device='cpu'), and load its weights",
        )


def _what_to_pass(found: Any) -> str:
    """What to give in place of something that is no module."""
    if isinstance(found, type):
        return f"pass an instance, not the class {found.__name__}"
    if isinstance(found, (str, PathLike)):
        return "pass the model: of a .pt2 file, torch.export.load(path)"
    if isinstance(found, Mapping):
        return "load the weights into a module that your code makes"
    return "pass a torch.nn.Module" + ("; this is a function" if callable(found) else "")


def _module_of(program: Any) -> fx.GraphModule:
    try:
        found: fx.GraphModule = program.module()
    except Exception as error:  # torch.export raises many kinds
        raise TraceError(
            f"torch can't make a module of this exported program: {error}",
            where="trace",
            found="ExportedProgram",
            remedy="pass the GraphModule that convert_pt2e returned",
        ) from error
    return found


def call(model: Any, batch: Any) -> Any:
    """Call a model on one batch: dicts as keywords, tuples and lists as positional arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def _check_same(model: nn.Module, traced: fx.GraphModule, example_inputs: Any) -> None:
    state = _rng.rng_state()
    try:
        with torch.no_grad():
            wanted = call(copy.deepcopy(model), copy.deepcopy(example_inputs))
            _rng.set_rng_state(state)
            found = call(copy.deepcopy(traced), copy.deepcopy(example_inputs))
    finally:
        _rng.set_rng_state(state)
    pairs = zip(_tensors(wanted), _tensors(found), strict=True)
    if not all(_equal(a, b) for a, b in pairs):
        raise TraceError(
            "the traced model computes something else than the model on example_inputs",
            where="trace",
            remedy="look for control flow or randomness that depends on the input",
        )


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, (tuple, list)) else []


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.is_quantized and b.is_quantized:
        return torch.equal(a.int_repr(), b.int_repr())
    return torch.equal(a, b)

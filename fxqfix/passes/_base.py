"""All pass machinery: the base class, the rewriter that records edits, and the registry.

A pass is a frozen dataclass: its fields are its options, so that it prints, compares and hashes.
Calling it works on a copy, checks what it promises and returns a `PassResult`, which has the
`graph_module` and `modified` that torch's own PassManager asks for.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from fxqfix import _pt2e, _rng, _torch
from fxqfix._settings import entry
from fxqfix.dialects._wrappers import copied
from fxqfix.errors import DialectError, FxqfixError, PassError, UnsupportedError
from fxqfix.passes._text import written
from fxqfix.registry import Registry

__all__ = ["Pass", "PassResult", "Rewriter", "chain", "registry"]

_REGISTRY: Registry[str, type[Pass]] = Registry("pass")


def registry() -> dict[str, type[Pass]]:
    """All passes by name.

    Example:
        >>> from fxqfix.passes import registry
        >>> "pin-ranges" in registry()
        True
    """
    return dict(_REGISTRY)


@dataclass(frozen=True)
class PassResult:
    """What a pass returns; torch's PassManager reads the first two fields.

    Attributes:
        graph_module: The new module (a plain module where an eager one went in).
        modified: Whether anything was edited.
        edits: What was edited, in order, one sentence each.
        remarks: What was looked at and left as it is, and why.

    Example:
        >>> import torch
        >>> from fxqfix.passes import SplitShared
        >>> SplitShared()(torch.fx.symbolic_trace(torch.nn.ReLU())).modified
        False
    """

    graph_module: Any
    modified: bool
    edits: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass
class Rewriter:
    """Edits a copy of a model, and records each edit; a pass changes the model through it.

    Attributes:
        module: The copy.
        edits: What was changed, in order.
        remarks: What was left as it is, and why.

    Example:
        >>> from fxqfix.passes import Rewriter
        >>> rewriter = Rewriter(nn.Sequential(nn.ReLU()))
        >>> rewriter.set_module("0", nn.Identity(), "ReLU -> nothing")
        >>> rewriter.edits
        ['0: ReLU -> nothing']
    """

    module: nn.Module
    edits: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def graph_module(self) -> fx.GraphModule:
        """The copy as a GraphModule.

        Raises:
            DialectError: It is an eager module.
        """
        if not isinstance(self.module, fx.GraphModule):
            raise DialectError(
                "this pass rewrites graphs",
                where="pass",
                found=type(self.module).__name__,
                expected="a GraphModule",
                remedy="call fxqfix.trace(model) first",
            )
        return self.module

    @property
    def graph(self) -> fx.Graph:
        """The copy's graph."""
        return self.graph_module.graph

    def set_module(self, path: str, new: nn.Module, why: str) -> None:
        """Put a module at a path, whether there was one before or not."""
        parent, _, name = path.rpartition(".")
        setattr(self.module.get_submodule(parent), name, new)
        self.edits.append(f"{path}: {why}")

    def add_buffer(self, name: str, value: Tensor) -> str:
        """Register a buffer at the top level under a free name and return that name."""
        free = self._free(name)
        self.module.register_buffer(free, value)
        return free

    def add_module(self, name: str, module: nn.Module) -> str:
        """Register a module at the top level under a free name and return that name."""
        free = self._free(name)
        self.module.add_module(free, module)
        return free

    def add_constant(self, name: str, value: object) -> str:
        """Set an attribute that is no tensor (packed weights) under a free name; return that."""
        free = self._free(name)
        setattr(self.module, free, value)
        return free

    def _free(self, name: str) -> str:
        free, count = name.replace(".", "_"), 0
        while hasattr(self.module, free):
            count += 1
            free = f"{name.replace('.', '_')}_{count}"
        return free

    def call(self, target: Any, args: tuple[Any, ...], name: str, **kwargs: Any) -> fx.Node:
        """Append a call_function node at the graph's insertion point."""
        return self.graph.create_node("call_function", target, args, kwargs, name=name)

    def buffer_node(self, name: str, value: Tensor) -> fx.Node:
        """Register a buffer and append the get_attr node that reads it."""
        with_name = self.add_buffer(name, value)
        return self.graph.create_node("get_attr", with_name, name=with_name)

    def parameter_node(self, name: str, value: Tensor) -> fx.Node:
        """Register a parameter at the top level and append the get_attr node that reads it."""
        free = self._free(name)
        self.module.register_parameter(free, nn.Parameter(value))
        return self.graph.create_node("get_attr", free, name=free)

    def replace(self, old: fx.Node, new: fx.Node, why: str, *, keep_name: bool = False) -> None:
        """Let every user of `old` use `new`, and erase `old`.

        Args:
            old: The node that goes.
            new: The node in its place: a new one, or one that the graph had before.
            why: What the edit does, for the record.
            keep_name: Whether `new` gets the name of `old`: sites and reports go by it.
        """
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        name = old.name
        self.graph.erase_node(old)
        if keep_name:
            new.name = name
        self.edits.append(f"{name}: {why}")

    def note(self, what: str) -> None:
        """Record an edit that was made through the graph itself."""
        self.edits.append(what)

    def remark(self, what: str) -> None:
        """Record what was looked at and left as it is."""
        self.remarks.append(what)

    @property
    def result(self) -> PassResult:
        """What was done so far."""
        edits, remarks = tuple(self.edits), tuple(self.remarks)
        return PassResult(self.module, bool(edits), edits, remarks)

    def finish(self) -> None:
        """Drop modules that no node uses any more, check the graph and recompile it."""
        if self.edits and isinstance(self.module, fx.GraphModule):
            _drop_unused_modules(self.module)
            with _torch.quiet():  # some builds warn of packed weights
                self.module.graph.lint()
            self.module.recompile()


def _drop_unused_modules(model: fx.GraphModule) -> None:
    """Delete modules that no node reaches, shared ones under each of their paths.

    torch's own delete_all_unused_submodules leaves the second path of a shared module behind.
    """
    targets = {str(n.target) for n in model.graph.nodes if n.op in ("call_module", "get_attr")}
    above = {part for target in targets for part in _prefixes(target)}
    for path, _ in list(model.named_modules(remove_duplicate=False)):
        if path and path not in above and targets.isdisjoint(_prefixes(path)):
            parent, _, name = path.rpartition(".")
            with contextlib.suppress(AttributeError):  # its parent is gone already
                delattr(model.get_submodule(parent), name)


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes: functional, verified, and duck-compatible with torch's PassManager.

    Subclasses set `name` and implement `rewrite`. They may say which passes stand before them in a
    pipeline (`requires`), and look at the result alone (`ensures`) or beside the model as it came
    to this pass (`check`), which is copied where another pass or the caller goes on with it.
    `str(step)` is what `parse` reads.

    Example:
        >>> from fxqfix.passes import PinRanges
        >>> PinRanges().name, PinRanges() == PinRanges()
        ('pin-ranges', True)
        >>> str(PinRanges(where="codes"))
        'pin-ranges{where=codes}'
    """

    name: ClassVar[str] = ""
    requires: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        """Register the pass under its name; one that only inherits a name has none of its own.

        Raises:
            RegistryError: Another pass has the name.
        """
        super().__init_subclass__()
        if cls.__dict__.get("name"):
            _REGISTRY.add(cls, module=cls.__module__)

    @abstractmethod
    def rewrite(self, rewriter: Rewriter) -> None:
        """Edit the rewriter's copy of the model."""

    def ensures(self, after: nn.Module) -> None:  # noqa: B027  # optional
        """Raise where the result breaks what the pass promises; the default promises nothing."""

    def check(self, before: nn.Module, after: nn.Module) -> None:  # noqa: B027  # optional
        """The same, where the promise is about both models; `before` is never edited."""

    def __str__(self) -> str:
        """The pass as text: its name, and the options that are not the default."""
        return written(self.name or type(self).__name__, self)

    def __call__(self, module: nn.Module) -> PassResult:
        """Run the pass on a copy of `module`, which is never changed.

        Raises:
            PassError: The pass failed for a reason that is no error of the caller's.
            UnsupportedError: torch can't copy the model.
        """
        return chain(module, self)

    def _copied(self, module: nn.Module) -> nn.Module:
        own = copied(module, self.name, UnsupportedError)
        _pt2e.own_annotations(own)
        return own

    def _run(self, before: nn.Module | None, rewriter: Rewriter) -> None:
        try:
            if before is None:  # what comes is edited in place
                overridden = type(self).check is not Pass.check
                before = self._copied(rewriter.module) if overridden else rewriter.module
            with torch.no_grad(), _rng.same_rng():
                self.rewrite(rewriter)
            rewriter.finish()
            self.ensures(rewriter.module)
            self.check(before, rewriter.module)
        except FxqfixError:
            raise
        except Exception as error:
            name = self.name or type(self).__name__
            raise PassError(
                f"pass {name} failed after {len(rewriter.edits)} edits: {error}",
                where=self.name,
                found=rewriter.edits[-1] if rewriter.edits else type(rewriter.module).__name__,
                remedy="the model is unchanged; please report this with the model",
            ) from error


@entry
def chain(
    module: nn.Module,
    *passes: Pass,
    owned: bool = False,
    between: Callable[[Pass, PassResult], object] | None = None,
) -> PassResult:
    """Run passes one after another, all on one copy of `module`: copying costs more than most.

    Args:
        module: What the first pass gets a copy of; it is never changed, unless it is owned.
        passes: One at least.
        owned: Whether `module` is the caller's own already, and can be edited in place.
        between: Called behind each pass with the pass and what it alone did, to print or to test.
            The model in it is the one that the next pass edits.

    Returns:
        The last pass's module, with the edits and remarks of all.

    Raises:
        PassError: A pass failed for a reason that is no error of the caller's, or stands before
            one that it requires.
        UnsupportedError: torch can't copy the model.

    Example:
        >>> from fxqfix.passes import FoldBatchNorm, SplitShared
        >>> chain(torch.fx.symbolic_trace(nn.ReLU()), FoldBatchNorm(), SplitShared()).modified
        False
    """
    _check_order(passes)
    current = module if owned else passes[0]._copied(module)
    edits, remarks = list[str](), list[str]()
    for index, step in enumerate(passes):
        rewriter = Rewriter(current)
        step._run(None if owned or index else module, rewriter)
        current = rewriter.module
        edits += rewriter.edits
        remarks += rewriter.remarks
        if between is not None:
            between(step, rewriter.result)
    return PassResult(current, bool(edits), tuple(edits), tuple(remarks))


def _check_order(passes: Sequence[Pass]) -> None:
    names = [step.name for step in passes]
    for index, step in enumerate(passes):
        for name in step.requires:
            if name in names[index:] and name not in names[:index]:
                raise PassError(
                    f"{step.name} stands before {name}, whose result it goes by",
                    where="chain",
                    found=", ".join(names),
                    remedy=f"put {name} before {step.name}",
                )

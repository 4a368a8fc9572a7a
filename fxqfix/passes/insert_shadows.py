"""insert-shadows: the twin graph. Beside every quantized op its fake-quant branch, with probes.

One graph, one forward: the converted model's nodes as they are; the prepared model's nodes (its
own value); per site a shadow (the prepared op on the converted model's inputs), and a nudged copy
of the prepared model for the noise floor. All woven in site by site, so that every tensor dies at
its last use. The output is the converted model's, to the bit.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from fxqfix import _torch, dialects
from fxqfix.dialects._base import modules_of
from fxqfix.dialects._writes import overwrites, twins
from fxqfix.errors import PassError
from fxqfix.pairing import pair
from fxqfix.passes._base import Pass, Rewriter
from fxqfix.passes._region import functional_uses
from fxqfix.passes._weave import (
    PREFIX,
    TAG,
    Branch,
    OutputFactory,
    ProbeFactory,
    Probing,
    Weaver,
)
from fxqfix.passes.freeze_qparams import FreezeQParams

__all__ = ["InsertShadows", "Probing", "hold"]


@dataclass(frozen=True)
class InsertShadows(Pass):
    """Put a shadow fake-quant branch beside each quantized op of a converted graph.

    Attributes:
        prepared: The prepared model that the converted one came from; it is not changed.
        probe: Makes the module that takes (local, converted codes, prepared codes, nudged codes)
            of one site; None inserts the branches without probes.
        noise_floor: Whether to weave in the nudged prepared model as well.
        frozen: What freeze-qparams made of `prepared`, where the caller has it: shadows run its
            modules.
        outputs: Makes the module that compares what the models return; see `OutputFactory`.
        local: Whether to put the shadows in; without, probes get None in place of their records.

    Raises:
        PairingError: The models don't belong together.
        UncalibratedError: A weight's fake-quant never saw data.

    Example:
        >>> from fxqfix.passes import InsertShadows
        >>> InsertShadows.name
        'insert-shadows'
    """

    name: ClassVar[str] = "insert-shadows"
    prepared: nn.Module = field(repr=False)
    probe: ProbeFactory | None = field(default=None, repr=False)
    noise_floor: bool = True
    frozen: fx.GraphModule | None = field(default=None, repr=False)
    outputs: OutputFactory | None = field(default=None, repr=False)
    local: bool = True

    def rewrite(self, rewriter: Rewriter) -> None:
        """Weave prepared, nudged and shadow branches into the copy of the converted graph."""
        converted = dialects.read(rewriter.graph_module)
        traced = dialects.trace(self.prepared)
        frozen = self._own(traced)
        pairing = pair(dialects.read(frozen), converted, checked=self.frozen is not None)
        pairs = [p for p in pairing.pairs if p.converted.site.kind == "activation"]
        uses = functional_uses(frozen)
        loose = frozenset(t.node.name for t in dialects.read(traced).taps if not t.site.quantizes)
        held = hold(copy.deepcopy(traced))
        weights = dict[str, Tensor]()
        branches = [Branch("prepared", held, pairs, False, weights)]
        if self.noise_floor:
            again = held if _keeps_nothing(held) else hold(copy.deepcopy(traced))
            branches.append(Branch("nudged", again, pairs, True, weights))
        probes = self.probe, loose, tuple(uses), self.outputs, self.local, weights
        Weaver(rewriter, frozen, pairs, branches, *probes).weave()

    def _own(self, traced: fx.GraphModule) -> fx.GraphModule:
        """The frozen graph, as a copy where uses of overwritten values are going to be changed."""
        if self.frozen is None:
            made: fx.GraphModule = FreezeQParams(uncalibrated=True)(traced).graph_module
            return made
        within = self.frozen.graph, modules_of(self.frozen)
        changes = overwrites(*within) or twins(*within)
        return copy.deepcopy(self.frozen) if changes else self.frozen

    def check(self, before: nn.Module, after: nn.Module) -> None:
        """The converted model's own nodes are all there, in their order."""
        wanted, found = _own_nodes(before), _own_nodes(after)
        if wanted != found:
            raise PassError("the converted model's own nodes were changed", where=self.name)


def _keeps_nothing(model: fx.GraphModule) -> bool:
    """Whether no run of it leaves a trace in it: torch's own modules, in eval mode."""
    modules = [module for module in model.modules() if module is not model]
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    own = (type(m).__module__.startswith(("torch.", "fxqfix.")) for m in modules)
    still = (not (m.training or any(vars(m)[name] for name in hooks)) for m in modules)
    return all(own) and all(still)


def _own_nodes(model: Any) -> list[tuple[Any, ...]]:
    nodes = [n for n in model.graph.nodes if TAG not in n.meta]
    nodes.sort(key=lambda n: n.op != "placeholder")  # inputs come first in the twin
    return [(n.op, n.name, str(n.target), str(n.args), str(n.kwargs)) for n in nodes]


def hold(model: fx.GraphModule) -> fx.GraphModule:
    """Hold a copy of a prepared model still: no observer of it will move any more.

    Args:
        model: A copy of the user's prepared graph module; it is changed.

    Returns:
        The same module.
    """
    for path, module in list(model.named_modules(remove_duplicate=False)):
        parent, _, name = path.rpartition(".")
        if _torch.is_fake_quant(module):
            switch: Any = module
            switch.disable_observer()
        elif _torch.is_observer(module) and not _torch.is_fake_quant(model.get_submodule(parent)):
            setattr(model.get_submodule(parent), name, nn.Identity())
    return model


def tagged(node: fx.Node) -> bool:
    """True for nodes that insert-shadows added."""
    return TAG in node.meta or str(node.target).startswith(PREFIX)

"""Small architectures of every kind, prepared by QAT, frozen: what faults are planted in."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.ao.quantization import disable_observer, get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

import fxqfix
from fxqfix import dialects, ops
from fxqfix._torch import quantized_engine, quiet
from fxqfix.dialects import Reading, Tap
from fxqfix.passes import FreezeQParams
from tests.engines.nets import NETS

__all__ = ["ARCHITECTURES", "ENGINES", "Base", "base", "convert"]

# The last layer of each: dropout goes in front of it.
ARCHITECTURES = {
    "PlainCNN": "head",
    "Residual": "head",
    "Mobile": "head",
    "Inception": "head",
    "UNet": "out",
    "MLP": "three",
}
ENGINES = ("fbgemm", "x86", "onednn", "qnnpack")
_SHIFT = 16384.0


@dataclass(frozen=True)
class Base:
    """A healthy architecture: nothing of it may be changed, take copies.

    Attributes:
        observed: The QAT model, observers off, eval mode.
        unfolded: The same with fixed qparams, its BatchNorm not folded.
        frozen: The same, folded: equal to the bit to its decomposed conversion.
        reading: Of `frozen`.
        batch: One batch, within the calibrated range.
    """

    observed: fx.GraphModule
    unfolded: fx.GraphModule
    frozen: fx.GraphModule
    reading: Reading
    batch: torch.Tensor

    @functools.cached_property
    def groups(self) -> list[list[Tap]]:
        """Activation sites by the fake-quant that they share; those with a grid of their own."""
        modules = self.frozen.get_submodule
        found: dict[int, list[Tap]] = {}
        for tap in self.reading.activations:
            found.setdefault(id(modules(str(tap.node.target))), []).append(tap)
        return [taps for taps in found.values() if self.own(taps[0])]

    def own(self, tap: Tap) -> bool:
        """Whether an int8 kernel, too, would give the site a grid of its own."""
        found = ops.match_node(tap.producer, dict(self.frozen.named_modules()))
        return tap.site.op == "input" or (found is not None and found.spec.output == "own")

    @functools.cached_property
    def peaks(self) -> dict[str, float]:
        """Largest value of every site on the batch."""
        found = _Peaks(self.frozen)
        with torch.no_grad():
            found.run(self.batch.clone())
        return {t.site.name: found.largest[t.producer.name] for t in self.reading.activations}

    @functools.cached_property
    def above_zero(self) -> list[list[Tap]]:
        """Those of `groups` that the batch takes above zero."""
        return [taps for taps in self.groups if self.peaks[taps[0].site.name] > 0]

    def consumers(self, taps: list[Tap]) -> set[str]:
        """Names of the sites that are computed from the values of some sites."""
        known = {tap.node: tap for tap in self.reading.activations}
        return {
            tap.site.name
            for tap in self.reading.activations
            if set(dialects.parents(tap.node.all_input_nodes, known)) & set(taps)
        }

    def inputs(self, tap: Tap) -> list[Tap]:
        """The sites that a site is computed from."""
        known = {t.node: t for t in self.reading.activations}
        return list(dialects.parents(tap.node.all_input_nodes, known))

    @functools.cached_property
    def weighted(self) -> list[tuple[str, str, Tap]]:
        """(path, node, site) of every op with a fake-quant for its weight, and where it ends."""
        found = []
        known = {tap.node: tap for tap in self.reading.activations}
        for weight in self.reading.weights:
            if not hasattr(self.frozen.get_submodule(str(weight.node.target)), "weight_fake_quant"):
                continue  # a transposed convolution: QAT observes its weight when it converts
            queue = list(weight.node.users)
            while queue and queue[0] not in known:
                queue = [*queue[1:], *queue[0].users]
            found.append((str(weight.node.target), weight.node.name, known[queue[0]]))
        return found


class _Peaks(fx.Interpreter):
    """Notes the largest value of every node."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.largest: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.largest[n.name] = float(value.max())
        return value


@functools.cache
def base(architecture: str, engine: str = "fbgemm", shifted: bool = False) -> Base:
    """Build, prepare and train an architecture for a few batches.

    Args:
        architecture: A key of `ARCHITECTURES`.
        engine: Whose default qconfig is taken.
        shifted: Whether every BatchNorm gets a mean and a bias that cancel, so that nothing but the
            rounding of folding it grows.
    """
    net, last = NETS[architecture](), ARCHITECTURES[architecture]
    setattr(net, last, nn.Sequential(nn.Dropout(0.5), getattr(net, last)))
    shape = (4, 48) if architecture == "MLP" else (2, 3, 8, 8)
    if architecture == "PlainCNN":
        shape = (2, 3, 16, 16)  # its head wants that
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad(), torch.random.fork_rng(), quiet():
        torch.manual_seed(1)
        for module in net.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        # onednn refuses weights with zero points, and transposed convolutions per channel: of
        # torch's own mappings, qnnpack's has neither.
        mapping = get_default_qat_qconfig_mapping("qnnpack" if engine == "onednn" else engine)
        observed = prepare_qat_fx(net.train(), mapping, (torch.zeros(shape),))
        for _ in range(4):
            observed(torch.randn(shape, generator=generator))
        _spread(observed, generator)
        for _ in range(4):
            observed(torch.randn(shape, generator=generator))
    observed.eval().apply(disable_observer)
    if shifted:
        _shift(observed)
    unfolded = FreezeQParams()(observed).graph_module
    frozen = fxqfix.freeze(observed)
    batch = torch.randn(shape, generator=generator).clamp(-2, 2) * 0.7
    return Base(observed, unfolded, frozen, dialects.read(frozen), batch)


def _norms(model: nn.Module) -> list[Any]:
    kinds = nn.modules.batchnorm._BatchNorm
    return [m for m in model.modules() if isinstance(m, kinds)]


def _spread(model: nn.Module, generator: torch.Generator) -> None:
    """Take every BatchNorm far from the identity, so that folding it has something to round."""
    for norm in _norms(model):
        norm.weight.uniform_(0.5, 2.0, generator=generator)
        norm.bias.uniform_(-0.5, 0.5, generator=generator)


def _shift(model: nn.Module) -> None:
    with torch.no_grad():
        for norm in _norms(model):
            factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            norm.running_mean += _SHIFT
            norm.bias += _SHIFT * factor


def convert(baked: fx.GraphModule, engine: str | None) -> fx.GraphModule:
    """Convert a frozen model: to int8 on an engine, or with None to the decomposed form."""
    if engine is None:
        return fxqfix.to_decomposed(baked, pin_ranges=False)
    with quantized_engine(engine), quiet():
        return convert_fx(copy.deepcopy(baked))

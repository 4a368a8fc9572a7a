"""The plan of a comparison: each model read, paired and frozen once; nothing of it changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from fxqfix import dialects, engines
from fxqfix._devices import CPU, device_of
from fxqfix.causes import Emulated, Recompute, WeightPair
from fxqfix.comparison.away import Away
from fxqfix.comparison.holdings import blocks, floats, picked, unmoved, weight_node
from fxqfix.comparison.others import others
from fxqfix.dialects import Reading, Site, Tap
from fxqfix.dialects.weights import WeightView
from fxqfix.names import Engine
from fxqfix.pairing import Pair, Pairing, pair
from fxqfix.passes import EmulateEngine, FoldBatchNorm, FreezeQParams
from fxqfix.passes._draws import Draws
from fxqfix.passes._region import Cutter, functional_uses
from fxqfix.passes.emulate_engine import LEFT
from fxqfix.qparams import QParams, quantize

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """Two models side by side, and what follows from them before any data is seen.

    Attributes:
        prepared: The prepared model, read.
        converted: The converted model, read.
        pairing: Their sites.
        engine: The quantized engine.
        causes: Whether causes are going to be asked for.
    """

    prepared: Reading
    converted: Reading
    pairing: Pairing
    engine: Engine
    causes: bool = True

    @classmethod
    def of(
        cls, prepared: Reading, converted: Reading, engine: Engine, *, causes: bool = True
    ) -> Plan:
        """Pair two models.

        Args:
            prepared: The prepared model, read.
            converted: The converted model, read.
            engine: The quantized engine.
            causes: Whether causes are going to be asked for.

        Raises:
            PairingError: They don't belong together.
            DeviceError: An int8 model can't be emulated where the prepared one is.
        """
        made = cls(prepared, converted, pair(prepared, converted), engine, causes)
        made.away  # noqa: B018  # what it refuses, it refuses before any data is read
        return made

    @cached_property
    def home(self) -> Any:
        """The prepared model's device."""
        return device_of(self.prepared.graph_module)

    @cached_property
    def taps(self) -> dict[fx.Node, Tap]:
        """The prepared activation sites by node."""
        return {tap.node: tap for tap in self.prepared.activations}

    @cached_property
    def sites(self) -> dict[str, Site]:
        """The prepared sites by the name of their node."""
        return {tap.node.name: tap.site for tap in self.prepared.taps}

    @cached_property
    def pairs(self) -> list[Pair]:
        """The pairs of activation sites."""
        return [p for p in self.pairing.pairs if p.prepared.site.kind == "activation"]

    @cached_property
    def frozen(self) -> fx.GraphModule:
        """The prepared graph with fixed qparams."""
        found: fx.GraphModule = FreezeQParams(uncalibrated=True)(
            self.prepared.graph_module
        ).graph_module
        return found

    @cached_property
    def cutter(self) -> Cutter:
        """Of the frozen graph with BatchNorm folded."""
        folded: fx.GraphModule = FoldBatchNorm()(self.frozen).graph_module
        uses = tuple(functional_uses(folded))
        nodes = {n.name: n for n in folded.graph.nodes}
        starts = frozenset(nodes[p.prepared.node.name] for p in self.pairs)
        return Cutter(folded, starts, uses)

    @property
    def folded(self) -> fx.GraphModule:
        """The frozen graph with BatchNorm folded."""
        return self.cutter.graph_module

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        """The nodes of the folded graph by name."""
        return {n.name: n for n in self.folded.graph.nodes}

    @cached_property
    def inner(self) -> dict[str, QParams]:
        """Grids of values that only the converted model quantizes, by node."""
        paired = {p.converted for p in self.pairing.pairs}
        return {
            tap.producer.name: tap.site.used
            for tap in self.converted.activations
            if tap not in paired and tap.site.used is not None
        } | self._overwritten()

    @cached_property
    def picked(self) -> Any:
        """Why no quantizer chose a converted grid; see `holdings.picked`."""
        return picked(self.converted)

    @cached_property
    def still(self) -> bool:
        """Whether no observer moved since the conversion; see `holdings.unmoved`."""
        return unmoved(self.prepared, self.pairs)

    @cached_property
    def blocks(self) -> dict[str, Tensor]:
        """Weights with grids by block; see `holdings.blocks`."""
        return blocks(self.folded, self.converted)

    # --- the int8 model's kernels -----------------------------------------------------------------

    @cached_property
    def isa(self) -> engines.Isa | None:
        """What int8 kernels run on; None where there are none."""
        return engines.isa_of(None) if self.converted.has_kernels else None

    @cached_property
    def threads(self) -> int:
        """On how many threads; 0 where there are none."""
        return engines.threads_of(None) if self.isa is not None else 0

    @cached_property
    def _found(self) -> dict[fx.Node, engines.Call]:
        if self.isa is None:
            return {}
        options = self.engine, self.isa, self.threads
        return engines.calls(self.converted.graph_module, *options, strict=False)

    @cached_property
    def calls(self) -> dict[str, engines.Call]:
        """The int8 ops by node: shadows are woven into a copy."""
        return {node.name: call for node, call in self._found.items()} | self._garbled(self._found)

    @cached_property
    def writers(self) -> dict[str, engines.Call]:
        """The int8 ops by the node that reads what they wrote over."""
        return {name: call for call in self._found.values() for name in call.rereads}

    @cached_property
    def away(self) -> Away | None:
        """What runs in an int8 model's place where the prepared one is not on the CPU."""
        if self.isa is None or self.home == CPU:
            return None
        options = self.engine, self.isa, self.threads
        return Away.of(self.converted, self.calls.values(), options, self.home)

    @cached_property
    def emulation(self) -> tuple[Cutter, dict[str, fx.Node], dict[fx.Node, str]] | None:
        """The emulated int8 model, the nodes of its sites, and the prepared nodes of these."""
        if self.away is not None:
            made = self.away.emulation
        elif self.isa is not None and self.causes and self.engine in engines.ENGINES:
            options = self.engine, self.isa, self.threads
            emulate = EmulateEngine(*options, strict=False)
            made = emulate(self.converted.graph_module).graph_module
        else:
            return None
        nodes = {n.name.removeprefix("emulated_"): n for n in made.graph.nodes}
        own = {p.converted.node.name: nodes[p.converted.node.name] for p in self.pairs}
        names = {own[p.converted.node.name]: p.prepared.node.name for p in self.pairs}
        return Cutter(made, frozenset(names)), own, names

    # --- what causes compute ----------------------------------------------------------------------

    def recompute(
        self, end: fx.Node, site: fx.Node | None, draws: Draws | None = None
    ) -> Recompute:
        """The recomputation of a value of the folded graph.

        Args:
            end: Its node.
            site: The node that quantizes it; None for an output of the model.
            draws: What the converted model drew.
        """
        native = not self.converted.carries_ranges
        wide = self.weights, self.frozen, self.inner, native, self.floats
        blocks = self.blocks if site is not None else {}
        return Recompute(self.cutter, end, site, *wide, draws, blocks, self.others)

    @cached_property
    def others(self) -> dict[str, Any]:
        """Float constants and layers of other values; see `others.others`."""
        return others(self.folded, self.converted.graph_module, self.frozen)

    @cached_property
    def weights(self) -> dict[str, WeightPair]:
        """Module path in the prepared graph -> both weights."""
        found: dict[str, WeightPair] = {}
        own = {t.site.name: t for t in dialects.read(self.folded).weights}
        for p in self.pairing.pairs:
            tap = own.get(p.prepared.site.name)
            if p.prepared.site.kind != "weight" or tap is None:
                continue
            if tap.weight is None or p.converted.weight is None:
                continue
            path = str(weight_node(tap).target)
            mine = tap.weight()
            unfolded = p.prepared.weight() if p.prepared.weight else mine
            found[path] = WeightPair(
                WeightView(mine.codes, mine.qparams, mine.bias, mine.values, unfolded.folded),
                as_packed(p.converted.weight().to(self.home), mine),
            )
        return found

    @cached_property
    def floats(self) -> dict[str, tuple[str, Tensor | None]]:
        """What only the prepared model quantizes; see `holdings.floats`."""
        return floats(self.pairing)

    @cached_property
    def kernels(self) -> dict[str, fx.Node]:
        """What computes each converted activation site, by the prepared site's name."""
        return {p.prepared.site.name: p.converted.kernel for p in self.pairs}

    @cached_property
    def converted_sites(self) -> frozenset[fx.Node]:
        """The paired activation sites of the converted model."""
        return frozenset(p.converted.node for p in self.pairs)

    def defect(self, kernel: str, inputs: Sequence[Any] = ()) -> engines.Defect | None:
        """The row that an op meets; else that of an op which writes over what this one reads.

        Args:
            kernel: The op's node.
            inputs: The values that it gets.
        """
        call, writer = self.calls.get(kernel), self.writers.get(kernel)
        own = None
        if call is not None:
            shapes: list[Any] = [v.shape for v in inputs if isinstance(v, Tensor)] or [None]
            called = replace(call, rereads=())
            found = (d for s in shapes for d in engines.defect_rows(called, s))
            own = next((d for d in found if d.present), None)
        return engines.find_defect(writer) if own is None and writer is not None else own

    def emulated(self, p: Pair, recompute: Recompute) -> Emulated | None:
        """A site in the emulated graph, and where its inputs come from.

        Args:
            p: The site.
            recompute: Its recomputation.
        """
        call = self.calls.get(p.converted.kernel.name)
        if call is None or self.emulation is None:
            return None
        cutter, nodes, names = self.emulation
        left = cutter.graph_module.meta.get(LEFT, {})
        end, inputs = nodes[p.converted.node.name], recompute.inputs
        return Emulated(cutter, end, names, inputs, call, left, calls=self.calls)

    def _garbled(self, calls: Mapping[fx.Node, engines.Call]) -> dict[str, engines.Call]:
        """The calls whose weight can't be unpacked, with the codes that conversion packed."""
        return {
            p.converted.node.name: replace(
                call, weight=as_packed(call.weight, p.prepared.weight().to(CPU))
            )
            for p in self.pairing.pairs
            if p.prepared.weight is not None
            and (call := calls.get(p.converted.node)) is not None
            and call.weight is not None
            and call.weight.garbled
        }

    def _overwritten(self) -> dict[str, QParams]:
        """In-place ops whose result is read in float behind them, with their converted grids."""
        ops = {use.op.name for use in self.cutter.uses}
        return {
            p.prepared.producer.name: p.converted.site.used
            for p in self.pairing.pairs
            if p.prepared.producer.name in ops and p.converted.site.used is not None
        }


def as_packed(theirs: WeightView, mine: WeightView) -> WeightView:
    """A converted weight; of one that can't be unpacked the codes that conversion packed."""
    if not theirs.garbled or mine.values is None:
        return theirs
    return replace(theirs, codes=quantize(mine.values, theirs.qparams), garbled=False)

"""One comparison: a probe per pair, what causes compute anew, and the rows in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor, fx, nn

from fxqfix import _torch, causes, dialects, engines
from fxqfix._devices import CPU, device_of
from fxqfix.causes import Attribution, Emulated, Recompute, View
from fxqfix.dialects import Reading, Site, Tap, decomposed, int8
from fxqfix.dialects.weights import WeightView
from fxqfix.flows import _notes
from fxqfix.flows._away import Away
from fxqfix.flows._between import wrong_before
from fxqfix.flows._holdings import blocks, floats, holdings, picked, weight_node
from fxqfix.flows._outputs import Outputs, float_kernels, unseen
from fxqfix.measure import Corrector, Probe, Run, discrepancy, histogram, run
from fxqfix.pairing import Pair, Pairing
from fxqfix.passes import EmulateEngine, FoldBatchNorm, FreezeQParams, InsertShadows
from fxqfix.passes._region import Cutter, functional_uses
from fxqfix.passes._weave import returned, rounded_outputs
from fxqfix.passes.emulate_engine import LEFT
from fxqfix.passes.insert_shadows import Probing
from fxqfix.qparams import QParams, quantize
from fxqfix.report import Coverage, Report, Row, Uncovered

__all__ = ["Session"]


@dataclass
class Session:
    """One comparison: the pairs, a probe for each, and what causes need to compute anew."""

    reading: Reading
    converted: Reading
    pairing: Pairing
    attribute: bool
    engine: str
    culprits: int = 0
    probes: dict[str, Probe] = field(default_factory=dict)
    shares: dict[str, Attribution] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.home = device_of(self.reading.graph_module)
        self.taps = {tap.node: tap for tap in self.reading.activations}
        self.frozen = FreezeQParams(uncalibrated=True)(self.reading.graph_module).graph_module
        self.folded: fx.GraphModule = FoldBatchNorm()(self.frozen).graph_module
        uses = tuple(functional_uses(self.folded))
        self.nodes = {n.name: n for n in self.folded.graph.nodes}
        pairs = [p.prepared for p in self.pairing.pairs if p.prepared.site.kind == "activation"]
        starts = frozenset(self.nodes[tap.node.name] for tap in pairs)
        self.cutter = Cutter(self.folded, starts, uses)
        self.weights = self._weight_pairs()
        paired = {p.converted for p in self.pairing.pairs}
        self.inner = {
            tap.producer.name: tap.site.used
            for tap in self.converted.activations
            if tap not in paired and tap.site.used is not None
        } | self._overwritten()
        self.floats = floats(self.pairing)
        self.picked, self.blocks = picked(self.converted), blocks(self.folded, self.converted)
        self.outputs = self._outputs()
        self.sites = {tap.node.name: tap.site for tap in self.reading.taps}
        self.calls: dict[str, engines.Call] = {}  # by node: shadows are woven into a copy
        self.writers: dict[str, engines.Call] = {}  # by the node that reads what they wrote over
        self.emulated: Cutter | None = None
        self.away: Away | None = None  # int8 kernels run on the CPU only
        self.isa: engines.Isa | None = None  # what int8 kernels run on
        self.threads = 0
        if self.converted.dialect == int8.NAME:
            self.isa, self.threads = engines.isa_of(None), engines.threads_of(None)
            options = self.engine, self.isa, self.threads
            found = engines.calls(self.converted.graph_module, *options, strict=False)
            self.calls = {node.name: call for node, call in found.items()} | self._garbled(found)
            self.writers = {name: call for call in found.values() for name in call.rereads}
            kernels = float_kernels(self.converted, self.outputs.sites, self.calls)
            self.outputs.kernels = tuple(
                a + b for a, b in zip(kernels, self.outputs.kernels, strict=False)
            )
            ends = returned(self.converted.graph_module.graph)
            self.outputs.wrong = tuple(
                wrong_before(end, self.outputs.sites, self.calls) for end in ends
            )
            if self.home != CPU:
                self.away = Away.of(self.converted, self.calls.values(), options, self.home)
                self._emulate(self.away.emulation)
            elif self.attribute and self.engine in engines.ENGINES:
                emulate = EmulateEngine(*options, strict=False)
                self._emulate(emulate(self.converted.graph_module).graph_module)
        self.corrector = None
        if self.culprits:
            model = _torch.copied(self.converted.graph_module)
            model = self.away.put(model) if self.away is not None else model
            self.corrector = Corrector(model, self.culprits)

    def _emulate(self, emulation: fx.GraphModule) -> None:
        self.left = emulation.meta.get(LEFT, {})
        nodes = {n.name.removeprefix("emulated_"): n for n in emulation.graph.nodes}
        pairs = [p for p in self.pairing.pairs if p.prepared.site.kind == "activation"]
        self.emulated_nodes = {p.converted.node.name: nodes[p.converted.node.name] for p in pairs}
        self.names = {nodes[p.converted.node.name]: p.prepared.node.name for p in pairs}
        self.emulated = Cutter(emulation, frozenset(self.names))

    def _weight_pairs(self) -> dict[str, tuple[WeightView, WeightView]]:
        """Module path in the prepared graph -> both weights."""
        found: dict[str, tuple[WeightView, WeightView]] = {}
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
            found[path] = (
                WeightView(mine.codes, mine.qparams, mine.bias, mine.values, unfolded.folded),
                _as_packed(p.converted.weight().to(self.home), mine),
            )
        return found

    def _outputs(self) -> Outputs:
        """What is known of the values that the models return."""
        mine = returned(self.reading.graph_module.graph)
        native = self.converted.dialect != decomposed.NAME
        wide = self.weights, self.frozen, self.inner, native, self.floats
        tails = [Recompute(self.cutter, n, None, *wide) for n in returned(self.folded.graph)]
        rounded = rounded_outputs(self.reading, self.converted, self.pairing)
        return Outputs(
            tails=tuple(tails),
            grids=tuple(
                self.inner.get(tail.end.name) if p is None else p.converted.site.used
                for tail, p in zip(tails, rounded, strict=True)
            ),
            inputs=tuple(
                tuple(t.site.name for t in dialects.parents([n], self.taps)) for n in mine
            ),
            attribute=self.attribute,
            sites=frozenset(
                p.converted.node for p in self.pairing.pairs if p.prepared.site.kind == "activation"
            ),
            kernels=tuple(unseen(self.reading, tail) for tail in tails),
        )

    def _garbled(self, calls: Mapping[fx.Node, engines.Call]) -> dict[str, engines.Call]:
        """The calls whose weight can't be unpacked, with the codes that conversion packed."""
        return {
            p.converted.node.name: replace(
                call, weight=_as_packed(call.weight, p.prepared.weight().to(CPU))
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

    def weave(self, noise_floor: bool) -> fx.GraphModule:
        """The twin graph, with a probe for each pair."""
        weave = InsertShadows(
            self.reading.graph_module,
            self.probe,
            noise_floor,
            self.frozen,
            outputs=lambda: self.outputs.probe,
        )
        twin: fx.GraphModule = weave(self.converted.graph_module).graph_module
        return twin if self.away is None else self.away.put(twin)

    def run(self, data: Iterable[Any], noise_floor: bool, progress: bool | None) -> Run:
        """Weave the twin graph and stream the data through it."""
        twin = self.weave(noise_floor)
        if self.corrector is not None:
            self.corrector.start()
        return run(twin, data, progress=progress, after=self.corrector)

    def probe(self, probing: Probing) -> nn.Module:
        """The probe of one site, made while the shadows are woven in."""
        p = probing.pair
        name, used = p.prepared.site.name, p.prepared.site.used
        assert used is not None  # pairs have qparams
        share = self.shares.setdefault(name, Attribution())
        judge = self._judge(probing, used, share) if self.attribute else None
        probe = self.probes[name] = Probe(name, used, probing.converted, judge)
        if self.corrector is not None:
            self.corrector.add(probing, probe)
        return probe

    def _judge(self, probing: Probing, used: QParams, share: Attribution) -> Callable[..., None]:
        p = probing.pair
        # The quantizer's node has one name before and after folding, its input need not.
        site = self.nodes[p.prepared.node.name]
        call = self.calls.get(p.converted.kernel.name)
        native = self.converted.dialect != decomposed.NAME
        wide = self.weights, self.frozen, self.inner, native, self.floats
        draws = probing.shadow.draws
        recompute = Recompute(self.cutter, site.all_input_nodes[0], site, *wide, draws, self.blocks)
        emulated = self._emulated(p, call, recompute) if call is not None else None

        loose = {name: self.sites[name] for name in probing.loose}
        known: dict[str, Any] = {
            "recompute": recompute,
            "emulated": emulated,
            "loose": loose,
            "picked": self.picked(p.converted),
            "unseen": unseen(self.reading, recompute),
        }
        held = holdings(self.reading, p.prepared)
        before = wrong_before(p.converted.kernel, self.outputs.sites, self.calls)

        def judge(local: Any, converted: Tensor, prepared: Tensor, target: QParams) -> None:
            args = (p, used, target, local.value, local.expected, converted, prepared.int())
            own = self._defect(p.converted.kernel.name, local.inputs)
            view = View(*args, local=local, held=held, defect=own or before, **known)
            view.between = own is None
            causes.attribute(view, causes.registry(), share)

        return judge

    def _defect(self, kernel: str, inputs: Sequence[Any] = ()) -> engines.Defect | None:
        """The row that an op meets; else that of an op which writes over what this one reads."""
        call, writer = self.calls.get(kernel), self.writers.get(kernel)
        own = None
        if call is not None:
            shapes: list[Any] = [v.shape for v in inputs if isinstance(v, Tensor)] or [None]
            called = replace(call, rereads=())
            found = (d for s in shapes for d in engines.defect_rows(called, s))
            own = next((d for d in found if d.present), None)
        return engines.find_defect(writer) if own is None and writer is not None else own

    def _emulated(self, p: Pair, call: engines.Call, recompute: Recompute) -> Emulated | None:
        """The same site in the emulated graph, and where its inputs come from."""
        if self.emulated is None:
            return None
        end = self.emulated_nodes[p.converted.node.name]
        return Emulated(self.emulated, end, self.names, recompute.inputs, call, self.left)

    def report(self, result: Run) -> Report:
        """Turn the probes' numbers into rows."""
        rows = []
        for p in self.pairing.pairs:
            row = self._weight_row(p) if p.prepared.site.kind == "weight" else self._row(p)
            if row is not None:
                rows.append(row)
        rows += self.outputs.rows()
        return Report(
            rows=tuple(rows),
            coverage=self._coverage({r.name for r in rows}),
            engine=self.engine,
            isa=str(self.isa) if self.isa is not None else "",
            threads=self.threads,
            batches=result.batches,
            notes=(
                *([self.away.note] if self.away is not None else ()),
                *_notes.of_prepared(self.reading),
                *_notes.of_weights(rows),
                *_notes.of_roundings(name for _, name in self._between()),
                *result.notes,
            ),
            corrected=self.corrector.results() if self.corrector is not None else None,
        )

    def _between(self) -> list[tuple[Tap, str]]:
        """Converted sites inside of what is one float computation for the prepared model.

        They are compared with what reads them: the cause requantization rounds there too.
        """
        return [
            (tap, tap.producer.name)
            for tap, side, _ in self.pairing.unpaired
            if side == "converted"
            and tap.producer.name in self.inner
            and tap.producer.name in self.nodes
        ]

    def _row(self, p: Pair) -> Row | None:
        site = p.prepared.site
        probe = self.probes.get(site.name)
        if probe is None:
            return None
        share = self.shares[site.name]
        ups = dialects.parents(p.prepared.node.all_input_nodes, self.taps)
        call = self.calls.get(p.converted.kernel.name)
        return Row(
            name=site.name,
            kind=site.kind,
            module=site.module,
            op=site.op,
            kernel=_notes.kernel_of(p.converted, self.converted),
            prepared=probe.grid,
            converted=probe.converted_qparams,
            local=probe.local,
            cumulative=probe.cumulative,
            noise_floor=probe.noise_floor,
            causes=MappingProxyType(dict(share.counts)),
            evidence=MappingProxyType(dict(share.evidence)),
            inputs=tuple(u.site.name for u in ups),
            note=_note(site),
            problems=tuple(share.problems),
            either=probe.either,
            histogram=probe.histogram,
            source=dialects.source_line(p.prepared.producer),
            engine=call.engine if call is not None else "",
            accumulator=engines.accumulator_bound(call) if call is not None else None,
            saturation=self._saturation(call) if call is not None else None,
        )

    def _saturation(self, call: engines.Call) -> int | None:
        """Of the kernel that a CPU without VNNI runs: what is deployed may meet one."""
        return engines.saturation_possible(engines.placed(call, self.engine, "avx2"))

    def _weight_row(self, p: Pair) -> Row | None:
        site, mine, theirs = p.prepared.site, p.prepared.weight, p.converted.weight
        if site.used is None or mine is None or theirs is None:
            return None
        own, other = mine(), theirs().to(self.home)
        numbers = discrepancy(own.codes, other.codes, own.qparams, other.qparams)
        share = Attribution()
        if self.attribute and numbers.differing and own.values is not None:
            codes = own.codes.int()
            args = (p, own.qparams, other.qparams, own.values, codes, other.codes, codes)
            held = holdings(self.reading, p.prepared)
            defect = self._defect(p.converted.node.name)
            known: dict[str, Any] = {"defect": defect, "garbled": other.garbled}
            view = View(*args, weight=own, held=held, **known)
            causes.attribute(view, causes.registry(), share)
        return Row(
            name=site.name,
            kind=site.kind,
            module=site.module,
            op=site.op,
            kernel="weight",
            prepared=own.qparams,
            converted=other.qparams,
            local=numbers,
            cumulative=numbers,
            causes=MappingProxyType(dict(share.counts)),
            evidence=MappingProxyType(dict(share.evidence)),
            problems=tuple(share.problems),
            either=numbers.differing,
            histogram=histogram(own.codes, other.codes, own.qparams, other.qparams),
        )

    def _coverage(self, rows: set[str]) -> Coverage:
        paired = [p for p in self.pairing.pairs if p.prepared.site.name in rows]
        skipped = [p for p in self.pairing.pairs if p.prepared.site.name not in rows]
        unsupported = [
            Uncovered(site.name, side, reason)
            for reading, side in ((self.reading, "prepared"), (self.converted, "converted"))
            for site, reason in reading.unsupported
        ]
        unsupported += [
            Uncovered(
                p.prepared.site.name, "prepared", "the converted graph computes its inputs later"
            )
            for p in skipped
        ]
        if self.outputs.probe.problem:
            problem = self.outputs.probe.problem
            unsupported.append(Uncovered("outputs", "converted", problem))
        inner = {tap for tap, _ in self._between()}
        unpaired = [(t, side, r) for t, side, r in self.pairing.unpaired if t not in inner]
        return Coverage(
            paired=tuple((p.prepared.site.name, p.converted.site.name, p.how) for p in paired),
            unpaired=tuple(Uncovered(t.site.name, side, r) for t, side, r in unpaired),
            unsupported=tuple(unsupported),
        )


def _as_packed(theirs: WeightView, mine: WeightView) -> WeightView:
    """A converted weight; of one that can't be unpacked the codes that conversion packed."""
    if not theirs.garbled or mine.values is None:
        return theirs
    return replace(theirs, codes=quantize(mine.values, theirs.qparams), garbled=False)


def _note(site: Site) -> str:
    """What is special about a site."""
    if not site.calibrated:
        return f"never saw data (min=inf, max=-inf): conversion bakes {site.baked}"
    return "" if site.quantizes else site.source

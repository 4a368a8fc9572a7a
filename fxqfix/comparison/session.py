"""One comparison: a probe per pair, what causes compute anew, and the rows in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor, fx, nn

from fxqfix import _torch, causes, dialects, engines
from fxqfix.causes import Attribution, Found, View, WeightPair
from fxqfix.comparison import notes
from fxqfix.comparison.between import wrong_before
from fxqfix.comparison.floats import FloatBeside
from fxqfix.comparison.holdings import holdings
from fxqfix.comparison.outputs import Outputs, float_kernels, unseen
from fxqfix.comparison.plan import Plan
from fxqfix.dialects import Site, Tap
from fxqfix.measure import STRAYED, Corrector, Probe, Run, discrepancy, histogram, run, strayed
from fxqfix.pairing import Pair
from fxqfix.passes import InsertShadows
from fxqfix.passes._ends import (
    not_returned,
    other_structure,
    places_of,
    returned,
    rounded_outputs,
    without,
)
from fxqfix.passes.insert_shadows import Probing
from fxqfix.qparams import QParams
from fxqfix.report import Coverage, Report, Row, Uncovered

__all__ = ["First", "Session"]


@dataclass
class Session:
    """One comparison: the pairs, a probe for each, and what causes need to compute anew."""

    plan: Plan
    most: float  # batches to attribute
    culprits: int = 0
    local: bool = True
    floats: FloatBeside | None = None
    probes: dict[str, Probe] = field(default_factory=dict)
    shares: dict[str, Attribution] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.floored = 0
        self.strayed: list[str] = []
        self.outputs = self._outputs()
        self.corrector = None
        if self.culprits:
            model = _torch.copied(self.plan.converted.graph_module)
            away = self.plan.away
            self.corrector = Corrector(model if away is None else away.put(model), self.culprits)

    def _outputs(self) -> Outputs:
        """What is known of the values that the models return."""
        plan, like = self.plan, self.plan.prepared.graph_module.graph
        tails = [plan.recompute(n, None) for n in returned(plan.folded.graph)]
        rounded = rounded_outputs(plan.prepared, plan.converted, plan.pairing)
        kernels = tuple(unseen(plan.prepared, tail) for tail in tails)
        wrong: tuple[engines.Defect | None, ...] = ()
        if plan.isa is not None:
            sites, calls = plan.converted_sites, plan.calls
            own = float_kernels(plan.converted, sites, calls, like)
            kernels = tuple(a + b for a, b in zip(own, kernels, strict=False))
            ends = returned(plan.converted.graph_module.graph, like)
            wrong = tuple(wrong_before(end, sites, calls) for end in ends)
        mine = returned(like)
        return Outputs(
            tails=tuple(tails),
            grids=tuple(
                plan.inner.get(tail.end.name) if p is None else p.converted.site.used
                for tail, p in zip(tails, rounded, strict=True)
            ),
            inputs=tuple(
                tuple(t.site.name for t in dialects.parents([n], plan.taps)) for n in mine
            ),
            most=self.most,
            sites=plan.converted_sites,
            kernels=kernels,
            wrong=wrong,
            problem=other_structure(like, plan.converted.graph_module.graph),
            places=tuple(places_of(like)),
            gone=tuple(not_returned(like, plan.converted.graph_module.graph)),
        )

    def weave(self, noise_floor: bool) -> fx.GraphModule:
        """The twin graph, with a probe for each pair."""
        weave = InsertShadows(
            self.plan.prepared.graph_module,
            self.probe,
            noise_floor,
            self.plan.frozen,
            outputs=lambda: self.outputs.probe,
            local=self.local,
        )
        twin: fx.GraphModule = weave(self.plan.converted.graph_module).graph_module
        return twin if self.plan.away is None else self.plan.away.put(twin)

    def run(self, data: Iterable[Any], noise_floor: str, progress: bool | None) -> Run:
        """Weave the twin graph and stream the data through it.

        Args:
            data: Batches.
            noise_floor: "first", "all" or "": of which batches.
            progress: Whether to show a bar.
        """
        twin = self.weave(bool(noise_floor))
        if self.corrector is not None:
            self.corrector.start()
        floor = First(twin) if noise_floor == "first" else None

        last: list[Any] = []

        def after(args: tuple[Any, ...], kwargs: dict[str, Any], start: Any) -> None:
            last[:] = [args, kwargs]
            for hook in (self.corrector, floor, self.floats):
                if hook is not None:
                    hook(args, kwargs, start)

        found = run(twin, data, progress=progress, after=after)
        self.floored = 1 if noise_floor == "first" else found.batches
        if found.batches > 1:  # the first batch has done it
            self.strayed = strayed(twin, *last)
        return found

    def probe(self, probing: Probing) -> nn.Module:
        """The probe of one site, made while the shadows are woven in."""
        p = probing.pair
        name, used = p.prepared.site.name, p.prepared.site.used
        assert used is not None  # pairs have qparams
        share = self.shares.setdefault(name, Attribution())
        asked = self.most and probing.shadow is not None
        judge = self._judge(probing, used, share) if asked else None
        probe = self.probes[name] = Probe(name, used, probing.converted, judge, self.most)
        if self.corrector is not None:
            self.corrector.add(probing, probe)
        return probe

    def _judge(self, probing: Probing, used: QParams, share: Attribution) -> Callable[..., None]:
        p = probing.pair
        # The quantizer's node has one name before and after folding, its input need not.
        site = self.plan.nodes[p.prepared.node.name]
        draws = probing.shadow.draws if probing.shadow is not None else None
        recompute = self.plan.recompute(site.all_input_nodes[0], site, draws)
        loose = {name: self.plan.sites[name] for name in probing.loose}
        known: dict[str, Any] = {
            "recompute": recompute,
            "emulated": self.plan.emulated(p, recompute),
            "loose": loose,
            "picked": self.plan.picked(p.converted),
            "steps": {},
            "unseen": unseen(self.plan.prepared, recompute),
        }
        held = holdings(self.plan.prepared, p.prepared, self.plan.still)
        inherited = bool(loose or recompute.behind)

        # Of the converted model's own graph: the pair is of the copy that the twin is woven into.
        kernel = self.plan.kernels[p.prepared.site.name]
        before = wrong_before(kernel, self.plan.converted_sites, self.plan.calls)

        def judge(local: Any, converted: Tensor, prepared: Tensor, target: QParams) -> None:
            found = Found(used, target, local.value, local.expected, converted, prepared)
            own = self.plan.defect(p.converted.kernel.name, local.inputs)
            known["defect"], known["between"] = own or before, own is None
            view = View.of(p, found, inherited=inherited, local=local, held=held, **known)
            causes.attribute(view, causes.registry(), share)

        return judge

    def report(self, result: Run) -> Report:
        """Turn the probes' numbers into rows."""
        rows = []
        for p in self.plan.pairing.pairs:
            row = self._weight_row(p) if p.prepared.site.kind == "weight" else self._row(p)
            if row is not None:
                rows.append(row)
        rows += self.outputs.rows()
        beside = self.floats
        rows = rows if beside is None else beside.into(rows)
        return Report(
            rows=tuple(rows),
            coverage=self._coverage({r.name for r in rows}),
            engine=self.plan.engine,
            isa=str(self.plan.isa) if self.plan.isa is not None else "",
            threads=self.plan.threads,
            batches=result.batches,
            notes=(
                *([self.plan.away.note] if self.plan.away is not None else ()),
                *notes.of_prepared(self.plan.prepared),
                *notes.of_weights(rows),
                *notes.of_roundings(name for _, name in self._between()),
                *notes.of_parts(result.batches, self.floored, self.most),
                *(beside.notes if beside is not None else ()),
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
            for tap, side, _ in self.plan.pairing.unpaired
            if side == "converted"
            and tap.producer.name in self.plan.inner
            and tap.producer.name in self.plan.nodes
        ]

    def _row(self, p: Pair) -> Row | None:
        site = p.prepared.site
        probe = self.probes.get(site.name)
        if probe is None:
            return None
        share = self.shares[site.name]
        later = {causes.NOT_ATTRIBUTED: probe.not_attributed} if probe.not_attributed else {}
        ups = dialects.parents(p.prepared.node.all_input_nodes, self.plan.taps)
        call = self.plan.calls.get(p.converted.kernel.name)
        return Row(
            name=site.name,
            kind=site.kind,
            module=site.module,
            op=site.op,
            kernel=notes.kernel_of(p.converted, self.plan.converted),
            prepared=probe.grid,
            converted=probe.converted_qparams,
            local=probe.local,
            cumulative=probe.cumulative,
            noise_floor=probe.noise_floor,
            causes=MappingProxyType({**share.counts, **later}),
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
        return engines.saturation_possible(engines.placed(call, self.plan.engine, "avx2"))

    def _weight_row(self, p: Pair) -> Row | None:
        site, mine, theirs = p.prepared.site, p.prepared.weight, p.converted.weight
        if site.used is None or mine is None or theirs is None:
            return None
        own, other = mine(), theirs().to(self.plan.home)
        numbers = discrepancy(own.codes, other.codes, own.qparams, other.qparams)
        share = Attribution()
        if self.most and numbers.differing and own.values is not None:
            pair = WeightPair(own, other)
            codes = pair.mine.codes
            found = Found(own.qparams, other.qparams, own.values, codes, other.codes, codes)
            held = holdings(self.plan.prepared, p.prepared, self.plan.still)
            defect = self.plan.defect(p.converted.node.name)
            known: dict[str, Any] = {"defect": defect, "garbled": other.garbled}
            view = View.of(p, found, weight=pair, held=held, **known)
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
        plan = self.plan
        paired = [p for p in plan.pairing.pairs if p.prepared.site.name in rows]
        skipped = [p for p in self.plan.pairing.pairs if p.prepared.site.name not in rows]
        unsupported = [
            Uncovered(site.name, side, reason)
            for reading, side in (
                (self.plan.prepared, "prepared"),
                (self.plan.converted, "converted"),
            )
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
        unsupported += [Uncovered(name, "prepared", STRAYED) for name in self.strayed]
        inner = {tap for tap, _ in self._between()}
        unpaired = [(t, side, r) for t, side, r in self.plan.pairing.unpaired if t not in inner]
        return Coverage(
            paired=tuple((p.prepared.site.name, p.converted.site.name, p.how) for p in paired),
            unpaired=tuple(Uncovered(t.site.name, side, r) for t, side, r in unpaired),
            unsupported=tuple(unsupported),
            lacking=self.outputs.lacking(),
        )


class First:
    """Takes the nudged branch out of a twin behind the first batch.

    Args:
        twins: The twins.
    """

    def __init__(self, *twins: fx.GraphModule) -> None:
        self._twins = list(twins)

    def __call__(self, *_: Any) -> None:
        """Called behind each batch."""
        for twin in self._twins:
            without(twin, "nudged")
        self._twins.clear()


def _note(site: Site) -> str:
    """What is special about a site."""
    if not site.calibrated:
        return f"never saw data (min=inf, max=-inf): conversion bakes {site.baked}"
    return "" if site.quantizes else site.source

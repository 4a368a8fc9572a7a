"""What the models return, compared: a row per output, and why its values differ."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, fx

from fxqfix.causes import NOT_ATTRIBUTED, Attribution, Recompute
from fxqfix.causes.half_dequantize import in_half
from fxqfix.dialects import Reading
from fxqfix.dialects._code import CODE
from fxqfix.dialects.weights import WeightView
from fxqfix.engines import Call, Defect
from fxqfix.measure import OutputProbe, Returned, differing
from fxqfix.passes._ends import returned
from fxqfix.passes._shadow_modules import Local
from fxqfix.qparams import QParams
from fxqfix.report import Row, Uncovered

__all__ = ["Outputs", "float_kernels", "unseen"]

# What float32 may do to a sum, in half units of its last place, beside what the shadow shows.
_ROUNDINGS, _HALF_UNIT = 8, 2.0**-24


@dataclass
class Outputs:
    """The outputs of one comparison.

    Attributes:
        tails: Computes each value that the model returns anew, from the last sites on.
        grids: Of each value the grid that the converted model rounds it to, which no site has.
        inputs: Names of the sites that each is computed from.
        most: For how many batches causes are wanted.
        sites: The converted sites that have a partner.
        kernels: Of each value the converted ops behind the last sites that give floats from
            integers of their own (dynamic ones, embeddings): the prepared model has no such step.
        wrong: Of each value the known-wrong kernel that runs behind the last sites, or None.
        problem: How the models differ in the keys and constants that they return, or "".
        places: Where each value stands in what the prepared model returns.
        gone: Of what the prepared model returns, what the converted one does not, and why.
    """

    tails: tuple[Recompute, ...]
    grids: tuple[QParams | None, ...]
    inputs: tuple[tuple[str, ...], ...]
    most: float
    sites: frozenset[fx.Node] = frozenset()
    kernels: tuple[tuple[str, ...], ...] = ()
    wrong: tuple[Defect | None, ...] = ()
    problem: str = ""
    places: tuple[str, ...] = ()
    gone: tuple[tuple[str, str], ...] = ()
    shares: dict[str, Attribution] = field(default_factory=dict)

    @cached_property
    def probe(self) -> OutputProbe:
        """The probe, one for all outputs."""
        attribute = self._attribute if self.most else None
        return OutputProbe(attribute, self.most, self.problem, self.places)

    def lacking(self) -> tuple[Uncovered, ...]:
        """What the prepared model returns and the converted one does not."""
        gone = [Uncovered(f"output {place}".rstrip(), "converted", why) for place, why in self.gone]
        if not gone and self.probe.lacking:
            gone = [Uncovered("outputs", "converted", self.probe.problem)]
        return tuple(gone)

    def rows(self) -> list[Row]:
        """A row per tensor that the models return."""
        return [self._row(f"output {i}", sums) for i, sums in enumerate(self.probe.found)]

    def _row(self, name: str, sums: Returned) -> Row:
        share = self.shares.get(name, Attribution())
        later = {NOT_ATTRIBUTED: sums.not_attributed} if sums.not_attributed else {}
        return Row(
            name=name,
            kind="output",
            module="",
            op="output",
            kernel="",
            prepared=None,
            converted=None,
            local=sums.local,
            cumulative=sums.cumulative,
            noise_floor=sums.noise_floor,
            causes={**share.counts, **later},
            evidence=dict(share.evidence),
            inputs=self.inputs[sums.end],
            problems=tuple(share.problems),
            either=sums.either,
        )

    def _attribute(
        self, name: str, sums: Returned, local: Local, converted: Tensor, prepared: Tensor
    ) -> None:
        share = self.shares.setdefault(name, Attribution())
        here = differing(local.value, converted)
        left = here | differing(prepared, converted)

        def take(cause: str, mask: Tensor, evidence: str) -> None:
            nonlocal left
            if count := int(torch.count_nonzero(left & mask)):
                share.counts[cause] = share.counts.get(cause, 0) + count
                share.evidence.setdefault(cause, evidence)
            left = left & ~mask

        if local.value.dtype != converted.dtype:
            take("unexplained", left, f"{converted.dtype} where {local.value.dtype} is due")
        take("upstream", ~here, "inherited from earlier layers; see report.origin(name)")
        if bool(left.any()):
            try:
                masks = self._local(sums.end, local, converted)
            except (RuntimeError, TypeError, ValueError) as error:  # user code runs inside
                said = str(error).strip().partition("\n")[0]
                problem = f"causes could not be computed here: {said}"
                share.problems += [problem] if problem not in share.problems else []
                masks = {}
            for cause, (mask, evidence) in masks.items():
                take(cause, mask, evidence)
        own = self.kernels[sums.end] if self.kernels else ()
        if own and bool(left.any()):
            problem = f"{', '.join(own)} quantizes in its kernel: what that does is not known here"
            share.problems += [problem] if problem not in share.problems else []
            return
        take("unexplained", left, "")

    def _local(self, end: int, local: Local, found: Tensor) -> dict[str, tuple[Tensor, str]]:
        """Cause -> what it explains of the values that differ on the same inputs, and why."""
        tail, value = self.tails[end], local.value
        mine = {path: p.mine for path, p in tail.own_weights.items()}
        theirs = {path: p.theirs for path, p in tail.own_weights.items()}
        exact = tail.exact(local, mine)
        width = float((exact - value.double()).abs().max()) if value.numel() else 0.0
        width += _ROUNDINGS * _HALF_UNIT * float(exact.abs().max() if value.numel() else 0.0)

        def near(wanted: Tensor, reach: float = 0.0) -> Tensor:
            return (found.double() - wanted).abs() <= width + reach

        masks = {
            "bn-folding": (tail.folded(local) == found, "BatchNorm is folded in the last op"),
            "rounding": (near(exact), f"float32 sums in another order, at most {width:.2g} apart"),
        }
        if (inputs := in_half(local)) is not None:
            found_so = tail.folded(replace(local, inputs=inputs)) == found
            said = "the codes behind it are dequantized in half precision"
            masks = {"half-dequantize": (found_so, said), **masks}
        converted = exact if _same(mine, theirs) else tail.exact(local, theirs)
        if foreign := _foreign(tail, value):
            converted = tail.exact(local, theirs, others=True)
            said = f"{', '.join(foreign)}: other values: these may be two checkpoints"
            masks["other-weights"] = near(converted), said
            rounded, why = masks["rounding"]  # no order of sums tells other values apart
            masks["rounding"] = rounded & (converted == exact), why
        elif converted is not exact:
            names = ", ".join(theirs)
            masks["upstream"] = near(converted), f"the codes of the weight of {names} differ"
        if tail.own_floats:
            names = ", ".join(name for name, _ in tail.own_floats.values())
            said = f"the converted model does not quantize {names}"
            masks["not-lowered"] = near(tail.exact(local, theirs, floats=True)), said
        grids = [g for g in (*tail.own_inner.values(), self.grids[end]) if g is not None]
        if grids:
            rounded = near(tail.exact(local, theirs, inner=True))
            if all(g.same_grid(grids[0]) for g in grids):  # a kernel may round a tie to either side
                reach = 0.5 * max(grids[0].scales) * (1 + 2 * _HALF_UNIT)
                rounded |= near(_clipped(converted, grids[0]), reach)
            names = ", ".join(tail.own_inner) or tail.end.name
            masks["requantization"] = rounded, f"{names!r} is rounded to {grids[-1]}"
        wrong = self.wrong[end] if self.wrong else None
        if wrong is not None:  # what no other cause explains
            masks["kernel-defect"] = torch.ones_like(found, dtype=torch.bool), str(wrong)
        return masks


def _foreign(tail: Recompute, value: Tensor) -> list[str]:
    """Weights, biases, constants and float layers of other values that a tail computes with."""
    step = float(value.abs().max()) / 128 if value.numel() else 0.0  # of an 8-bit grid
    found = [path for path, pair in tail.own_weights.items() if pair.differs(step)]
    return [*found, *tail.own_others]


def float_kernels(
    converted: Reading, sites: Container[fx.Node], calls: Mapping[str, Call], like: fx.Graph
) -> tuple[tuple[str, ...], ...]:
    """Of each value that an int8 model returns: kernels behind the last sites that give floats.

    Args:
        converted: The model.
        sites: Its paired sites.
        calls: Its int8 ops, by node name.
        like: The prepared graph: its order of values.
    """
    found = []
    for end in returned(converted.graph_module.graph, like):
        queue, seen = [end], dict[fx.Node, None]()
        while queue:
            node = queue.pop()
            if node not in seen and node not in sites:
                seen[node] = None
                queue.extend(node.all_input_nodes)
        own = {n.name: calls[n.name] for n in seen if n.name in calls}
        found.append(tuple(n for n, c in own.items() if c.output is None and c.weight is not None))
    return tuple(found)


def unseen(prepared: Reading, region: Recompute) -> tuple[str, ...]:
    """Nodes of a region that quantize what no row shows: on no fixed grid, or in a nested graph.

    Args:
        prepared: The reading of the prepared model.
        region: What computes a value.
    """
    names = {t.node.name for t in prepared.taps if t.site.used is None}
    names |= {site.name.partition(".")[0] for site, _ in prepared.unsupported}
    paths = tuple(site.name for site, _ in prepared.unsupported if site.source == CODE)
    names |= {n.name for n in prepared.graph_module.graph.nodes if _calls(n, paths)}
    return tuple(sorted(names & region.names))


def _calls(node: fx.Node, paths: Collection[str]) -> bool:
    """Whether a node calls one of these modules, or one that holds it."""
    target = str(node.target)
    return node.op == "call_module" and any(
        path == target or path.startswith(f"{target}.") for path in paths
    )


def _clipped(values: Tensor, grid: QParams) -> Tensor:
    """Values held in the range of a grid."""
    if grid.axis is not None:
        return values
    ends = ((q - grid.zero_points[0]) * grid.scales[0] for q in (grid.quant_min, grid.quant_max))
    return values.clamp(*ends)


def _same(mine: Mapping[str, WeightView], theirs: Mapping[str, WeightView]) -> bool:
    return all(
        a.qparams.same_grid(theirs[path].qparams) and torch.equal(a.codes, theirs[path].codes)
        for path, a in mine.items()
    )

"""What repair does to a converted model: which state and which structure it puts right."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxqfix import _rng, _torch, dialects
from fxqfix._devices import on_cpu
from fxqfix.dialects import Reading, Tap
from fxqfix.dialects._base import modules_of
from fxqfix.dialects._propagate import misplaced
from fxqfix.dialects._writes import overwrites
from fxqfix.dialects.site import qparams_text
from fxqfix.errors import PairingError, UnsupportedError
from fxqfix.flows.compare import prepared_reading, same_device
from fxqfix.flows.decompose import to_decomposed
from fxqfix.flows.freeze import frozen_by
from fxqfix.flows.to_int8 import convert_with_islands
from fxqfix.names import Engine
from fxqfix.pairing import Pair, Pairing, pair
from fxqfix.passes import (
    AvoidDefects,
    GraftIslands,
    Pass,
    PinRanges,
    RerouteReads,
    RestoreQParams,
    RestoreRange,
)
from fxqfix.passes._state import obstacle, state_differs
from fxqfix.passes.graft_islands import has_island
from fxqfix.qparams import QParams
from fxqfix.report import Mend, Refusal

__all__ = ["Bench"]

_CALL = "repair(prepared, converted)"
_OLD_ORDER = (
    "put the prepared model first, as in compare; up to version 0.1 the converted one came first"
)


@dataclass
class Bench:
    """A converted model on the bench: the trained state beside it, and what is to be done.

    Attributes:
        prepared: The prepared model.
        converted: The converted model.
        engine: The engine in force.
        backend_config: What `converted` was converted with; None is torch's own for the flow.
    """

    prepared: nn.Module
    converted: nn.Module
    engine: Engine
    backend_config: Any = None
    given: Reading = field(init=False)  # the prepared model where it is; `mine` beside `theirs`
    donor: Reading = field(init=False)
    sources: dict[str, Tap] = field(init=False)
    mine: Reading = field(init=False)
    theirs: Reading = field(init=False)
    pairing: Pairing = field(init=False)

    def __post_init__(self) -> None:
        """Read, pair, and convert the frozen model the right way."""
        self.given = self.mine = prepared_reading(self.prepared, _CALL, _OLD_ORDER)
        self.theirs = dialects.read(self.converted, "repair")
        if self.theirs.prepared:
            raise PairingError(
                "the second model is not a converted one; are the arguments swapped?",
                where="repair",
                found=f"a model of dialect {self.theirs.dialect}",
                expected=_CALL,
                remedy=_OLD_ORDER,
            )
        same_device(self.given, self.theirs, "repair")
        if self.theirs.has_kernels:  # its weights are packed, on the CPU
            self.prepared = on_cpu(self.prepared, "repair")
            self.mine = dialects.read(self.prepared, "repair")
        self.pairing = pair(self.mine, self.theirs)
        # As to_int8 does: what reads behind an in-place op then has the user's kernel.
        frozen = frozen_by(self.prepared, quantized=True)
        reading = dialects.read(frozen)
        self.trained = {t.site.name: t.site.used for t in reading.taps}
        wanted, most = {p.prepared.site.name for p in self.pairing.pairs}, -1
        for config in self._configs():
            donor = dialects.read(self._donor(frozen, config))
            found = {p.prepared.site.name: p.converted for p in pair(reading, donor).pairs}
            if len(wanted & found.keys()) > most:
                self.donor, self.sources, most = donor, found, len(wanted & found.keys())
            if most == len(wanted):
                break

    def _donor(self, frozen: nn.Module, backend_config: Any) -> nn.Module:
        """The frozen model, converted as the user's was."""
        if self.theirs.has_kernels:
            return convert_with_islands(frozen, self.engine, backend_config=backend_config)
        if self.theirs.carries_ranges:
            return to_decomposed(frozen)
        return _to_reference(frozen, backend_config)

    def _configs(self) -> Iterator[Any]:
        """Backend configs to convert with; of a reference model, whose is not told, torch's own."""
        yield self.backend_config
        told = self.theirs.has_kernels or self.theirs.carries_ranges
        if self.backend_config is None and not told:
            for name in ("tensorrt", "executorch", "onednn"):
                space = "torch.ao.quantization.backend_config"
                make = _torch.resolve(f"{space}.get_{name}_backend_config")
                if make is not None:
                    yield make()

    def mend(self, refused: dict[str, Refusal]) -> tuple[fx.GraphModule, tuple[Mend, ...]]:
        """The model with every repair but the refused ones.

        Args:
            refused: By prepared site; sites that can't be restored are added.
        """
        model, mends = self.theirs.graph_module, list[Mend]()
        differing, islands = self._differing(refused), self._islands(refused)
        sites: dict[str, str] = {}
        for name, (tap, source) in differing.items():
            if not self.together(name) & islands.keys():
                sites[tap.site.name] = source.site.name
                mends.append(Mend(RestoreQParams.name, name, _change(tap, source)))
        steps: list[Pass] = [RestoreQParams(self.donor.graph_module, sites)]
        if self.theirs.has_kernels:
            steps.append(RerouteReads(self._reads(refused)))
        ranges = self._ranges(refused)
        if self.theirs.has_kernels:
            grafts = {tap.site.name: source.site.name for tap, source in islands.values()}
            left = frozenset(_op(p.converted).name for p in self._pairs(refused))
            steps += [
                GraftIslands(self.donor.graph_module, grafts),
                AvoidDefects(self.engine, self._grids(refused), left),
                RestoreRange(ranges),
            ]
        elif not self.theirs.carries_ranges:
            steps.append(PinRanges(ranges))
        for step in steps:
            result = step(model)
            model = result.graph_module
            if not isinstance(step, RestoreQParams):
                mends += [self._mend(step.name, edit) for edit in result.edits]
        return model, tuple(mends)

    def broken(self, model: fx.GraphModule, refused: Container[str]) -> dict[str, Refusal]:
        """What makes a repaired graph one that can't run: by prepared site, to be left alone.

        Args:
            model: What `mend` returned.
            refused: What was left alone.
        """
        found: dict[str, Refusal] = {}
        if not self.theirs.has_kernels:
            return found
        known = set(misplaced(self.theirs.graph_module))
        for name, problem in (p for p in misplaced(model) if p not in known):
            site = self._site_of(model, name)
            group = self.together(site) if site and site not in refused else None
            for other in group or {p.prepared.site.name for p in self.pairing.pairs}:
                reason = f"rolled back: the repaired graph could not run: {problem}"
                found.setdefault(other, Refusal(GraftIslands.name, other, reason))
        return found

    def _site_of(self, model: fx.GraphModule, name: str) -> str:
        """The prepared site of the op that a node of a repaired graph stands behind, or ""."""
        own = {p.converted.producer.name: p.prepared.site.name for p in self.pairing.pairs}
        nodes = [n for n in model.graph.nodes if n.name == name]
        while nodes:
            node = nodes.pop(0)
            if node.op != "placeholder" and node.name in own:
                return own[node.name]
            nodes += node.all_input_nodes
        return ""

    def _reads(self, refused: dict[str, Refusal]) -> dict[str, tuple[str, str]]:
        """The user's kernels that read what an in-place op wrote over, in training.

        Also where the kernel writes in place too (relu): what is put in its place may not.
        """
        pairs = [p for p in self.pairing.pairs if p.prepared.site.kind == "activation"]
        sites, results = ({f(p): p for p in pairs} for f in (_quantizer, _producer))
        modules, found = modules_of(self.mine.graph_module), dict[str, tuple[str, str]]()
        for use in overwrites(self.mine.graph_module.graph, modules):
            behind = use.reader
            while behind not in results and len(behind.users) == 1:  # fused: add, then relu
                (behind,) = behind.users
            reader, value, op = results.get(behind), sites.get(use.value), results.get(use.op)
            if reader is None or value is None or op is None:
                continue
            kernel, old = reader.converted.kernel, value.converted.node
            if reader.prepared.site.name not in refused and old in kernel.all_input_nodes:
                found[kernel.name] = old.name, op.converted.node.name
        return found

    def together(self, name: str) -> set[str]:
        """The prepared sites that are restored with one: those of the same op."""
        ops = {p.prepared.site.name: _op(p.converted) for p in self.pairing.pairs}
        return {other for other, op in ops.items() if op is ops.get(name)}

    def _pairs(self, names: Container[str]) -> list[Pair]:
        return [p for p in self.pairing.pairs if p.prepared.site.name in names]

    def _mend(self, step: str, edit: str) -> Mend:
        """An edit, by the prepared site of the node that it names."""
        name, _, what = edit.partition(": ")
        for p in self.pairing.pairs:
            own = p.converted.site.name, p.converted.node.name
            if p.prepared.site.kind == "activation" and name in own:
                return Mend(step, p.prepared.site.name, what)
        return Mend(step, name, what)

    def _differing(self, refused: dict[str, Refusal]) -> dict[str, tuple[Tap, Tap]]:
        """Prepared site -> the user's site and the donor's, where their state differs."""
        found = {}
        for p in self.pairing.pairs:
            name, tap = p.prepared.site.name, p.converted
            source = self.sources.get(name)
            if source is None or tap.inherited or name in refused:
                continue
            taps = tap, source, self.theirs.graph_module, self.donor.graph_module
            kinds = obstacle(*taps)
            if kinds is None and state_differs(*taps):
                found[name] = tap, source
            elif kinds is not None and not _same_grid(tap, source) and not self._is_island(source):
                reason = f"{kinds[0]} stands where conversion puts {kinds[1]}"
                refused[name] = Refusal(RestoreQParams.name, name, reason)
        return found

    def _islands(self, refused: dict[str, Refusal]) -> dict[str, tuple[Tap, Tap]]:
        """Prepared site -> the user's site and the donor's, whose op has to stay in float."""
        found = {}
        for p in self.pairing.pairs:
            name, tap, source = p.prepared.site.name, p.converted, None
            if p.prepared.site.kind == "activation" and name not in refused:
                source = self.sources.get(name)
            mine = has_island(self.theirs.graph_module, tap.producer)
            if source is not None and self._is_island(source) and not mine:
                found[name] = tap, source
        return found

    def _is_island(self, source: Tap) -> bool:
        return has_island(self.donor.graph_module, _op(source))

    def _grids(self, refused: dict[str, Refusal]) -> dict[str, QParams]:
        """The user's site -> the trained qparams."""
        return {
            p.converted.site.name: used
            for p in self.pairing.pairs
            if p.prepared.site.kind == "activation"
            and p.prepared.site.name not in refused
            and (used := self.trained[p.prepared.site.name]) is not None
        }

    def _ranges(self, refused: dict[str, Refusal]) -> dict[str, tuple[int, int]]:
        """The user's site -> the range that was declared for it."""
        grids = self._grids(refused).items()
        narrow = {k: q for k, q in grids if q.axis is None and q.is_narrow}
        return {k: (q.quant_min, q.quant_max) for k, q in narrow.items()}


def _to_reference(frozen: nn.Module, backend_config: Any) -> nn.Module:
    """Torch's own reference conversion of an FX model."""
    if not isinstance(frozen, fx.GraphModule):
        raise UnsupportedError(
            "eager models have no reference conversion to repair by",
            where="repair",
            remedy="prepare with prepare_fx, or repair the int8 model",
        )
    make = _torch.resolve("torch.ao.quantization.quantize_fx.convert_to_reference_fx")
    with _torch.quiet(), _rng.same_rng():
        found: nn.Module = make(copy.deepcopy(frozen), backend_config=backend_config)
    return found


def _quantizer(p: Pair) -> fx.Node:
    return p.prepared.node


def _producer(p: Pair) -> fx.Node:
    return p.prepared.producer


def _op(tap: Tap) -> fx.Node:
    """The op of a site, its own or the one that its weight belongs to."""
    return tap.node if tap.site.kind == "weight" else tap.producer


def _same_grid(mine: Tap, theirs: Tap) -> bool:
    a, b = mine.site.used, theirs.site.used
    return a is not None and b is not None and a.same_grid(b)


def _change(mine: Tap, theirs: Tap) -> str:
    """What is put in place of what."""
    a, b = mine.site.used, theirs.site.used
    if a is None or b is None or a.same_grid(b):
        return _values(mine, theirs) if mine.site.kind == "weight" else "range"
    found, wanted = qparams_text(a), qparams_text(b)
    if found == wanted:  # the last bits of a scale
        apart = [(x, y) for x, y in zip(a.scales, b.scales, strict=True) if x != y]
        return f"scale {apart[0][0]:.9g} -> {apart[0][1]:.9g}"
    return f"{found} -> {wanted}"


def _values(mine: Tap, theirs: Tap) -> str:
    """What differs of a weight on the same grid: its codes, the bias of its op, or both."""
    if mine.weight is None or theirs.weight is None:
        return "codes and bias, on the same grid"
    one, other = mine.weight(), theirs.weight()
    count = int((one.codes.int() != other.codes.int()).sum())
    codes = f"{count} of {one.codes.numel()} codes" if count else ""
    held = [bias for bias in (one.bias, other.bias) if bias is not None]
    same = not held or (len(held) == 2 and torch.equal(*held))
    return " and ".join(filter(None, (codes, "" if same and codes else "bias"))) + (
        ", on the same grid" if codes else ""
    )

"""repair: a converted model, mended in place of its faults, each repair verified."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from fxqfix import _torch, causes, dialects
from fxqfix.dialects import Reading, Tap, decomposed, int8, reference
from fxqfix.dialects.site import qparams_text
from fxqfix.errors import DataError, PairingError, UnsupportedError
from fxqfix.flows._session import Session
from fxqfix.flows.compare import prepared_reading
from fxqfix.flows.convert import convert_by_torch
from fxqfix.flows.decompose import to_decomposed
from fxqfix.flows.freeze import freeze
from fxqfix.measure import run
from fxqfix.pairing import Pairing, pair
from fxqfix.passes import InsertShadows, PinRanges, RestoreQParams, RestoreRange
from fxqfix.passes.restore_qparams import obstacle, state_differs
from fxqfix.report import Mend, Refusal, Repair, Report, Row

__all__ = ["repair"]

_ROUNDS = 4


def repair(
    converted: nn.Module,
    prepared: nn.Module,
    *,
    data: Iterable[Any] | None = None,
    engine: str | None = None,
) -> Repair:
    """Mend a converted model: qparams, weights and ranges become those that were trained.

    What is wrong is found by state: beside each site stands the conversion of `freeze(prepared)`.
    With data, the model is compared before and after, side by side; a repair after which more
    codes of its site differ on the same inputs is rolled back and listed as refused, and so is
    each cause that no pass can mend. A second repair finds nothing to mend.

    Args:
        converted: The converted model, int8, reference or decomposed, edited or not. It is not
            changed.
        prepared: The prepared model that it was converted from. It is not changed.
        data: Batches to verify on, as for `compare`, that can be read more than once (a list, a
            DataLoader); None to verify by state alone.
        engine: The engine that `converted` was converted for; None is
            torch.backends.quantized.engine.

    Returns:
        The mended model (a new GraphModule), what was applied, what was refused and why, and the
        comparisons before and after.

    Raises:
        PairingError: The models are swapped or don't belong together.
        DataError: The data can be read only once, or is empty.
        UncalibratedError: The prepared model never saw data.
        UnsupportedError: The model is quantized dynamically, or torch can't convert `prepared`.

    Example:
        >>> import copy, torch
        >>> from torch.ao.quantization import get_default_qat_qconfig_mapping
        >>> from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx
        >>> x = torch.linspace(-1, 1, 16).reshape(2, 8)
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 2)).train()
        >>> prepared = prepare_qat_fx(net, get_default_qat_qconfig_mapping("fbgemm"), (x,))
        >>> _ = prepared(x)
        >>> converted = convert_fx(copy.deepcopy(prepared.eval()))
        >>> mended = repair(converted, prepared, data=[2 * x], engine="fbgemm")
        >>> [(m.step, m.site) for m in mended.applied][:2]
        [('restore-qparams', '_0.weight'), ('restore-range', 'input_1')]
        >>> mended.after.row("input_1").local.differing
        0
    """
    if data is not None and iter(data) is data:
        raise DataError(
            "repair may have to read the data again, after a repair was rolled back",
            where="repair",
            found=type(data).__name__,
            expected="a list of batches or a DataLoader",
        )
    with _torch.quantized_engine(engine) as name:
        bench = _Bench(prepared, converted, name)
        refused: dict[str, Refusal] = {}
        for _ in range(_ROUNDS):
            model, mends = bench.mend(refused)
            if data is None:
                return Repair(model, mends, tuple(refused.values()))
            before, after = bench.judge(model, data)
            worse = bench.worse(mends, before, after)
            if not worse:
                break
            refused |= worse
        left = (*refused.values(), *_left(after))
        return Repair(model, mends, left, before, after)


@dataclass
class _Bench:
    """The models of one repair, and what stands beside the converted one."""

    prepared: nn.Module
    converted: nn.Module
    engine: str
    mine: Reading = field(init=False)
    theirs: Reading = field(init=False)
    pairing: Pairing = field(init=False)

    def __post_init__(self) -> None:
        """Read, pair, and convert the frozen model the right way."""
        self.mine = prepared_reading(self.prepared)
        self.theirs = dialects.read(self.converted)
        if self.theirs.dialect not in _DONORS:
            raise PairingError(
                "the first model is not a converted one; are the arguments swapped?",
                where="repair",
                found=f"a model of dialect {self.theirs.dialect}",
                expected="repair(converted, prepared)",
            )
        self.pairing = pair(self.mine, self.theirs)
        frozen = freeze(self.prepared)
        self.trained = {t.site.name: t for t in dialects.read(frozen).taps}
        self.donor = dialects.read(_DONORS[self.theirs.dialect](frozen))
        found = pair(dialects.read(frozen), self.donor).pairs
        self.sources = {p.prepared.site.name: p.converted for p in found}

    def mend(self, refused: dict[str, Refusal]) -> tuple[fx.GraphModule, tuple[Mend, ...]]:
        """The model with every repair but the refused ones; sites go by their prepared names."""
        model, mends = self.theirs.graph_module, []
        sites: dict[str, str] = {}
        for name, (tap, source) in self._differing(refused).items():
            sites[tap.site.name] = source.site.name
            mends.append(Mend(RestoreQParams.name, name, _change(tap, source)))
        model = RestoreQParams(self.donor.graph_module, sites)(model).graph_module
        names = {p.converted.site.name: p.prepared.site.name for p in self.pairing.pairs}
        ranges = {k: v for k, v in self._ranges().items() if names[k] not in refused}
        step = _RANGES.get(self.theirs.dialect)
        if step is None:  # decomposed ops carry theirs
            return model, tuple(mends)
        result = step(ranges)(model)
        for edit in result.edits:
            name, _, what = edit.partition(": ")
            mends.append(Mend(step.name, names[name], what))
        return result.graph_module, tuple(mends)

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
            if kinds is not None:
                if not _same_used(tap, source):
                    reason = f"{kinds[0]} stands where conversion puts {kinds[1]}"
                    refused[name] = Refusal(RestoreQParams.name, name, reason)
            elif state_differs(*taps):
                found[name] = tap, source
        return found

    def _ranges(self) -> dict[str, tuple[int, int]]:
        """The user's site -> the range that was declared for it."""
        found = {}
        for p in self.pairing.pairs:
            used = self.trained[p.prepared.site.name].site.used
            activation = p.prepared.site.kind == "activation"
            if used is not None and activation and used.axis is None and used.is_narrow:
                found[p.converted.site.name] = used.quant_min, used.quant_max
        return found

    def together(self, name: str) -> set[str]:
        """The sites that are restored with one: those of the same op."""
        ops = {p.prepared.site.name: _op(p.converted) for p in self.pairing.pairs}
        return {other for other, op in ops.items() if op is ops[name]}

    def judge(self, model: fx.GraphModule, data: Iterable[Any]) -> tuple[Report, Report]:
        """Compare the model as it came and as it is now, both on each batch."""
        sessions, twins = [], []
        for reading in (self.theirs, dialects.read(model)):
            session = Session(self.mine, reading, pair(self.mine, reading), True, self.engine)
            twin = InsertShadows(self.mine.graph_module, session.probe, True)
            twins.append(twin(reading.graph_module).graph_module)
            sessions.append(session)
        both: Any = _SideBySide(*twins)
        result = run(both, data, progress=False)
        before, after = (session.report(result) for session in sessions)
        return before, after

    def worse(self, mends: Iterable[Mend], before: Report, after: Report) -> dict[str, Refusal]:
        """The repairs after which more codes of their op differ on the same inputs."""
        found: dict[str, Refusal] = {}
        for mend in mends:
            group = self.together(mend.site)
            rows = [(a, b) for a, b in zip(before.rows, after.rows, strict=True) if a.name in group]
            for old, new in rows:
                if _local(new) > _local(old):
                    reason = f"rolled back: {new.name} had {_text(old)}, with it {_text(new)}"
                    found |= {name: Refusal(mend.step, name, reason) for name in group}
        return found


class _SideBySide:
    """Two twins that see each batch together, and draw the same random numbers."""

    def __init__(self, first: fx.GraphModule, second: fx.GraphModule) -> None:
        self.first, self.second = first, second
        self.graph, self.parameters = first.graph, first.parameters

    def forward(self, *args: Any, **kwargs: Any) -> None:
        given = _torch.tree_map_tensors(Tensor.clone, (args, kwargs))
        with _torch.same_rng():
            self.first.forward(*given[0], **given[1])
        self.second.forward(*args, **kwargs)


def _to_reference(frozen: nn.Module) -> nn.Module:
    """Torch's own reference conversion of an FX model."""
    if not isinstance(frozen, fx.GraphModule):
        raise UnsupportedError(
            "eager models have no reference conversion to mend by",
            where="repair",
            remedy="prepare with prepare_fx, or mend the int8 model",
        )
    make = _torch.resolve("torch.ao.quantization.quantize_fx.convert_to_reference_fx")
    with _torch.quiet(), _torch.same_rng():
        found: nn.Module = make(copy.deepcopy(frozen))
    return found


_DONORS: dict[str, Callable[[nn.Module], nn.Module]] = {
    int8.NAME: convert_by_torch,
    reference.NAME: _to_reference,
    decomposed.NAME: to_decomposed,
}
_RANGES: dict[str, Any] = {int8.NAME: RestoreRange, reference.NAME: PinRanges}


def _op(tap: Tap) -> fx.Node:
    """The op of a site, its own or the one that its weight belongs to."""
    return tap.node if tap.site.kind == "weight" else tap.producer


def _same_used(mine: Tap, theirs: Tap) -> bool:
    a, b = mine.site.used, theirs.site.used
    return a is not None and b is not None and a.same_grid(b)


def _change(mine: Tap, theirs: Tap) -> str:
    """What is put in place of what."""
    a, b = mine.site.used, theirs.site.used
    if a is None or b is None or a.same_grid(b):
        return "codes and bias, on the same grid" if mine.site.kind == "weight" else "range"
    found, wanted = qparams_text(a), qparams_text(b)
    if found == wanted:  # the last bits of a scale
        apart = [(x, y) for x, y in zip(a.scales, b.scales, strict=True) if x != y]
        return f"scale {apart[0][0]:.9g} -> {apart[0][1]:.9g}"
    return f"{found} -> {wanted}"


def _local(row: Row) -> tuple[int, float]:
    return (row.local.differing, row.local.max_lsb) if row.local is not None else (0, 0)


def _text(row: Row) -> str:
    codes, lsb = _local(row)
    return f"{codes} differing codes, at most {lsb:g} LSB"


def _left(after: Report) -> Iterator[Refusal]:
    """The causes that are left, with what can be done."""
    known = {cause.name: cause for cause in causes.registry()}
    for name, codes in after.causes.items():
        rows = [row.name for row in after.rows if row.causes.get(name)]
        if name != "upstream":
            more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
            yield Refusal(name, f"{rows[0]}{more}", f"{codes} codes: {known[name].advice}")

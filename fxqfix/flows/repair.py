"""repair: a converted model, repaired in place of its faults, each repair verified."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from fxqfix import _rng, _torch, causes, dialects
from fxqfix._settings import entry
from fxqfix.comparison import First, Plan, Session
from fxqfix.errors import DataError
from fxqfix.flows._mend import Bench
from fxqfix.measure import batches_of, run
from fxqfix.names import Engine
from fxqfix.report import Mend, Refusal, Repair, Report, Row

__all__ = ["repair"]

# What a right int8 model does too, by one step: no repair is at fault.
_INHERENT = ("rounding", "bias-int32", "requantization")


@entry
def repair(
    prepared: nn.Module,
    converted: nn.Module,
    *,
    data: Iterable[Any] | None = None,
    engine: Engine | None = None,
    backend_config: Any = None,
) -> Repair:
    """Mend a converted model: qparams, weights and ranges become those that were trained.

    What is wrong is found by state: beside each site stands the conversion of `freeze(prepared)`.
    With data, the model is compared before and after, side by side; a repair after which more
    codes of its site differ on the same inputs is rolled back and listed as refused, and so is
    each cause that no pass can repair. A second repair finds nothing to repair.

    Args:
        prepared: The prepared model that `converted` was converted from. It is not changed.
        converted: The converted model, int8, reference or decomposed, edited or not. It is not
            changed.
        data: Batches to verify on, as for `compare`, that can be read more than once (a list, a
            DataLoader); None to verify by state alone.
        engine: That of `converted`; None is torch.backends.quantized.engine.
        backend_config: What the models were prepared with (TensorRT's), where it isn't torch's own.

    Returns:
        The repaired model (a new GraphModule), what was applied, what was refused and why, and the
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
        >>> mended = repair(prepared, converted, data=[2 * x], engine="fbgemm")
        >>> [(m.step, m.site) for m in mended.applied][:1]
        [('restore-qparams', '_0.weight')]
        >>> mended.after.row("input_1").local.differing
        0
    """
    if data is not None and iter(data := batches_of(data, "repair")) is data:
        raise DataError(
            "repair may have to read the data again, after a repair was rolled back",
            where="repair",
            found=type(data).__name__,
            expected="a list of batches or a DataLoader",
        )
    with _torch.quantized_engine(engine) as name, _rng.same_rng():
        return _rounds(
            partial(Bench, prepared, engine=name, backend_config=backend_config), converted, data
        )


def _rounds(
    bench: Callable[..., Bench], converted: nn.Module, data: Iterable[Any] | None
) -> Repair:
    """Repair until nothing is found: what was worse may be right once its inputs are."""
    found, rolled_back = _repair(bench(converted=converted), data)
    while rolled_back:
        more, rolled_back = _repair(bench(converted=found.graph_module), data)
        if not more.applied:
            break
        found = replace(more, applied=(*found.applied, *more.applied), before=found.before)
    return found


def _repair(bench: Bench, data: Iterable[Any] | None) -> tuple[Repair, bool]:
    """The repair, and whether something was rolled back because it made its op worse."""
    refused: dict[str, Refusal] = {}
    rolled_back = False
    while True:  # each round refuses more, or is the last one
        model, mends = bench.mend(refused)
        broken = bench.broken(model, refused)
        if broken.keys() - refused.keys():
            refused = broken | refused
            continue
        if data is None:
            return Repair(model, mends, tuple(refused.values())), False
        before, after = _judge(bench, model, data)
        worse = _worse(bench, mends, before, after)
        if not worse:
            left = (*refused.values(), *_left(after))
            return Repair(model, mends, left, before, after), rolled_back
        refused |= worse
        rolled_back = True


def _judge(bench: Bench, model: fx.GraphModule, data: Iterable[Any]) -> tuple[Report, Report]:
    """Compare the model as it came and as it is now, both on each batch."""
    sessions, twins = [], []
    for reading in (bench.theirs, dialects.read(model)):
        session = Session(Plan.of(bench.given, reading, bench.engine), math.inf)
        twins.append(session.weave(noise_floor=True))
        sessions.append(session)
    both: Any = _SideBySide(*twins)
    result = run(both, data, where="repair", progress=False, after=First(*twins))
    for session in sessions:
        session.floored = 1
    before, after = (session.report(result) for session in sessions)
    return before, after


def _worse(
    bench: Bench, mends: Iterable[Mend], before: Report, after: Report
) -> dict[str, Refusal]:
    """The repairs after which more codes of their op differ on the same inputs."""
    found: dict[str, Refusal] = {}
    olds = {row.name: row for row in before.rows}
    for mend in mends:
        group = bench.together(mend.site)
        for new in after.rows:
            old = olds.get(new.name)
            if new.name in group and old is not None and _faults(new) > _faults(old):
                reason = (
                    f"rolled back: {new.name} had {_faults(old)} wrong codes, with it "
                    f"{_faults(new)} ({', '.join(new.causes)})"
                )
                for name in group:
                    found.setdefault(name, Refusal(mend.step, name, reason))
    return found


class _SideBySide:
    """Two twins that see each batch together, and draw the same random numbers."""

    def __init__(self, first: fx.GraphModule, second: fx.GraphModule) -> None:
        self.first, self.second = first, second
        self.graph = first.graph
        self.parameters, self.buffers = first.parameters, first.buffers

    def forward(self, *args: Any, **kwargs: Any) -> None:
        given = _torch.tree_map_tensors(Tensor.clone, (args, kwargs))
        with _rng.same_rng():
            self.first.forward(*given[0], **given[1])
        self.second.forward(*args, **kwargs)


def _faults(row: Row) -> int:
    """Codes that this op itself gets wrong, but for those that come and go with its inputs."""
    own = {cause.name for cause in causes.registry() if cause.local} - set(_INHERENT)
    return sum(codes for cause, codes in row.causes.items() if cause in {*own, "unexplained"})


def _left(after: Report) -> Iterator[Refusal]:
    """The causes that are left, with what can be done."""
    known = {cause.name: cause for cause in causes.registry()}
    for name, codes in after.causes.items():
        rows = [row.name for row in after.rows if row.causes.get(name)]
        if name in known and name != "upstream":
            where = f"{codes} codes" + (f" in {len(rows)} sites" if len(rows) > 1 else "")
            yield Refusal(name, rows[0], f"{where}: {known[name].advice}")

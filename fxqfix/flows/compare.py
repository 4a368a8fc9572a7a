"""compare: prepared against converted, one row per site, each differing code with its cause."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from fxqfix import _torch, dialects
from fxqfix._devices import check_int8, device_of
from fxqfix._settings import entry
from fxqfix.comparison import FloatBeside, Plan, Session, made_of
from fxqfix.comparison.notes import moving
from fxqfix.dialects import Reading
from fxqfix.dialects._dtypes import check_floats
from fxqfix.dialects._finite import refuse_non_finite
from fxqfix.dialects._wrappers import unwrapped
from fxqfix.errors import (
    DeviceError,
    DialectError,
    OptionError,
    PairingError,
    UncalibratedError,
    counting,
)
from fxqfix.flows._ranks import over_ranks
from fxqfix.flows.convert import convert_by_torch
from fxqfix.flows.reproduce import with_source
from fxqfix.names import Engine
from fxqfix.passes import FreezeQParams
from fxqfix.report import Report

__all__ = ["compare", "prepared_reading", "same_device"]


@entry
def compare(
    prepared: nn.Module,
    converted: nn.Module | None,
    data: Iterable[Any],
    *,
    engine: Engine | None = None,
    local: bool = True,
    attribute: bool | int = True,
    noise_floor: str | bool = "first",
    culprits: int = 0,
    float_model: nn.Module | None = None,
    process_group: Any = None,
    progress: bool | None = None,
) -> Report:
    """Compare a prepared model with its conversion, site by site, and say why they differ.

    Both models and a shadow of every op run side by side, observers held still. Local is what an op
    adds given the same inputs, cumulative the distance to the prepared model's own value.

    Args:
        prepared: The prepared model, FX or eager, trained or calibrated.
        converted: Its conversion in any dialect; None for torch's own conversion of a copy.
        data: Any iterable of batches (tensor, tuple of arguments, dict of keywords), a DataLoader
            included. Read once, never stored. Of (inputs, labels) the labels are left out.
        engine: The quantized engine to convert and run on; None is torch.backends.quantized.engine.
        local: Whether to put a shadow beside every op; without, there are no causes either.
        attribute: Whether to compute causes, or for how many batches: what differs in later ones
            is `not-attributed`, and a report with such codes is *not judged*.
        noise_floor: Of which batches, "first" or "all"; False for none.
        culprits: Sites to correct alone, each in a forward of its own: `Report.culprits`.
        float_model: What was prepared: `Row.quantization` then says what quantization costs.
        process_group: Of torch.distributed: each rank compares its shard, all get the sum.
        progress: Show a bar (needs tqdm); None shows it on a terminal only.

    Returns:
        The report. Models, random state, batches stay as they were.

    Raises:
        TraceError, DialectError: A model can't be traced, or holds nothing that quantizes.
        PairingError, UncalibratedError: They don't belong together; the prepared never saw data.
        UnsupportedError: It is in floats that torch's conversion does not take.
        DataError, NonFiniteError: There is no data, or NaN or inf in it or in qparams.
        DeviceError, ModelRunError, OptionError: Two devices; a model raised; an option's value.

    Example:
        >>> import torch
        >>> from torch.ao.quantization import get_default_qat_qconfig_mapping
        >>> from torch.ao.quantization.quantize_fx import prepare_qat_fx
        >>> x, net = torch.ones(2, 8), torch.nn.Sequential(torch.nn.Linear(8, 2)).train()
        >>> prepared = prepare_qat_fx(net, get_default_qat_qconfig_mapping("fbgemm"), (x,))
        >>> _ = prepared(x)
        >>> report = compare(prepared.eval(), None, [2 * x], engine="fbgemm")
        >>> [(row.name, *row.causes) for row in report.rows if row.name == "input_1"]
        [('input_1', 'range-lost')]
    """
    _check_culprits(culprits, local)
    most, floor = _batches(attribute) if local else 0, _floor(noise_floor)
    models, asked = (prepared, converted, engine), (most, culprits, local, float_model)
    work = partial(_compared, models, data, asked, floor, progress)
    return over_ranks(work, process_group)


def _compared(
    models: tuple[nn.Module, nn.Module | None, str | None],
    data: Iterable[Any],
    asked: tuple[float, int, bool, nn.Module | None],
    floor: str,
    progress: bool | None,
) -> Report:
    prepared, converted, engine = models
    with _torch.quantized_engine(engine) as name:
        plan, notes = _plan(prepared, converted, name, bool(asked[0]))
        beside = None if asked[3] is None else FloatBeside(asked[3], plan)
        session = Session(plan, *asked[:3], beside)
        found = session.run(data, floor, progress)
        report = session.report(found)
        made = made_of(*map(unwrapped, (asked[3], prepared, converted)))
        report = replace(report, notes=(*report.notes, *notes), made=made)
        return with_source(report, prepared, converted, data)


def _plan(
    prepared: nn.Module, converted: nn.Module | None, engine: Engine, causes: bool
) -> tuple[Plan, tuple[str, ...]]:
    """The plan, and what a reader has to know of the converted model."""
    mine = prepared_reading(prepared)
    other = convert_by_torch(prepared) if converted is None else converted
    theirs, notes = _converted_reading(other)
    same_device(mine, theirs, "compare")
    return Plan.of(mine, theirs, engine, causes=causes), notes


def _converted_reading(converted: nn.Module) -> tuple[Reading, tuple[str, ...]]:
    """Read the converted model; fake-quants that observe are held still, as the prepared ones."""
    reading = dialects.read(converted, "compare")
    plain = [t.site.name for t in reading.activations if t.site.used and not t.site.quantizes]
    if not reading.prepared:
        return reading, ()
    if plain:
        raise PairingError(
            "the second model is a prepared one, and quantizes nothing at some sites",
            where="compare",
            found=f"{len(plain)} sites that are only observed, or switched off: {plain[:3]}",
            remedy="convert it first; or pass converted=None, and compare converts a copy of the "
            "first as torch does; or pass fxqfix.freeze(it)",
        )
    if not (count := moving(reading)):
        return reading, ()
    still = FreezeQParams()(reading.graph_module).graph_module
    note = f"the converted model is a prepared one: {count} of its fake-quants observe, and were "
    return dialects.read(still), (f"{note}held at their present state too",)


def _check_culprits(culprits: int, local: bool) -> None:
    counting(culprits, "compare", "culprits counts sites")
    if culprits and not local:
        raise OptionError(
            "to correct a site takes its shadow",
            where="compare",
            found=f"culprits={culprits}, local=False",
            remedy="leave out local=False, or culprits",
        )


def _batches(attribute: bool | int) -> float:
    """For how many batches causes are asked for."""
    if isinstance(attribute, bool):
        return math.inf if attribute else 0
    counting(attribute, "compare", "attribute counts batches")
    return attribute


def _floor(noise_floor: str | bool) -> str:
    """Of which batches: all, the first, or none ("")."""
    if isinstance(noise_floor, bool):
        return "all" if noise_floor else ""
    if noise_floor not in ("first", "all"):
        raise OptionError(
            "no such noise floor",
            where="compare",
            found=f"noise_floor={noise_floor!r}",
            expected="'first', 'all' or False",
        )
    return noise_floor


def prepared_reading(
    prepared: nn.Module,
    call: str = "compare(prepared, converted, data)",
    remedy: str | None = None,
) -> Reading:
    """Read the prepared model of a comparison.

    Args:
        prepared: The model.
        call: The call that needs it, for messages.
        remedy: What to do where it is none.

    Raises:
        PairingError: It is not a prepared one.
        DialectError: It observes no activation.
        UncalibratedError: It never saw data.
        NonFiniteError: A parameter is NaN or inf.
        UnsupportedError: It computes in floats that torch's conversion does not take.
    """
    where = call.partition("(")[0]
    refuse_non_finite(prepared, where)
    reading = dialects.read(prepared, where)
    if not reading.prepared:
        raise PairingError(
            "the first model is not a prepared one; are the arguments swapped?",
            where=where,
            found=f"a model of dialect {reading.dialect}",
            expected=call,
            remedy=remedy,
        )
    if not any(tap.site.used is not None for tap in reading.taps):
        found = [f"{site.name}: {reason}" for site, reason in reading.unsupported]
        found += [f"{t.site.name}: {t.site.source}" for t in reading.taps]
        raise DialectError(
            "the prepared model quantizes nothing that can be followed",
            where=where,
            found="; ".join(found[:5]) or "no site",
            remedy="compare the outputs of both models, or give it a qconfig that quantizes to "
            "integers, in the open graph",
        )
    never = [t.site for t in reading.taps if not t.site.calibrated]
    weights = [site for site in never if site.kind == "weight"]
    saw = [t for t in reading.activations if t.site.calibrated and "Fixed" not in t.site.source]
    if weights or (never and not saw):
        raise UncalibratedError(
            f"{len(never)} of {len(reading.taps)} sites never saw data",
            where=where,
            found=f"{[site.name for site in weights or never][:5]} with min=inf, max=-inf",
            remedy="run calibration data through the prepared model (observers enabled) first",
        )
    check_floats(reading, where)
    return reading


def same_device(prepared: Reading, converted: Reading, where: str) -> None:
    """Refuse two models that can't run side by side.

    An int8 model on the CPU is emulated where the prepared model is.

    Args:
        prepared: The prepared model.
        converted: The converted one.
        where: Who asks, for messages.

    Raises:
        DeviceError: They are on different devices, one is on several, or an int8 model is not on
            the CPU.
    """
    home = device_of(prepared.graph_module, f"{where}, the prepared model")
    if converted.has_kernels:
        check_int8(converted.graph_module, where)
        return
    there = device_of(converted.graph_module, f"{where}, the converted model")
    if there != home:
        raise DeviceError(
            "the two models are on different devices",
            where=where,
            found=f"the prepared one on {home}, the converted one on {there}",
            expected="both on one device",
            remedy=f"pass converted.to({str(home)!r})",
        )

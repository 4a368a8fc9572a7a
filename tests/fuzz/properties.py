"""What has to hold for every spec. A property that doesn't hold raises AssertionError."""

from __future__ import annotations

import copy
import functools
import hashlib
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.nn import quantizable as nnqa
from torch.ao.quantization import quantize_fx
from torch.ao.quantization.fx.custom_config import ConvertCustomConfig, PrepareCustomConfig
from torch.utils._pytree import tree_map

from fxqfix import Report, certificate_of, compare, emulate, freeze, inspect, lint, to_decomposed
from fxqfix import to_int8 as convert_exactly
from fxqfix._torch import quantized_engine, quiet
from fxqfix.errors import FxqfixError
from fxqfix.report import ALLOWED
from tests.fuzz.specs import Spec
from tests.states import bits, fingerprint, run, same
from tests.strategies import EagerNet, Net, TwoInputs, run_in

__all__ = ["JUDGED", "PROPERTIES", "Outcome", "outcome_of"]


class TorchError(Exception):
    """torch itself fails on a spec: it says nothing about fxqfix."""


@contextmanager
def _torchs() -> Iterator[None]:
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise TorchError(f"{type(error).__name__}: {error}") from error


# --- a spec, made ---------------------------------------------------------------------------------


class Subject:
    """The models of a spec, each made when it is first asked for."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.engine = spec, spec.recipe.engine
        kind = EagerNet if spec.flow == "eager" else TwoInputs if spec.plan.inputs == 2 else Net
        with _torchs():
            net = spec.plan.build(kind)
            with torch.no_grad():
                copy.deepcopy(net).eval()(*spec.inputs())
            self.prepared = {"fx": self._fx, "eager": self._eager, "pt2e": self._pt2e}[spec.flow](
                net
            )
        inputs = [spec.inputs(100, 1.0), spec.inputs(101, 3.0)]
        self.data = [x if len(x) > 1 else x[0] for x in inputs]
        self.converted: nn.Module | None = None  # torch's own, where it has one
        self._ran: dict[int, tuple[nn.Module, list[Any]]] = {}

    def _fx(self, net: nn.Module) -> nn.Module:
        custom = PrepareCustomConfig()
        layers = [(i, dict(s.options)["name"]) for i, s in self._steps() if s.kind == "layer"]
        custom.set_non_traceable_module_names([f"layers.{i}" for i, n in layers if n == "leaf"])
        for i, name in layers:
            if name == "standalone":
                width = net.layers[str(i)].one.in_channels  # type: ignore[index, union-attr]
                example = (torch.zeros(1, width, 8, 8),)
                custom.set_standalone_module_name(f"layers.{i}", None, example, None, None)
            elif name == "lstm":
                custom.set_float_to_observed_mapping(nn.LSTM, nnqa.LSTM)
        return self.spec.recipe.prepare(net, *self.spec.inputs(), custom=custom)

    def _steps(self) -> Iterator[tuple[int, Any]]:
        yield from enumerate(self.spec.plan.steps)

    def _eager(self, net: nn.Module) -> nn.Module:
        recipe = self.spec.recipe
        make = tq.get_default_qat_qconfig if recipe.qat else tq.get_default_qconfig
        net.train(recipe.qat).qconfig = (  # type: ignore[assignment]
            make(recipe.default) if recipe.default else recipe.qconfig()
        )
        for name in recipe.skipped:
            if name in dict(net.named_modules()):
                net.get_submodule(name).qconfig = None  # type: ignore[assignment]
        model = (tq.prepare_qat if recipe.qat else tq.prepare)(net)
        run_in(model, *self.spec.inputs())
        return model.eval()

    def _pt2e(self, net: nn.Module) -> nn.Module:
        from tests.dialects import pt2e_nets

        given = pt2e_nets.MODES[self.spec.mode]
        return pt2e_nets.prepare(net, given.make(), qat=given.qat, example=self.spec.inputs())

    def convert(self) -> nn.Module:
        """torch's own conversion of a copy."""
        with _torchs(), quantized_engine(self.engine), torch.random.fork_rng(devices=[]):
            if self.spec.flow == "pt2e":
                from tests.dialects import pt2e_nets

                return pt2e_nets.convert(self.prepared)
            own = copy.deepcopy(self.prepared)
            if self.spec.flow == "eager":
                found = tq.convert(own)
            else:
                custom = ConvertCustomConfig()
                if any(isinstance(m, nnqa.LSTM) for m in own.modules()):
                    custom.set_observed_to_quantized_mapping(nnqa.LSTM, nn.quantized.LSTM)
                found = quantize_fx.convert_fx(own, convert_custom_config=custom)
            run(found, *self.spec.inputs())
        return found

    @functools.cached_property
    def frozen(self) -> nn.Module:
        return freeze(self.prepared)

    @functools.cached_property
    def int8(self) -> nn.Module:
        return convert_exactly(self.prepared, engine=self.engine)

    @functools.cached_property
    def decomposed(self) -> nn.Module:
        return to_decomposed(self.prepared)

    def compared(self, prepared: nn.Module, converted: nn.Module) -> Report:
        return compare(prepared, converted, self.data, engine=self.engine, noise_floor=False)

    def runs(self, model: nn.Module) -> list[Any]:
        """What a model gives for all data, random numbers alike; run once."""
        known = self._ran.get(id(model))
        if known is None:
            with quantized_engine(self.engine), quiet(), torch.random.fork_rng(devices=[]):
                found = [run(model, *_arguments(x), seed=0) for x in self.data]
            known = self._ran[id(model)] = model, found  # kept, so that no other gets its id
        return known[1]

    @property
    def key(self) -> str:
        """One for each distinct model: graph text, modules, qconfig, engine and flow."""
        graph = getattr(self.prepared, "graph", None)
        text = f"{graph}{self.prepared}{self.spec.recipe}{self.engine}{self.spec.flow}"
        return hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", text).encode()).hexdigest()[:16]


def _arguments(batch: Any) -> tuple[Tensor, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


# --- the properties -------------------------------------------------------------------------------


def reads(s: Subject) -> None:
    """Inspect and lint give a result."""
    inspect(s.prepared)
    lint(s.prepared, engine=s.engine)


def frozen_is_decomposed(s: Subject) -> None:
    """Every output bit.

    A value of one channel that lies channels-last is laid out anew by torch's element-wise ops, and
    norms then sum in another order: there the same images have to give equal bits contiguous.
    """
    wanted, found = s.runs(s.frozen), s.runs(s.decomposed)
    if s.spec.channels_last and not same(wanted, found):
        plain = [[x.contiguous() for x in _arguments(batch)] for batch in s.data]
        wanted, found = (
            [run(model, *x, seed=0) for x in plain] for model in (s.frozen, s.decomposed)
        )
    assert same(wanted, found), "the decomposed graph gives other bits than the frozen model"


def emulated_is_int8(s: Subject) -> None:
    """Every output bit, of torch's own conversion."""
    if s.spec.flow == "pt2e" or s.converted is None:
        return  # no kernels
    emulated = emulate(s.converted, engine=s.engine)
    wanted = tree_map(_codes, s.runs(s.converted))  # emulated gives these for a quantized tensor
    assert same(wanted, s.runs(emulated)), "emulated gives other bits than the kernels"


def _codes(value: Any) -> Any:
    return value.int_repr() if isinstance(value, Tensor) and value.is_quantized else value


def _adds_up(report: Report) -> None:
    for row in report.rows:
        shares = sum(row.causes.values())
        whole = shares == row.differing or (shares < row.differing and row.problems)
        assert whole, f"shares don't add up: {row.kind}"
        assert not (row.exact and row.differing), "a row is exact with codes that differ"
    beside = " beside sites that are left out" * bool(report.left_out)
    assert report.unexplained == 0, f"unexplained{beside}: {_unexplained(report)}"


def _unexplained(report: Report) -> str:
    rows = (r for r in report.rows if r.causes.get("unexplained"))
    return ", ".join(f"{r.op} {r.kernel} {r.causes['unexplained']} of {r.differing}" for r in rows)


def _exact_is_equal(s: Subject, report: Report, prepared: nn.Module, converted: nn.Module) -> None:
    outputs = same(s.runs(prepared), s.runs(converted))
    codes = not any(row.cumulative.differing for row in report.rows)
    assert outputs or not report.exact, "exact, and outputs differ"
    assert codes or not report.exact, "exact, and codes differ"
    whole = outputs and codes and report.verdict != "not judged"
    assert report.exact or not whole or report.faults, "all is equal and was judged, and not exact"
    if report.ok:
        bad = set(report.causes) - ALLOWED["Report"]
        assert not bad, f"ok with {bad}"
        assert outputs or report.causes, "ok, outputs differ, and no cause is named"


def torchs_conversion_is_explained(s: Subject) -> None:
    """Every code that differs has its cause, with observers on as torch left them."""
    if s.converted is not None:
        _adds_up(s.compared(s.prepared, s.converted))


def _why_not(s: Subject, model: nn.Module) -> str:
    """Why a model can't run; empty where it can."""
    try:
        s.runs(model)
    except RuntimeError as error:
        return _line(error)
    return ""


def frozen_against_int8(s: Subject) -> None:
    """to_int8 of any model: exact is equal, equal is exact, what is ok stays in range."""
    if s.spec.flow == "pt2e":
        return
    certificate = certificate_of(s.int8)
    broken = _why_not(s, s.int8)
    assert not (broken and certificate.ok), f"certificate ok, and the model can't run: {broken}"
    if broken:
        return
    report = s.compared(s.frozen, s.int8)
    _adds_up(report)
    _exact_is_equal(s, report, s.frozen, s.int8)
    if certificate.ok:
        assert report.verdict != "not ok", f"certificate ok, report: {report.faults}"


def frozen_against_decomposed(s: Subject) -> None:
    """Exact by construction."""
    report = s.compared(s.frozen, s.decomposed)
    _adds_up(report)
    _exact_is_equal(s, report, s.frozen, s.decomposed)
    assert report.verdict != "not ok", f"frozen against decomposed: {report.faults}"


PROPERTIES: dict[str, Callable[[Subject], None]] = {
    f.__name__: f
    for f in (
        reads,
        frozen_is_decomposed,
        torchs_conversion_is_explained,
        emulated_is_int8,
        frozen_against_int8,
        frozen_against_decomposed,
    )
}

# A model that all of these refuse has not passed.
JUDGED = ("frozen_is_decomposed", "torchs_conversion_is_explained", "frozen_against_decomposed")


# --- all of them, for one spec --------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of a spec.

    Attributes:
        key: Names the distinct model; empty where torch itself fails on it.
        findings: Property -> what is wrong.
        refused: Property -> fxqfix's reason for not doing it.
        torch: Property -> why torch can't do its part.
    """

    key: str = ""
    findings: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    torch: dict[str, str] = field(default_factory=dict)

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def outcome_of(spec: Spec) -> Outcome:
    """Make a spec's models and ask for every property."""
    found = Outcome()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            subject = Subject(spec)
    except TorchError as error:
        found.torch["prepare"] = _line(error)
        return found
    found.key = subject.key
    try:
        subject.converted = subject.convert()
    except TorchError as error:
        found.torch["convert"] = _line(error)
    before = _state(subject)
    for name, holds in PROPERTIES.items():
        _ask(name, lambda holds=holds: holds(subject), found)  # type: ignore[misc]
        if (after := _state(subject)) != before:
            changed = [k for k in before | after if before.get(k) != after.get(k)]
            found.findings.setdefault(f"{name} perturbs", ", ".join(changed[:3]))
            break
    return found


def _ask(name: str, holds: Callable[[], None], found: Outcome) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            holds()
    except TorchError as error:
        found.torch[name] = _line(error)
    except FxqfixError as error:
        found.refused[name] = _line(error)
    except AssertionError as error:
        found.findings[name] = str(error)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = next((f for f in reversed(frames) if "/fxqfix/" in f.filename), frames[-1])
        file = place.filename.rpartition("/fxqfix/")[2]
        found.findings[name] = f"{type(error).__name__} in {file}:{place.name}: {_line(error)}"


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def _state(s: Subject) -> dict[str, Any]:
    """All that no property may change."""
    state = {f"prepared {k}": v for k, v in fingerprint(s.prepared).items()}
    if s.converted is not None:
        state |= {f"converted {k}": v for k, v in fingerprint(s.converted).items()}
    state["inputs"] = [[bits(x) for x in _arguments(b)] for b in s.data]
    state["random state"] = torch.get_rng_state().tolist()
    state["engine"] = torch.backends.quantized.engine
    return state

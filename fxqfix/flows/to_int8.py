"""to_int8: torch's conversion of the frozen model, the range held, wrong kernels avoided."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from torch import fx, nn

from fxqfix import _torch, dialects
from fxqfix._devices import CPU, device_of, on_cpu
from fxqfix._settings import entry
from fxqfix.checks import Subject
from fxqfix.dialects import Reading
from fxqfix.dialects._code import keep_hooks
from fxqfix.dialects._dtypes import check_floats
from fxqfix.dialects._finite import refuse_non_finite
from fxqfix.dialects.weights import holder
from fxqfix.engines import ENGINES, Call, met, placed, saturation_possible
from fxqfix.errors import DialectError, UnknownNameError
from fxqfix.flows._int8_certificate import certify
from fxqfix.flows.convert import convert_by_torch
from fxqfix.flows.decompose import declared_ranges
from fxqfix.flows.freeze import frozen_by
from fxqfix.names import Averages, Engine, Saturation
from fxqfix.pairing import pair
from fxqfix.passes import AvoidDefects, FloatIslands, RestoreRange
from fxqfix.qparams import QParams
from fxqfix.report import Int8Certificate

__all__ = ["certificate_of", "convert_with_islands", "to_int8"]

_STATE = "certified state"
_KEY = "certificate"  # in meta, as 0.1 had it; stays readable there until 0.3

_CHOICES = {"saturation": ("warn", "island"), "averages": ("exact", "kernel")}


@entry
def to_int8(
    prepared: nn.Module,
    *,
    engine: Engine | None = None,
    saturation: Saturation = "warn",
    averages: Averages = "exact",
    backend_config: Any = None,
) -> fx.GraphModule:
    """Convert to an int8 model that computes what the prepared one does.

    torch's own conversion of ``freeze(prepared)``, and then what it lacks: a clamp wherever codes
    could leave the declared [quant_min, quant_max], and a bypass of kernels that are known to be
    wrong or that the engine lacks (mostly the op in float, on its quantized weight); the rest runs
    on convert_fx's kernels. What reads a value that an in-place op overwrote gets that op's result
    quantized, where training read it in float; of freeze(prepared), in float.

    ``certificate_of(result)``, an `Int8Certificate`, says what was checked.

    Args:
        prepared: A prepared model after training or calibration, FX or eager. It is not changed.
        engine: "fbgemm", "x86", "onednn" or "qnnpack"; None is torch.backends.quantized.engine.
            Weights are packed for it: copy the result with the same engine in force.
        saturation: Ops whose sums can leave int16 on CPUs without VNNI, with activations in range:
            "warn" names them in the certificate, "island" leaves them in float: slower, and exact.
        averages: Of an even number of codes they can be ties, which kernels round otherwise than
            training did: "exact" takes them in float, "kernel" leaves the kernel.
        backend_config: What it was prepared with; None is torch's own.

    Returns:
        A new GraphModule, in eval mode, on the CPU; of an eager model its trace.

    Raises:
        UnknownNameError: This torch has no such engine, or one of the choices is none.
        DialectError: The model is not a prepared one, or torch's conversion quantizes none of it.
        UncalibratedError, NonFiniteError: It never saw data; it holds NaN or inf qparams.
        TraceError, UnsupportedError, PassError: It can't be traced; isn't float32; torch failed.

    Example:
        >>> import torch
        >>> from fxqfix import compare
        >>> from torch.ao.quantization import get_default_qat_qconfig_mapping
        >>> from torch.ao.quantization.quantize_fx import prepare_qat_fx
        >>> x = torch.linspace(-1, 1, 16).reshape(2, 8)
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 2)).train()
        >>> prepared = prepare_qat_fx(net, get_default_qat_qconfig_mapping("fbgemm"), (x,))
        >>> _ = prepared(x)
        >>> model = to_int8(prepared.eval(), engine="fbgemm")
        >>> compare(prepared, model, [3 * x], engine="fbgemm").exact
        True
        >>> [(r.site, r.clamped) for r in certificate_of(model).ranges]
        [('input_1', True), ('_0', True)]
    """
    _check(saturation=saturation, averages=averages)
    with _torch.quantized_engine(engine) as name:
        _check_engine(name)
        frozen = _frozen(prepared)
        own = dialects.read(frozen)
        converted = convert_with_islands(frozen, name, saturation == "island", backend_config)
        routes = AvoidDefects(name, _grids(own, converted), averages=averages == "exact")
        return _certified(own, frozen, routes(converted).graph_module, name, _notes(prepared))


def certificate_of(model: nn.Module) -> Int8Certificate:
    """What `to_int8` checked on a model that it returned.

    Args:
        model: That model, or a copy of it.

    Raises:
        DialectError: The model carries no certificate, or was edited since.

    Example:
        >>> import torch
        >>> certificate_of(torch.nn.Linear(2, 2))
        Traceback (most recent call last):
        fxqfix.errors.DialectError: certificate_of: the model carries no certificate. ...
    """
    found = getattr(model, "meta", {}).get(_KEY)
    if not isinstance(found, Int8Certificate):
        raise DialectError(
            "the model carries no certificate",
            where="certificate_of",
            found=type(model).__name__,
            expected="what fxqfix.to_int8 returned, or a copy.deepcopy of it",
            remedy="a pass, a trace or a file does not keep it: ask before, and keep to_json()",
        )
    known = getattr(model, "meta", {}).get(_STATE)
    if known is not None and isinstance(model, fx.GraphModule) and known != _state(model):
        raise DialectError(
            "the model was edited after its certificate was made",
            where="certificate_of",
            found="another graph, other modules or other qparams",
            expected="what fxqfix.to_int8 returned, or a copy.deepcopy of it",
            remedy="convert anew with to_int8, or ask fxqfix.certify, which runs the model",
        )
    return found


def _check(**chosen: str) -> None:
    for name, value in chosen.items():
        if value not in _CHOICES[name]:
            expected = " or ".join(_CHOICES[name])
            raise UnknownNameError(f"{name}={value!r}", where="to_int8", expected=expected)


def _check_engine(name: str) -> None:
    if name not in ENGINES:
        raise UnknownNameError(
            f"{name!r} has no int8 kernels that fxqfix knows",
            where="to_int8",
            expected=", ".join(ENGINES),
            remedy="pass engine=, or set torch.backends.quantized.engine",
        )


def _notes(model: nn.Module) -> tuple[str, ...]:
    home = device_of(model)
    return () if home == CPU else (f"converted as a copy on the CPU: the model is on {home}",)


def _certified(
    own: Reading, frozen: nn.Module, routed: fx.GraphModule, engine: str, notes: tuple[str, ...]
) -> fx.GraphModule:
    ranges = declared_ranges(dialects.read(routed), frozen)
    result: fx.GraphModule = RestoreRange(ranges)(routed).graph_module
    keep_hooks(frozen, result)
    result.meta[_KEY] = replace(certify(own, dialects.read(result), engine), notes=notes)
    result.meta[_STATE] = _state(result)
    return result.eval()


def _state(model: fx.GraphModule) -> str:
    """What tells an edited model: a digest of its graph, its modules and their qparams."""
    text = f"{model.graph}{model}".encode()
    plain = {k: v for k, v in model.named_buffers() if not v.is_quantized}
    values = "".join(f"{name}{value.tolist()}" for name, value in sorted(plain.items()))
    return hashlib.sha256(text + values.encode()).hexdigest()


def convert_with_islands(
    frozen: nn.Module, engine: str, islands_saturation: bool = False, backend_config: Any = None
) -> fx.GraphModule:
    """Torch's conversion of a frozen model, the ops whose kernel is wrong or missing in float.

    Args:
        frozen: What `freeze` returned; it is not changed.
        engine: The engine, which is in force.
        islands_saturation: Whether ops that can saturate at 16 bits stay in float too.
        backend_config: For convert_fx; None is torch's own.
    """
    own = dialects.read(frozen)
    reasons = _islands(own, engine, islands_saturation=islands_saturation)
    converted = dialects.trace(
        convert_by_torch(FloatIslands(reasons)(frozen).graph_module, backend_config)
    )
    if not any(dialect.matches(converted) for dialect in dialects.DIALECTS):
        kinds = sorted({str(t.site.used.dtype) for t in own.activations if t.site.used is not None})
        raise DialectError(
            "torch's conversion left all ops in float: its backend config has none of their dtypes",
            where="to_int8",
            found=f"activations of dtype {', '.join(kinds) or 'none'} for engine {engine}",
            expected="torch.quint8 activations and torch.qint8 weights, as a rule",
            remedy="prepare with the engine's default qconfig mapping, or call "
            "fxqfix.to_decomposed(prepared), which takes every dtype",
        )
    return converted


def _frozen(model: nn.Module) -> nn.Module:
    dialects.check_kind(model, "to_int8")
    model = on_cpu(model, "to_int8")
    refuse_non_finite(model, "to_int8")
    check_floats(dialects.read(model, "to_int8"), "to_int8")
    frozen = frozen_by(model, quantized=True)
    found = dialects.read(frozen)
    if found.exported:
        raise DialectError(
            "PT2E models have no conversion to torch's int8 kernels",
            where="to_int8",
            found=f"a model of dialect {found.dialect}",
            expected="a model of prepare_fx or prepare_qat_fx, or of eager prepare",
            remedy="fxqfix.to_decomposed or fxqfix.migrate, and certify on the route that it runs "
            "on; or prepare with prepare_fx",
        )
    return frozen


def _grids(own: Reading, converted: fx.GraphModule) -> dict[str, QParams]:
    """Converted site -> the frozen model's qparams."""
    pairs = pair(own, dialects.read(converted)).pairs
    return {
        p.converted.site.name: p.prepared.site.used
        for p in pairs
        if p.prepared.site.used is not None and p.prepared.site.kind == "activation"
    }


def _islands(own: Reading, engine: str, *, islands_saturation: bool) -> dict[str, str]:
    """Path of each module with a weight whose kernel is wrong, missing or saturates -> why."""
    subject = Subject(own, engine, training=False)
    paths = {n.name: str(n.target) for n in own.graph_module.graph.nodes if n.op == "call_module"}
    found: dict[str, str] = {}
    for call in (*(call for _, call in subject.calls), *_bags(own, engine)):
        if call.weight is None and not isinstance(call.module, nn.PReLU):
            continue  # ops without a weight are routed once they are converted
        islands = [d.name for d in met(call, engine) if d.cure == "island"]
        reason = islands[0] if islands else None
        if reason is None and islands_saturation and call.qparams:
            highest = call.source.quant_max
            pairs = saturation_possible(placed(call, engine, "avx2"), highest)
            reason = "int16-saturation" if pairs else None
        if reason is not None:
            found[paths.get(call.node, call.node)] = reason
    return found


def _bags(own: Reading, engine: str) -> list[Call]:
    found = []
    for tap in own.weights:
        if tap.site.op == "embedding_bag" and tap.weight is not None:
            module = holder(own.graph_module.get_submodule(tap.site.module))
            call = Call(tap.node.name, engine, "embedding_bag", module=module, weight=tap.weight())
            found.append(call)
    return found

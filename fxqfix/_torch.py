"""The only home of torch-private names, and of probes that ask torch what it does.

Behaviour is probed, never guessed from a version number: what a fused fake-quant uses is read by
running that very kernel on a copy of the module.
"""

from __future__ import annotations

import abc
import copy
import functools
import importlib
import sys
import threading
import warnings
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from fxqfix._rng import same_rng
from fxqfix.errors import MissingDependencyError, UnknownNameError
from fxqfix.names import Engine

# ---------------------------------------------------------------- finding names


@functools.cache
def resolve(dotted: str) -> Any:
    """The object that a dotted name stands for, or None where this installation lacks it."""
    head, *rest = dotted.split(".")
    try:
        with quiet():
            found: Any = importlib.import_module(head)
    except Exception:  # a package made for another torch raises what it likes
        return None
    path = head
    for name in rest:
        path = f"{path}.{name}"
        try:
            found = getattr(found, name)
        except (AttributeError, RuntimeError, ImportError):  # of torch.ops; of torch.ao, lazily
            try:
                with quiet():
                    found = importlib.import_module(path)
            except Exception:  # as above
                return None
    return found


_SILENT = threading.local()


@contextmanager
def _marked() -> Iterator[None]:
    _SILENT.on = True
    try:
        yield
    finally:
        _SILENT.on = False


@contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's deprecation notices, which are addressed to callers and not to fxqfix.

    Python takes longer to set filters than an observer to answer: inside another, it does nothing.
    """
    if getattr(_SILENT, "on", False):
        yield
        return
    with warnings.catch_warnings(), _marked():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


def quantization() -> ModuleType:
    """torch.ao.quantization, or a clear error where this torch has lost it.

    Raises:
        MissingDependencyError: torch.ao.quantization can't be imported.
    """
    found = resolve("torch.ao.quantization")
    if found is None:
        raise MissingDependencyError(
            "this flow needs torch.ao.quantization, which this torch does not have",
            where="fxqfix",
            found=f"torch {torch.__version__}",
            remedy="install a torch that still ships it (2.6 to 2.15), or use the PT2E flow",
        )
    return found  # type: ignore[no-any-return]  # resolve returns what import finds


def decomposed() -> Any:
    """The torch.ops.quantized_decomposed namespace, with its ops registered."""
    ours, theirs = "torch.ao.quantization.fx", "torchao.quantization.pt2e"
    for name in (f"{ours}._decomposed", f"{theirs}._decomposed", f"{theirs}.decomposed"):
        try:
            with quiet():
                importlib.import_module(name)
        except ImportError:
            continue
        break
    return torch.ops.quantized_decomposed


# ------------------------------------------------------- observers and fake-quants


_PLACEHOLDERS = ("PlaceholderObserver", "NoopObserver", "ReuseInputObserver", "RecordingObserver")


def torchao_bases(name: str) -> tuple[type, ...]:
    """The class of that name; a model holds torchao's only if torchao is imported already."""
    module = sys.modules.get("torchao.quantization.pt2e")
    found = getattr(module, name, None)
    return (found,) if isinstance(found, type) else ()


def _bases(*names: str) -> tuple[type, ...]:
    """The classes of these names, of torch and of torchao."""
    own = [resolve(f"torch.ao.quantization.{name}") for name in names]
    others = [c for name in names for c in torchao_bases(name.rpartition("._")[2])]
    return (*(c for c in own if c is not None), *others)


def _is_a(module: nn.Module, *names: str) -> bool:
    """isinstance, remembered by type: the classes are ABCs, which are slow to ask."""
    # The token is another once a class is registered with one; torchao may be imported late.
    now = abc.get_cache_token(), "torchao.quantization.pt2e" in sys.modules
    kind: Any = type(module)
    return _inherits(kind, names, now)


@functools.lru_cache(maxsize=1024)  # bounded: every GraphModule has a type of its own
def _inherits(kind: type, names: tuple[str, ...], _now: Hashable) -> bool:
    return issubclass(kind, _bases(*names))


def is_observer(module: nn.Module) -> bool:
    """True for observers of torch.ao and torchao (fake-quants are not observers here)."""
    found = _is_a(module, "ObserverBase", "AffineQuantizedObserverBase")
    return found and not is_fake_quant(module)


def is_fake_quant(module: nn.Module) -> bool:
    """True for fake-quants of torch.ao and torchao, and for fxqfix's frozen ones."""
    return _is_a(module, "FakeQuantizeBase")


def is_quantizer(module: nn.Module | None) -> bool:
    """True for observers and fake-quants."""
    return module is not None and (is_observer(module) or is_fake_quant(module))


def register_fake_quant(cls: type[nn.Module]) -> None:
    """Make torch's (and torchao's) conversion accept `cls` as a fake-quant.

    FakeQuantizeBase is an ABC: a virtual subclass passes its isinstance checks without inheriting
    buffers and hooks that a frozen fake-quant must not have.
    """
    for base in _bases("FakeQuantizeBase"):
        base.register(cls)  # type: ignore[attr-defined]  # an ABC


def is_fused_fake_quant(module: nn.Module) -> bool:
    """True where one kernel observes, picks qparams and fake-quantizes."""
    return _is_a(module, "FusedMovingAvgObsFakeQuantize")


def is_learnable_fake_quant(module: nn.Module) -> bool:
    """True for fake-quants whose scale and zero point are trained."""
    return _is_a(module, "_learnable_fake_quantize._LearnableFakeQuantize")


def is_dynamic(module: nn.Module) -> bool:
    """True where qparams are chosen anew for every batch."""
    return bool(getattr(module, "is_dynamic", False))


def is_placeholder(module: nn.Module) -> bool:
    """True for observers that have no qparams to give (float16, dynamic, no-op, recorders)."""
    return _is_a(module, *_PLACEHOLDERS)


_HOOKS = (
    ("post", "_forward_hooks", "_observer_forward_hook"),
    ("pre", "_forward_pre_hooks", "_observer_forward_pre_hook"),
)


def observer_hook(module: nn.Module) -> str | None:
    """How an eager module runs its activation_post_process: "post", "pre" or not at all (None)."""
    for kind, place, name in _HOOKS:
        if any(getattr(h, "__name__", "") == name for h in getattr(module, place).values()):
            return kind
    return None


def strip_observer_hook(module: nn.Module) -> None:
    """Take the observer hook off a module (a copy of the user's)."""
    for _, place, name in _HOOKS:
        hooks = getattr(module, place)
        for key in [k for k, hook in hooks.items() if getattr(hook, "__name__", "") == name]:
            del hooks[key]


# ----------------------------------------------------------------------- fx details


def observed_attributes(graph_module: fx.GraphModule) -> Any:
    """What prepare_fx keeps for convert_fx, or None for any other graph module."""
    return graph_module.meta.get("_observed_graph_module_attrs")


def is_fused_module(module: nn.Module) -> bool:
    """True for torch.ao's intrinsic (fused) float modules."""
    base = resolve("torch.ao.nn.intrinsic._FusedModule")
    return base is not None and isinstance(module, base)


def is_reference_module(module: nn.Module) -> bool:
    """True for the reference modules of convert_to_reference_fx."""
    base = resolve("torch.ao.nn.quantized.reference.modules.utils.ReferenceQuantizedModule")
    own = resolve("torch.ao.nn.quantized.reference.modules.conv._ConvNd")
    return isinstance(module, tuple(k for k in (base, own) if k is not None))


BATCH_NORM: Any = nn.modules.batchnorm._BatchNorm  # of any dimension
DROPOUT: Any = nn.modules.dropout._DropoutNd  # of any kind


def converted_weight(module: nn.Module) -> Tensor:
    """The float weight that torch's conversion of a QAT module quantizes, BatchNorm folded in."""
    own: Any = module
    if hasattr(module, "to_float"):
        with quiet(), same_rng():  # it constructs modules, which draw random numbers
            own = own.to_float()
    while isinstance(own, nn.Sequential):
        own = own[0]
    return own.weight.detach()  # type: ignore[no-any-return]


def is_packed_params(value: object) -> bool:
    """True for the opaque weight objects of torch.ops.quantized.*."""
    return isinstance(value, torch.ScriptObject) and hasattr(value, "unpack")


_M = TypeVar("_M", bound=nn.Module)


def copied(module: _M) -> _M:
    """A deep copy with the original's packed weights: torch's packs what it unpacks, anew."""
    made, own = copy.deepcopy(module), dict(module.named_modules())
    for name, part in made.named_modules():  # torch.compile's wrapper is gone from a copy
        given = vars(own.get(name, part))
        vars(part).update({k: v for k, v in given.items() if is_packed_params(v)})
    return made


def has_tiles() -> bool:  # AMX, caps not asked
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def cpu_level() -> str:
    """What cpuid says, caps not asked: "vnni" (AVX512-VNNI), "avx512", "avx2", or "unknown"."""
    asked = {n: getattr(torch.cpu, f"_is_{n}_supported", bool) for n in ("vnni", "avx512", "avx2")}
    return next((name for name, supported in asked.items() if supported()), "unknown")


def packed_engine(packed: Any) -> str | None:
    """The engine whose kernel a packed weight runs on; None where this torch answers otherwise.

    Each kernel refuses a qint32 input in words of its own. (XNNPACK takes qint8 for qnnpack: it
    packs the weight anew, and drops the one that quint8 needs.)
    """
    name = str(packed._type().name()) if is_packed_params(packed) else ""
    dim = 0 if name.startswith("Linear") else int(name[4]) if name[4:5].isdigit() else None
    if dim is None:
        return None
    weight = packed.unpack()[0]
    transposed = dim > 0 and packed.transpose()
    channels = weight.shape[1] if not transposed else weight.shape[0]
    if dim > 0 and not transposed:
        channels *= packed.groups()
    op = "linear" if dim == 0 else f"conv{'_transpose' if transposed else ''}{dim}d"
    # No rows: onednn's dynamic linear crashes on a static one's primitive of its shape.
    shape = [min(dim, 1), channels] + [1] * dim
    probe = torch.quantize_per_tensor(torch.zeros(shape), 1.0, 0, torch.qint32)
    try:
        getattr(torch.ops.quantized, op)(probe, packed, 1.0, 0)
    except RuntimeError as error:
        said = str(error).partition("\n")[0].lower()
        named = next((e for e in ("qnnpack", "onednn", "fbgemm") if e in said), None)
        return named or ("fbgemm" if dim == 0 and "quint8" in said else None)
    return None


def requantized(like: Tensor, codes: Tensor, scale: float, zero_point: int) -> Tensor:
    """A quantized tensor of these codes and this grid, with the dtype and the strides of another.

    Args:
        like: A quantized tensor, per tensor.
        codes: Integer codes of the same shape.
        scale: Of the new tensor.
        zero_point: Of the new tensor.
    """
    integers = torch.empty_like(like.int_repr()).copy_(codes)
    return torch._make_per_tensor_quantized_tensor(integers, scale, zero_point)


def reversed_padding(module: nn.Module) -> list[int]:
    """The padding of a convolution as `F.pad` takes it (for padding modes other than zeros)."""
    return list(module._reversed_padding_repeated_twice)  # type: ignore[arg-type]


def runs_on_qnnpack() -> bool:
    """Whether qnnpack is in force: a tenth of the time of asking for the engine's name."""
    return bool(torch._C._get_qengine() == _QNNPACK)


# Its number: torch.backends.quantized names them by position.
_QNNPACK = 2


@contextmanager
def quantized_engine(engine: str | None) -> Iterator[Engine]:
    """Set torch.backends.quantized.engine for a while; None leaves it. Yields the one in force."""
    quantized: Any = torch.backends.quantized
    before, known = quantized.engine, quantized.supported_engines
    if engine is not None and engine not in known:
        raise UnknownNameError(
            f"no quantized engine is named {engine!r} in this torch",
            where="engine",
            expected=f"one of {sorted(known)}",
        )
    try:
        quantized.engine = engine or before
        yield quantized.engine
    finally:
        quantized.engine = before


def set_flag(place: Any, name: str, value: Any) -> None:
    """Set a switch of torch.backends, also where `disable_global_flags` froze them all."""
    frozen = torch.backends.flags_frozen()  # type: ignore[no-untyped-call]  # torch's own
    with getattr(torch.backends, "__allow_nonbracketed_mutation")() if frozen else nullcontext():
        setattr(place, name, value)


def tree_map_tensors(function: Any, tree: Any) -> Any:
    """Apply a function to every tensor in nested tuples, lists and dicts."""
    return torch.utils._pytree.tree_map_only(Tensor, function, tree)


def closed_modules() -> dict[str, Any]:
    """convert_fx's custom config for the modules that eager convert knows by itself (LSTM)."""
    known = resolve("torch.ao.quantization.get_default_custom_config_dict")
    mapping = known()["observed_to_quantized_custom_module_class"] if known is not None else {}
    return {"observed_to_quantized_custom_module_class": {"static": mapping}}


@functools.cache
def quantizable() -> frozenset[Any]:
    """What prepare_fx observes the output of: the single ops of torch's own backend config."""
    config = resolve("torch.ao.quantization.backend_config.get_native_backend_config")
    entries = config().configs if config is not None else ()
    return frozenset(e.pattern for e in entries if not isinstance(e.pattern, tuple))


# ----------------------------------------------------------------------- Inductor


def inductor_counts() -> Mapping[str, int]:
    """What Inductor's patterns lowered in this process, by its own names; {} where unknown."""
    counters: Any = resolve("torch._dynamo.utils.counters")
    found: Mapping[str, int] = {} if counters is None else counters["inductor"]
    return found


@contextmanager
def inductor_freezing() -> Iterator[None]:
    """Weights frozen into what is compiled, for as long as the context."""
    config: Any = resolve("torch._inductor.config")
    with config.patch(freezing=True):
        yield


def no_compiler_error() -> type[BaseException] | None:
    """What Inductor raises without a C++ compiler; None where this torch has another name."""
    found: type[BaseException] | None = resolve("torch._inductor.exc.InvalidCxxCompiler")
    return found

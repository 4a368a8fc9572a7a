"""What the user's process has switched on: off while fxqfix computes, and put back behind it.

Autocast, reduced precision of float32 products (TF32, bfloat16), the default dtype and the default
device change what tensor ops compute; what int8 kernels compute, none of them changes.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

from fxqfix._torch import set_flag

__all__ = [
    "as_given",
    "default_cpu",
    "direct_sums",
    "entry",
    "exact",
    "read_as_given",
    "tensor_float32",
]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_DEVICES = ("cpu", "cuda")
_FULL = ("none", "ieee")  # float32 in full; "none" where nobody has set anything


class _State(threading.local):
    """Per thread: the user's own settings, for as long as fxqfix computes."""

    inside = False
    device: torch.device | None = None  # the default one, where it is not the CPU
    dtype = torch.float32
    autocast: tuple[tuple[str, torch.dtype], ...] = ()


_STATE = _State()


def entry(function: Callable[P, R]) -> Callable[P, R]:
    """Make a public function insensitive to what the user has switched on.

    Example:
        >>> @entry
        ... def product() -> torch.dtype:
        ...     return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     product()
        torch.float32
    """

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        if _STATE.inside:
            return function(*args, **kwargs)
        with _own():
            return function(*args, **kwargs)

    return inside


def exact(function: Callable[P, R]) -> Callable[P, R]:
    """The same for what a module computes: its tensors name their devices, so that one stays."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        if _STATE.inside or torch.compiler.is_compiling() or _is_plain():
            return function(*args, **kwargs)
        with _full_float32(), _no_autocast(), _default_dtype(torch.float32):
            return function(*args, **kwargs)

    return inside


@contextmanager
def _own() -> Iterator[None]:
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    cast = tuple(
        (kind, torch.get_autocast_dtype(kind))
        for kind in _DEVICES
        if torch.is_autocast_enabled(kind)
    )
    with ExitStack() as stack:
        stack.enter_context(_full_float32())
        stack.enter_context(_no_autocast())
        stack.enter_context(_default_dtype(torch.float32))
        stack.enter_context(default_cpu())
        _STATE.inside, _STATE.dtype, _STATE.autocast = True, dtype, cast
        _STATE.device = device if device.type != "cpu" else None
        try:
            yield
        finally:
            _STATE.inside = False


@contextmanager
def as_given(*, model: bool = False) -> Iterator[None]:
    """The user's own settings, while fxqfix runs code of theirs.

    Args:
        model: Whether it is a model's forward: it makes its tensors on the user's default device,
            but autocast and the default dtype stay off.
    """
    state = _STATE
    if not state.inside or (model and state.device is None):
        yield
        return
    with ExitStack() as stack:
        if state.device is not None:
            stack.enter_context(state.device)
        if not model:
            stack.enter_context(_default_dtype(state.dtype))
            for kind, dtype in state.autocast:
                stack.enter_context(torch.autocast(kind, dtype))
        yield


def read_as_given(data: Iterable[T]) -> Iterator[T]:
    """The batches of the user's data, each made under the user's own settings."""
    with as_given():
        batches = iter(data)
    while True:
        with as_given():
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield batch


@contextmanager
def default_cpu() -> Iterator[None]:
    """What names no device is made on the CPU."""
    if torch.get_default_device().type == "cpu":
        yield
        return
    with torch.device("cpu"):
        yield


@contextmanager
def direct_sums() -> Iterator[None]:
    """Convolutions as sums of products: no Winograd and no FFT, which cuDNN and NNPACK may pick."""
    cudnn = torch.backends.cudnn
    enabled = bool(cudnn.enabled)
    # Not cudnn.flags: it reads switches that torch refuses to read where old and new ones mix.
    set_flag(cudnn, "enabled", False)
    try:
        with torch.backends.nnpack.flags(enabled=False):
            yield
    finally:
        set_flag(cudnn, "enabled", enabled)


@contextmanager
def tensor_float32() -> Iterator[None]:
    """Products of float32 on a GPU in TF32, whatever is switched on."""
    backends = torch.backends
    places: list[Any] = [getattr(backends.cudnn, "conv", None), backends.cuda.matmul]
    name, wanted = "fp32_precision", "tf32"
    if not all(_has(place, name) for place in places):  # torch before 2.9
        places, name = [backends.cudnn, backends.cuda.matmul], "allow_tf32"
    before = []
    for place in places:
        value = getattr(place, name)
        if name == "fp32_precision":
            set_flag(place, "fp32_precision", "none")
            value = "none" if place.fp32_precision == value else value  # from the general switch
        before.append(value)
        set_flag(place, name, wanted if name == "fp32_precision" else True)
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            set_flag(place, name, value)


@contextmanager
def _no_autocast() -> Iterator[None]:
    on = [kind for kind in _DEVICES if torch.is_autocast_enabled(kind)]
    if not on:
        yield
        return
    with ExitStack() as stack:
        for kind in on:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    if before == dtype:
        yield
        return
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _is_plain() -> bool:
    """Whether there is nothing to switch off: asked for every op of an emulated model."""
    return (
        torch.get_default_dtype() == torch.float32
        and not any(torch.is_autocast_enabled(kind) for kind in _DEVICES)
        and _matmul_precision() == "highest"
        and not any(_reduced(place, name) for place, name, _ in _switches(_cuda_runs()))
    )


def _cuda_runs() -> bool:
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch's own
    return started


def _reduced(place: Any, name: str) -> bool:
    return getattr(place, name) not in (*_FULL, False)


@functools.cache
def _switches(cuda: bool) -> tuple[tuple[Any, str, Any], ...]:
    """Where torch keeps the precision of float32 products: holder, attribute, value in full."""
    backends = torch.backends
    own = [backends.cudnn] if cuda else []
    leaves = [(place, name) for place in own for name in ("conv", "rnn")]
    leaves += [(backends.cuda, "matmul")] if cuda else []
    leaves += [(backends.mkldnn, name) for name in ("matmul", "conv", "rnn")]
    found = [getattr(place, name, None) for place, name in leaves]
    if all(_has(leaf, "fp32_precision") for leaf in found):
        return tuple((leaf, "fp32_precision", "ieee") for leaf in found)
    places = [p for p in (*own, backends.mkldnn) if _has(p, "allow_tf32")]  # torch before 2.9
    return tuple((place, "allow_tf32", False) for place in places)


def _has(place: Any, name: str) -> bool:
    try:
        return getattr(place, name, None) is not None
    except (AttributeError, RuntimeError, AssertionError):
        return False


def _matmul_precision() -> str:
    """The older switch; torch raises where it contradicts the newer ones, which then decide."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest"


@contextmanager
def _full_float32() -> Iterator[None]:
    """Products of float32 in float32, by the older switches and by the newer ones."""
    precision = _matmul_precision()
    rows = _switches(_cuda_runs() or precision != "highest")
    before = [getattr(place, name) for place, name, _ in rows]
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
    inherited = [_fill(*row) for row in rows]
    try:
        yield
    finally:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)
        for (place, name, _), value, own in zip(rows, before, inherited, strict=True):
            if own is not None or getattr(place, name) != value:
                set_flag(place, name, own or value)


def _fill(place: Any, name: str, full: Any) -> Any:
    """Set a switch to full precision; what it has to become again, or None where it stays."""
    if not _reduced(place, name):
        return None
    value = getattr(place, name)
    own = value
    if name == "fp32_precision":
        set_flag(place, "fp32_precision", "none")
        own = "none" if place.fp32_precision == value else value  # from the general switch
    set_flag(place, name, full)
    return own

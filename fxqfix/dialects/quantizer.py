"""Read one observer or fake-quant: what its forward uses, and what conversion would bake."""

from __future__ import annotations

import hashlib
import math
import re
from array import array
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxqfix import _pt2e, _torch
from fxqfix._observers import Answers, fused_qparams, light_copy
from fxqfix.errors import NonFiniteError
from fxqfix.qparams import QParams, container_range

__all__ = [
    "LEAVES_FLOAT",
    "QuantizerState",
    "buffers_of",
    "observing",
    "qparams_of",
    "read_quantizer",
]


# How the source of a site begins whose observer declares float32: nothing becomes quantized there.
LEAVES_FLOAT = "placeholder for torch.float32"

_PER_CHANNEL = {
    torch.per_channel_affine,
    torch.per_channel_symmetric,
    torch.per_channel_affine_float_qparams,
}


@dataclass(frozen=True)
class QuantizerState:
    """What an observer or fake-quant holds.

    Attributes:
        used: The qparams that its forward uses, held at its present state; for an observer, which
            does not quantize, those that conversion would bake. None for dynamic and float16.
        baked: What `calculate_qparams` tells conversion.
        source: Where `used` was read.
        quantizes: Whether the forward quantizes.
        calibrated: Whether it ever saw data.
        observing: Whether a forward would still move its range.
    """

    used: QParams | None
    baked: QParams | None
    source: str
    quantizes: bool
    calibrated: bool
    observing: bool


def qparams_of(
    scale: Tensor | float,
    zero_point: Tensor | float,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    axis: int | None = None,
) -> QParams:
    """Build QParams from tensors or numbers; one entry per channel where `axis` is given."""
    # A scale that a graph holds as a number is a double, and kernels keep it as one.
    scales = _numbers(scale)
    points = _numbers(zero_point)
    if not isinstance(scale, Tensor) or not scale.is_floating_point():
        scales = list(map(float, scales))
    if not isinstance(zero_point, Tensor) or zero_point.is_floating_point():
        points = list(map(_integral, points))
    if axis is None:
        return QParams(scales[0], points[0], quant_min, quant_max, dtype)
    return QParams(tuple(scales), tuple(points), quant_min, quant_max, dtype, axis)


def _numbers(value: Tensor | float) -> list[float]:
    return value.reshape(-1).tolist() if isinstance(value, Tensor) else [value]


def _integral(value: float) -> float:
    return int(value) if isinstance(value, int) or value.is_integer() else value


def read_quantizer(
    module: nn.Module, path: str = "", known: Answers | None = None
) -> QuantizerState:
    """Read an observer or fake-quant of torch.ao or torchao without changing it.

    Args:
        module: The observer or fake-quant; a copy of it is asked.
        path: Where it stands in the model, for messages.
        known: What `calculate_qparams` returns, where it was asked already.

    Returns:
        Its state; see `QuantizerState`.

    Raises:
        NonFiniteError: It holds a scale or zero point that is not finite and positive.
    """
    kind = type(module).__name__
    try:
        # calculate_qparams may write to the module
        return _read(light_copy(module), kind, (known or {}).get(id(module)))
    except NonFiniteError as error:
        raise NonFiniteError(
            f"the qparams of this {kind} are not finite and positive",
            where=path or kind,
            found=error.found,
            expected=error.expected,
            remedy=error.remedy,
        ) from error


def _read(module: nn.Module, kind: str, calculated: tuple[Tensor, Tensor] | None) -> QuantizerState:
    dtype: Any = getattr(module, "dtype", None)
    if _torch.is_placeholder(module) or _torch.is_dynamic(module):
        what = "dynamic" if _torch.is_dynamic(module) else f"placeholder for {dtype}"
        return QuantizerState(None, None, f"{what} ({kind})", False, True, False)
    if dtype is not None and (dtype.is_floating_point or dtype.is_complex):
        source = f"floats of {dtype} ({kind}), no integers"
        return QuantizerState(None, None, source, False, True, False)
    if _pt2e.is_blockwise(module):
        source = f"grids by block, group or token ({kind}), which are no QParams"
        return QuantizerState(None, None, source, False, True, False)
    calibrated = _calibrated(module)
    if not calibrated and getattr(module, "scale", "") is None:  # torchao's learnable, never run
        return QuantizerState(None, None, f"never run ({kind})", False, False, True)
    try:
        answer = calculated or _calculate(module)
        if isinstance(answer, str):
            return QuantizerState(None, None, f"{answer} ({kind})", False, True, False)
        baked = _qparams(module, *answer)
    except NonFiniteError:
        if calibrated:
            raise
        # Per channel, resized by a run with the observer off: torch can't calculate from that.
        return QuantizerState(None, None, f"never saw data ({kind})", False, False, False)
    if not _torch.is_fake_quant(module):
        return QuantizerState(baked, baked, f"observer ({kind})", False, calibrated, True)
    learnable, moving = _torch.is_learnable_fake_quant(module), observing(module)
    if not moving and not _torch.is_fused_fake_quant(module):
        calibrated = calibrated or _was_set(module)
    if not _flag(module, "fake_quant_enabled"):
        source = f"observer (the fake-quant of {kind} is switched off)"
        return QuantizerState(baked, baked, source, False, calibrated, moving)
    used, source = baked, f"calculate_qparams ({kind})"
    if _torch.is_fused_fake_quant(module) and (calibrated or _runs_uncalibrated(module)):
        used, source = _qparams(module, *fused_qparams(module)), f"fused kernel ({kind})"
    elif learnable:
        used, source = _learned(baked, module), f"parameters ({kind})"
    elif not moving and _has_buffers(module):
        used, source = _qparams(module, module.scale, module.zero_point), f"buffers ({kind})"
    return QuantizerState(used, baked, source, True, calibrated, moving)


def observing(module: nn.Module) -> bool:
    """Whether a fake-quant's forward would still move its range."""
    # torch.ao's learnable fake-quant has a switch of its own, torchao's has not.
    switch = "static_enabled" if hasattr(module, "static_enabled") else "observer_enabled"
    return bool(_flag(module, switch)) and not _is_fixed(module)


# What histogram observers answered, by all that the answer depends on: torch searches for tens of
# milliseconds, and a model is read several times. Cleared when full; the entries are two numbers.
_Answer = tuple[Tensor, Tensor] | str  # what it says in place of qparams
_ANSWERS: dict[bytes, _Answer] = {}
_MOST = 4096


def _calculate(module: nn.Module) -> _Answer:
    """What the module tells conversion; torch's search of a histogram is made once."""
    own = _torch.resolve("torch.ao.quantization.HistogramObserver")
    if type(module) not in (own, *_torch.torchao_bases("HistogramObserver")):
        return _ask(module)
    held = hashlib.blake2b(type(module).__module__.encode())
    for name, value in sorted(vars(module).items()):
        if not name.startswith("_"):  # the rest is nn.Module's own, but for the buffers
            held.update(f"{name}={value!r};".encode())
    for name, buffer in module.named_buffers():
        held.update(f"{name} {buffer.device} {buffer.dtype} {tuple(buffer.shape)}".encode())
        held.update(array("d", buffer.reshape(-1).tolist()).tobytes())
    key = held.digest()
    if key not in _ANSWERS:
        if len(_ANSWERS) >= _MOST:
            _ANSWERS.clear()
        _ANSWERS[key] = _ask(module)
    return _ANSWERS[key]


_CHANNELS = re.compile(r"tensor\(\[.*?\].*?\)", re.DOTALL)  # torch 2.6 prints every one


def _ask(module: nn.Module) -> _Answer:
    """What the module tells conversion; torch asserts that its range is one.

    An observer of the user's own may have nothing to tell (recorders, placeholders).
    """
    try:
        with torch.no_grad(), _torch.quiet():
            answer: Any = module.calculate_qparams()  # type: ignore[operator]  # untyped module
    except AssertionError as error:
        raise NonFiniteError(
            "the observed range is none",
            found=_CHANNELS.sub("of all channels", str(error)),
            expected="min <= max, both finite",
            remedy="reset the observer, observer.reset_min_max_vals(), and calibrate it on finite "
            "data",
        ) from error
    except Exception as error:  # whatever a class of the user's raises
        return f"calculate_qparams raises {type(error).__name__}: {error}"
    if not isinstance(answer, tuple | list) or len(answer) < 2 or answer[0] is None:
        return f"calculate_qparams gives {type(answer).__name__}, no scale and zero point"
    return answer[0], answer[1]


def _learned(baked: QParams, module: nn.Module) -> QParams:
    """A learnable fake-quant's forward sets the zero point of symmetric schemes to zero."""
    symmetric = (torch.per_tensor_symmetric, torch.per_channel_symmetric)
    if getattr(module, "qscheme", None) not in symmetric:
        return baked
    return replace(
        baked, zero_point=tuple(0 for _ in baked.scales) if baked.axis is not None else 0
    )


def buffers_of(module: nn.Module) -> QParams | None:
    """What a fake-quant's scale and zero_point hold, whoever wrote them; None where they can't.

    Args:
        module: An observer or fake-quant of torch.ao or torchao; it is only read.
    """
    if not _has_buffers(module):
        return None
    try:
        return _qparams(module, module.scale, module.zero_point)
    except NonFiniteError:  # never written: nobody can have copied it
        return None


def _runs_uncalibrated(module: nn.Module) -> bool:
    """Whether the kernel is going to quantize with a range that it never observed."""
    observer: Any = module.activation_post_process
    return not observing(module) and observer.min_val.numel() == 1


def _was_set(module: nn.Module) -> bool:
    """Whether qparams were given without an observer: loaded, learned or written by hand."""
    scale, point = getattr(module, "scale", None), getattr(module, "zero_point", None)
    if not isinstance(scale, Tensor) or not isinstance(point, Tensor):
        return False
    return bool((scale != 1).any() or (point != 0).any())


def _has_buffers(module: nn.Module) -> bool:
    return isinstance(getattr(module, "scale", None), Tensor)


def _is_fixed(module: nn.Module) -> bool:
    observer = getattr(module, "activation_post_process", None)
    return observer is None or type(observer).__name__ == "FixedQParamsObserver"


def _flag(module: nn.Module, name: str) -> int:
    value = getattr(module, name, None)
    if not isinstance(value, Tensor):
        return 1
    return int(value if value.numel() == 1 else value.reshape(-1)[0])


def _calibrated(module: nn.Module) -> bool:
    observer = getattr(module, "activation_post_process", module)
    low, high = getattr(observer, "min_val", None), getattr(observer, "max_val", None)
    if not isinstance(low, Tensor) or not isinstance(high, Tensor):
        return True  # nothing to observe: fixed or frozen qparams
    if low.numel() == 0 or high.numel() == 0:
        return False
    never: bool = low.min().item() == math.inf and high.max().item() == -math.inf
    return not never


def _qparams(module: nn.Module, scale: Any, zero_point: Any) -> QParams:
    observer: Any = getattr(module, "activation_post_process", module)
    own = _torch.is_learnable_fake_quant(module) or not hasattr(observer, "quant_min")
    holder: Any = module if own else observer
    axis = None
    scheme = getattr(module, "qscheme", None)
    if scheme in _PER_CHANNEL:
        axis = int(getattr(module, "ch_axis", 0))
    dtype: Any = module.dtype
    low, high = getattr(holder, "quant_min", None), getattr(holder, "quant_max", None)
    if low is None or high is None:  # conversion takes the dtype's, too
        low, high = container_range(dtype)
    return qparams_of(scale, zero_point, int(low), int(high), dtype, axis)

"""Integer weights, whichever way a module or an op holds them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxqfix import _torch, ops
from fxqfix._observers import Answers, light_copy
from fxqfix._rng import same_rng
from fxqfix.dialects.quantizer import QuantizerState, qparams_of, read_quantizer
from fxqfix.errors import NonFiniteError, UnsupportedError
from fxqfix.inserted import FloatIsland
from fxqfix.qparams import QParams, container_range, quantize

__all__ = [
    "WeightView",
    "batch_norm_factor",
    "effective_weight",
    "folded_parameters",
    "holder",
    "int8_weight",
    "packed_weight",
    "prepared_weight",
    "reference_weight",
    "tensor_weight",
    "weight_quantizer",
    "weight_state",
]


@dataclass(frozen=True)
class WeightView:
    """Integer codes of a weight and what stands around them.

    Attributes:
        codes: The integer codes.
        qparams: Their grid.
        bias: The float bias, None without one.
        values: The float values that were quantized, where the model still holds them.
        folded: Whether a BatchNorm, in eval mode, is folded into the values.
        garbled: Whether its engine packs it so that it can't be unpacked: these are no codes of it,
            and other ones each time.
    """

    codes: Tensor
    qparams: QParams
    bias: Tensor | None = None
    values: Tensor | None = None
    folded: bool = False
    garbled: bool = False

    def checked(self, where: str) -> WeightView:
        """The view itself.

        Args:
            where: Who needs the codes, for messages.

        Raises:
            UnsupportedError: The codes are none of the weight's.
        """
        if not self.garbled:
            return self
        raise UnsupportedError(
            "torch can't unpack this weight: what it gives back are not the codes that it packed",
            where=where,
            found=f"a weight of {'x'.join(map(str, self.codes.shape))}, packed by fbgemm for its "
            "kernel for small transposed convolutions",
            remedy="take the prepared model, or what fxqfix.to_int8 makes of it",
        )

    def to(self, device: torch.device) -> WeightView:
        """The same on another device."""
        bias, values = (None if t is None else t.to(device) for t in (self.bias, self.values))
        return replace(self, codes=self.codes.to(device), bias=bias, values=values)


def batch_norm_factor(module: nn.Module) -> Tensor | None:
    """Gamma / sqrt(running_var + eps) of a QAT conv-BN or linear-BN module, else None.

    Written as torch's QAT modules compute it, so that the folded weight has the very bits that the
    weight's fake-quant saw.
    """
    with torch.no_grad():
        return _factor(module)


def _factor(module: nn.Module) -> Tensor | None:
    bn: Any = getattr(module, "bn", None)
    if not isinstance(bn, _torch.BATCH_NORM):
        return None
    factor: Tensor = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    return factor


def folded_parameters(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a prepared module, its BatchNorm folded in; gradients reach all of it.

    Args:
        module: A module with a weight.

    Returns:
        The weight that its fake-quant sees. The bias, where there is a BatchNorm
        ``(b - mean) * gamma / std + beta``, summed in float64 and rounded once; None without one.
    """
    inner, factor = holder(module), _factor(module)
    weight, bias = inner.weight, getattr(inner, "bias", None)
    if factor is None:
        return weight, bias
    bn: Any = module.bn
    bias = torch.zeros_like(bn.running_mean) if bias is None else bias
    centred = bias.double() - bn.running_mean.double()
    shifted = (centred * factor.double() + bn.bias.double()).to(bias.dtype)
    return _scaled(weight, factor), shifted


def effective_weight(module: nn.Module) -> Tensor:
    """The float weight that the weight's fake-quant sees: scaled by BatchNorm in conv-BN."""
    return _scaled(holder(module).weight.detach(), batch_norm_factor(module))


def _scaled(weight: Tensor, factor: Tensor | None) -> Tensor:
    if factor is None:
        return weight
    return weight * factor.reshape([-1] + [1] * (weight.dim() - 1))


def holder(module: nn.Module) -> Any:
    """The module that holds the weight: the module itself, or the first part of a fused one."""
    module = module.inner if isinstance(module, FloatIsland) else module
    wrapped = isinstance(module, nn.Sequential) and not hasattr(module, "weight")
    return module[0] if wrapped else module  # type: ignore[index]  # narrowed by wrapped


def weight_quantizer(module: nn.Module) -> nn.Module | None:
    """The fake-quant of a QAT module's weight, or a new observer that has seen a PTQ weight.

    Returns:
        None where the module's weight is not going to be quantized to integers; a normalization's
        weight stays float, whatever qconfig the module has.
    """
    own = getattr(module, "weight_fake_quant", None)
    if isinstance(own, nn.Module):
        return own if _torch.is_quantizer(own) else None
    found_row = ops.match(type(module))
    if found_row is None or found_row.spec.family not in ("weighted", "embedding"):
        return None
    inner = holder(module)
    qconfig: Any = getattr(module, "qconfig", None) or getattr(inner, "qconfig", None)
    if qconfig is None or not isinstance(getattr(inner, "weight", None), Tensor):
        return None
    found: nn.Module = qconfig.weight()
    if _torch.is_placeholder(found):  # float16 and float weights
        return None
    weight = effective_weight(module)
    with torch.no_grad(), _torch.quiet():
        found.to(weight.device)(weight)
    return found


def prepared_weight(
    module: nn.Module, path: str = "", *, settled: bool = True, known: Answers | None = None
) -> tuple[QuantizerState, Callable[[], WeightView]] | None:
    """State and codes of a prepared module's weight; None where it stays float.

    Args:
        module: The module that holds the weight.
        path: Where it stands in the model, for messages.
        settled: Whether an observer that is on is shown the folded weight, as conversion does.
        known: What observers have been asked already.
    """
    quantizer = weight_quantizer(module)
    if quantizer is None:
        return None
    state = weight_state(module, quantizer, path, known)
    used = state.used
    if used is None and state.calibrated:  # dynamic, or float16
        return None
    if used is not None and settled and state.observing and hasattr(module, "weight_fake_quant"):
        state = replace(state, baked=_baked(module, quantizer, path))

    def view() -> WeightView:
        assert used is not None  # a site without qparams has no codes to ask for
        inner, factor = holder(module), batch_norm_factor(module)
        values = _scaled(inner.weight.detach(), factor)
        folded = factor is not None and not module.training
        bias = getattr(inner, "bias", None)
        return WeightView(quantize(values, used), used, bias, values, folded)

    return state, view


def weight_state(
    module: nn.Module, quantizer: nn.Module, path: str = "", known: Answers | None = None
) -> QuantizerState:
    """The state of a weight's quantizer, which `weight_quantizer` has found or made.

    QAT has no modules for some ops (transposed convolutions): their forward runs on the float
    weight, and conversion makes a fake-quant only to ask it for qparams.
    """
    state = read_quantizer(quantizer, path, known)
    if state.quantizes and state.observing and not hasattr(module, "weight_fake_quant"):
        source = f"observer ({type(quantizer).__name__}, made at conversion)"
        return replace(state, used=state.baked, source=source, quantizes=False)
    return state


def _baked(module: nn.Module, quantizer: nn.Module, path: str) -> QParams | None:
    """What conversion bakes: with the observer on, it shows it the folded weight once more."""
    moved, weight = light_copy(quantizer), _torch.converted_weight(module)
    if not bool(torch.isfinite(weight).all()):  # torch's kernels speak of their zero point
        raise NonFiniteError(
            "the weight holds NaN or inf",
            where=path,
            found=f"{int((~torch.isfinite(weight)).sum())} of {weight.numel()} values",
            expected="finite weights",
            remedy="go back to a checkpoint from before training diverged",
        )
    with torch.no_grad(), _torch.quiet():
        moved(weight)
    return read_quantizer(moved, path).baked


def tensor_weight(weight: Tensor, bias: Tensor | None = None) -> WeightView:
    """Codes and qparams of a quantized tensor (torch.quantize_per_*)."""
    low, high = container_range(weight.dtype)
    if weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        qparams = qparams_of(weight.q_scale(), weight.q_zero_point(), low, high, weight.dtype)
    else:
        qparams = qparams_of(
            weight.q_per_channel_scales(),
            weight.q_per_channel_zero_points(),
            low,
            high,
            weight.dtype,
            weight.q_per_channel_axis(),
        )
    # Kernels hand their weights back channels-last; a float convolution would follow that layout,
    # and sums behind it would round differently. A copy, since a 1x1 kernel counts as contiguous
    # whatever its strides are.
    codes = _codes(weight).clone(memory_format=torch.contiguous_format)
    return WeightView(codes, qparams, bias)


def _codes(weight: Tensor) -> Tensor:
    """The integer codes; of several in a byte, the first one stands in the lowest bits."""
    if weight.dtype != torch.quint4x2:
        return weight.int_repr()
    pairs = weight.int_repr().reshape(-1)
    codes = torch.stack([pairs & 15, pairs >> 4], dim=1)
    return codes.reshape(-1)[: weight.numel()].reshape(weight.shape)


def int8_weight(module: nn.Module) -> WeightView | None:
    """Weight of a torch.ao.nn.quantized (dynamic) module or a float island; None without one."""
    if isinstance(module, FloatIsland):
        inner, qparams = holder(module), module.weight_qparams
        if qparams is None:
            return None
        values = inner.weight.detach()
        return WeightView(quantize(values, qparams), qparams, getattr(inner, "bias", None), values)
    getter, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not callable(getter) or isinstance(getter, Tensor):
        return None
    weight = _unpacked(getter)
    if not isinstance(weight, Tensor) or not weight.is_quantized:
        return None
    value = bias() if callable(bias) and not isinstance(bias, Tensor) else None
    view = tensor_weight(weight, value)
    return replace(view, garbled=not _gives_back(getattr(module, "_packed_params", None)))


def _unpacked(getter: Callable[[], Any]) -> Any:
    """What a packed weight gives back.

    Raises:
        UnsupportedError: Its engine packs, but can't unpack (qnnpack, conv_transpose3d).
    """
    try:
        return getter()
    except RuntimeError as error:
        raise UnsupportedError(f"torch can't read this packed weight: {error}") from error


def _gives_back(packed: Any) -> bool:
    """Whether a packed weight can be unpacked to what it was packed from.

    fbgemm packs some transposed convolutions in an order of their own, and unpacks what memory
    held. A known weight of the same sizes is packed and asked.
    """
    if (
        not _torch.is_packed_params(packed)
        or not hasattr(packed, "transpose")
        or not packed.transpose()
    ):
        return True
    engine = _torch.packed_engine(packed)
    if engine is None:
        return True
    names = ("stride", "padding", "output_padding", "dilation")
    options = tuple(tuple(getattr(packed, name)()) for name in names)
    return _packs_well(engine, tuple(packed.unpack()[0].shape), options, packed.groups())


@functools.cache
def _packs_well(
    engine: str, shape: tuple[int, ...], options: tuple[tuple[int, ...], ...], groups: int
) -> bool:
    codes = (torch.arange(math.prod(shape)) * 37 % 251 - 125).reshape(shape).float()
    weight = torch.quantize_per_tensor(codes, 1.0, 0, torch.qint8)
    with _torch.quiet(), same_rng(), _torch.quantized_engine(engine):
        prepack = getattr(torch.ops.quantized, f"conv_transpose{len(shape) - 2}d_prepack")
        packed = prepack(weight, None, *map(list, options), groups)
        for filled in range(0, 256, 85):  # memory that was packed from may hold the very codes
            before = [torch.full(shape, filled, dtype=torch.uint8) for _ in range(8)]
            del before
            if not torch.equal(packed.unpack()[0].int_repr(), weight.int_repr()):
                return False
    return True


def packed_weight(packed: Any) -> WeightView | None:
    """Weight of the opaque object that torch.ops.quantized.conv2d and the like take."""
    unpacked = _unpacked(packed.unpack)
    weight, bias = unpacked if isinstance(unpacked, tuple) else (unpacked, None)
    if not isinstance(weight, Tensor) or not weight.is_quantized:
        return None
    return replace(tensor_weight(weight, bias), garbled=not _gives_back(packed))


def reference_weight(module: nn.Module) -> WeightView | None:
    """Weight of a reference module; its range is the declared one where the module keeps it."""
    ref = holder(module)
    scheme = getattr(ref, "weight_qscheme", None)
    if scheme is None or ref.weight_dtype not in (torch.qint8, torch.quint8, torch.qint32):
        return None
    low, high = container_range(ref.weight_dtype)
    if getattr(ref, "weight_quant_min", None) is not None and ref.is_decomposed:
        low, high = ref.weight_quant_min, ref.weight_quant_max
    axis = None if scheme == torch.per_tensor_affine else int(ref.weight_axis)
    qparams = qparams_of(ref.weight_scale, ref.weight_zero_point, low, high, ref.weight_dtype, axis)
    with torch.no_grad():
        codes = ref.get_quantized_weight()
        bias = getattr(ref, "bias", None)  # embeddings have none
    return WeightView(codes.int_repr() if codes.is_quantized else codes, qparams, bias)

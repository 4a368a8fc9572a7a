"""Ops of a deployed model that read the parameters of the prepared one, whatever they are now."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxqfix.dialects.weights import folded_parameters, holder
from fxqfix.engines import Call, Present
from fxqfix.errors import UnsupportedError
from fxqfix.qparams import QParams, dequantize, quantize, unheld

__all__ = [
    "DROPOUTS",
    "Bare",
    "CodesDropout",
    "LiveArguments",
    "LiveClosed",
    "LiveConstant",
    "LiveModule",
    "LiveOp",
    "LiveParts",
    "LiveWeight",
    "Site",
    "parameters_of",
    "through",
]


DROPOUTS = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)


class LiveWeight:
    """The weight of a prepared op, as its fake-quant sees it, and its bias.

    Args:
        owner: The module that holds them; of a function the one that the graph reads them from.
        qparams: The weight's grid, which stays.
        names: Of a function, the attributes of weight and bias; None without one.
    """

    closed = False

    def __init__(
        self, owner: nn.Module, qparams: QParams, names: tuple[str, str | None] | None = None
    ) -> None:
        self.owner, self.qparams, self.names = owner, qparams, names

    def values(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, a BatchNorm folded in; gradients reach the parameters."""
        if self.names is None:
            return folded_parameters(self.owner)
        weight, bias = (None if n is None else attribute(self.owner, n) for n in self.names)
        assert weight is not None  # only a bias can be missing
        return weight, bias

    def codes(self) -> Tensor:
        """The codes that the weight's fake-quant gives, int32."""
        return quantize(self.values()[0], self.qparams)

    def of(self, call: Call) -> Call:
        """The call with these codes and this bias."""
        assert call.weight is not None  # only calls with a weight are given one
        with torch.no_grad():
            weight, bias = self.values()
            codes = quantize(weight, self.qparams)
        bias = None if bias is None else bias.detach()
        return replace(call, weight=replace(call.weight, codes=codes, bias=bias, values=None))

    def inside(self, path: str) -> Present | None:
        """A weight has no parts."""
        return None


class LiveModule:
    """The parameters and statistics of a prepared module whose int8 form keeps them in float.

    Args:
        source: The prepared module.
    """

    closed = False

    def __init__(self, source: nn.Module) -> None:
        self.source = source

    def of(self, call: Call) -> Call:
        """The call of a module with the tensors of the source, by name."""
        module: Any = call.module
        options = {k: v for k, v in vars(module).items() if not k.startswith("_")}
        own = {**module._parameters, **module._buffers}
        theirs = {**self.source._parameters, **self.source._buffers}
        now = {k: theirs.get(k, v) for k, v in own.items()}
        tensors = {k: v if v is None else v.detach() for k, v in now.items()}
        held: Any = types.SimpleNamespace(**options, **tensors)
        return replace(call, module=held)

    def inside(self, path: str) -> Present | None:
        """It has no parts with a weight."""
        return None


class LiveArguments:
    """Float parameters that the graph hands to an op.

    Args:
        names: Argument -> the module that holds it, and its name there.
    """

    closed = False

    def __init__(self, names: Mapping[str, tuple[nn.Module, str]]) -> None:
        self.names = dict(names)

    def of(self, call: Call) -> Call:
        """The call with their values."""
        now = {k: attribute(*at).detach() for k, at in self.names.items()}
        return replace(call, arguments={**call.arguments, **now})

    def inside(self, path: str) -> Present | None:
        """A function has no parts."""
        return None


class LiveParts:
    """The weights inside a closed module (LSTM, attention).

    Args:
        source: The prepared module.
        weights: Path of a part -> its weight.
    """

    closed = True

    def __init__(self, source: nn.Module, weights: Mapping[str, LiveWeight]) -> None:
        self.source, self.weights = source, dict(weights)

    def of(self, call: Call) -> Call:
        """The call itself: its parts are asked."""
        return call

    def inside(self, path: str) -> LiveWeight | None:
        """Of a part."""
        return self.weights.get(path)


def parameters_of(present: Present) -> list[Tensor]:
    """The parameters that an op reads."""
    if isinstance(present, LiveWeight):
        if present.names is None:
            return list(present.owner.parameters())
        return [attribute(present.owner, n) for n in present.names if n is not None]
    if isinstance(present, LiveModule):
        return [p for p in present.source._parameters.values() if p is not None]
    if isinstance(present, LiveParts):
        return [p for live in present.weights.values() for p in parameters_of(live)]
    if isinstance(present, LiveArguments):
        return [attribute(*at) for at in present.names.values()]
    return []


def attribute(owner: nn.Module, path: str) -> Tensor:
    """A parameter or buffer by its path."""
    parent, _, name = path.rpartition(".")
    found = getattr(owner.get_submodule(parent), name)
    assert isinstance(found, Tensor)  # narrows: the callers have looked
    return found


class LiveConstant(nn.Module):
    """The codes of a parameter that the graph itself quantizes.

    Args:
        live: The parameter.
    """

    def __init__(self, live: LiveWeight) -> None:
        super().__init__()
        self.live = live

    def forward(self, *_: Tensor) -> Tensor:
        """Codes, as the parameter's fake-quant gives them."""
        return self.live.codes().to(self.live.qparams.storage)


class CodesDropout(nn.Module):
    """Dropout on codes: the kernels' own never drop anything, training does.

    Args:
        drop: The prepared model's module, whose mode counts.
        source: The grid of what comes in.
        grid: The grid of what goes out; what is scaled up beyond its range stays at its limit.
    """

    def __init__(self, drop: nn.Module, source: QParams, grid: QParams) -> None:
        super().__init__()
        self.drop, self.source, self.grid = drop, source, grid

    def forward(self, codes: Tensor) -> Tensor:
        """Codes in, codes out."""
        if not self.drop.training:
            return codes
        values = self.drop(dequantize(codes, self.source))
        return quantize(values, self.grid).to(self.grid.storage)


class LiveOp(nn.Module):
    """An op with a weight in its float form, run on the parameters of the moment.

    Args:
        template: A module of the op without BatchNorm; its own parameters are not used.
        live: What is.
        quantizer: The weight's frozen fake-quant.
    """

    def __init__(self, template: nn.Module, live: LiveWeight, quantizer: Any) -> None:
        super().__init__()
        self.template, self.live, self.quantizer = template, live, quantizer
        inner = holder(template)
        self.place = "0." if inner is not template else ""
        for name, value in list(inner._parameters.items()):  # its shape alone is left
            if value is not None:
                inner._parameters[name] = nn.Parameter(value.detach().new_empty(0), False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The op."""
        weight, bias = self.live.values()
        given = {f"{self.place}weight": self.quantizer.quantized(weight)}
        if bias is not None:
            given[f"{self.place}bias"] = bias
        return torch.func.functional_call(self.template, given, args, kwargs)


class Bare(nn.Module):
    """A module without the hooks by which eager models observe: its graph shows those calls.

    Args:
        inner: The module.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Its forward."""
        return self.inner.forward(*args, **kwargs)


class LiveClosed(nn.Module):
    """A closed module of which parts have weights that no fake-quant of their own quantizes.

    Args:
        inner: The prepared module.
        quantizers: Path of a part -> the fake-quant of its weight.
    """

    def __init__(self, inner: nn.Module, quantizers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.bare, self.names = Bare(inner), [f"inner.{path}.weight" for path in quantizers]
        self.quantizers = nn.ModuleList(quantizers.values())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module, on quantized weights."""
        given = {
            name: quantizer.quantized(attribute(self.bare, name))  # type: ignore[operator]  # frozen
            for name, quantizer in zip(self.names, self.quantizers, strict=True)
        }
        return torch.func.functional_call(self.bare, given, args, kwargs)


class _Through(torch.autograd.Function):
    """The engine's values, with the gradient of others; always a tensor of its own."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, wanted: Tensor) -> Tensor:
        return wanted.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _ThroughGrid(torch.autograd.Function):
    """The values of the engine's codes, with the gradient of a fake-quant: 0 outside its range."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, codes: Tensor, used: QParams, grid: QParams) -> Tensor:
        steps = unheld(value, used)
        ctx.save_for_backward((steps >= used.quant_min).logical_and_(steps <= used.quant_max))
        return dequantize(codes, grid)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None


def through(value: Tensor, wanted: Tensor, where: str) -> Tensor:
    """The engine's values, whose gradient goes to those of the float form.

    Args:
        value: Of the float form.
        wanted: The engine's values.
        where: For messages.

    Raises:
        UnsupportedError: They are of different shapes.
    """
    _check_shapes(value, wanted, where)
    make: Any = _Through.apply
    found: Tensor = make(value, wanted)
    return found


def _check_shapes(value: Tensor, wanted: Tensor, where: str) -> None:
    if value.shape != wanted.shape:
        raise UnsupportedError(
            "the prepared and the int8 model compute values of other shapes",
            where=where,
            found=f"{tuple(value.shape)} prepared, {tuple(wanted.shape)} int8",
            remedy="compare(prepared, None, data) shows where they part",
        )


class Site(nn.Module):
    """A fake-quant of the prepared model, whose value is the engine's.

    Its gradient is that of torch's fake-quantize of the value, which need not run for it.

    Args:
        used: The grid and the range of the fake-quant, which stay.
        grid: The grid of the engine's codes.
        name: The site's, for messages.
    """

    def __init__(self, used: QParams, grid: QParams, name: str) -> None:
        super().__init__()
        self.used, self.grid, self.name = used, grid, name

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """The values of the codes."""
        _check_shapes(x, codes, f"site {self.name!r}")
        if not x.requires_grad:
            return dequantize(codes, self.grid)
        make: Any = _ThroughGrid.apply
        found: Tensor = make(x, codes, self.used, self.grid)
        return found

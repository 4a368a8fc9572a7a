"""as_deployed: a module to train whose forward is the engine's integers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxqfix import _torch, dialects
from fxqfix._devices import device_of, on_cpu
from fxqfix._settings import entry
from fxqfix.dialects._finite import refuse_non_finite
from fxqfix.dialects._wrappers import refuse_code, unwrapped
from fxqfix.engines import ENGINES, Isa, isa_of, threads_of
from fxqfix.errors import DeviceError, OptionError, UnsupportedError
from fxqfix.flows.freeze import frozen_by
from fxqfix.flows.to_int8 import to_int8
from fxqfix.names import Engine, IsaName
from fxqfix.passes import FreezeQParams, chain
from fxqfix.passes._live import DROPOUTS, through
from fxqfix.passes._live_sources import Sources
from fxqfix.passes._redraw import draw_once
from fxqfix.passes._straight import integers, straight
from fxqfix.registry import check_name

__all__ = ["Deployed", "as_deployed"]

_WHERE = "as_deployed"


class Deployed(nn.Module):
    """What `as_deployed` returns: a module like any other, made of two graphs.

    The first computes the engine's integers, of the parameters as they are at each forward. The
    second, which runs only where gradients are wanted, is the frozen prepared model: its
    fake-quants give the gradients, and take the engine's values for their own.

    Args:
        prepared: The frozen prepared model.
        graphs: The two graphs.
        emulation: What the forward holds for.

    Attributes:
        prepared: The frozen prepared model, which holds the parameters. `fxqfix.to_int8` of it, or
            of the whole, computes what the forward does; so do `freeze`, `compare` and the rest.
        emulation: Engine, instruction set and threads that the forward holds for.

    Example:
        >>> import torch, fxqfix
        >>> from torch.ao.quantization import get_default_qat_qconfig_mapping
        >>> from torch.ao.quantization.quantize_fx import prepare_qat_fx
        >>> x = torch.linspace(-1, 1, 16).reshape(2, 8)
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 2)).train()
        >>> prepared = prepare_qat_fx(net, get_default_qat_qconfig_mapping("fbgemm"), (x,))
        >>> _ = prepared(x)
        >>> model = fxqfix.as_deployed(prepared, engine="fbgemm", isa="vnni", threads=1)
        >>> model.emulation["engine"], model.prepared.training
        ('fbgemm', False)
    """

    fxqfix_holds = "prepared"  # what other flows read of it

    def __init__(
        self,
        prepared: nn.Module,
        graphs: tuple[fx.GraphModule, fx.GraphModule],
        emulation: dict[str, Any],
    ) -> None:
        super().__init__()
        self.prepared, self.emulation = prepared, emulation
        self._graphs = graphs  # not registered: they hold the same parameters once more
        self._warned = False
        # On the inner model: it runs before anything is loaded, also by way of the outer one.
        grids = {name: b.clone() for name, b in _grids(prepared)}
        hooks: Any = prepared
        hooks.register_load_state_dict_pre_hook(partial(_check_grids, grids))
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the int8 model gives, codes as values, with the gradients of the fake-quants.

        Raises:
            DeviceError: An input is on another device than the parameters.
            UnsupportedError: An input is in half precision, or the engine can't run this size.
            NonFiniteError: A parameter has become NaN or inf.
        """
        self._check((args, kwargs))
        with self._no_autocast():
            wanted, codes = _integers(self.prepared, self._graphs[0], args, kwargs)
            if not torch.is_grad_enabled():
                return wanted
            return _joined(self._graphs[1](codes, *args, **kwargs), wanted)

    def train(self, mode: bool = True) -> Deployed:
        """Switch dropout on or off, and nothing else: statistics and grids stay.

        Args:
            mode: Whether dropout drops.
        """
        self.training = mode
        for module in self.prepared.modules():
            module.training = mode and isinstance(module, DROPOUTS)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Deployed:
        made = fn(torch.zeros((), dtype=torch.float32, device=device_of(self.prepared)))
        if made.dtype != torch.float32:
            raise UnsupportedError(
                f"a model is deployed from float32, not from {made.dtype}",
                where=_WHERE,
                remedy="move it without a dtype, model.to(device)",
            )
        held: Any = super()
        held._apply(fn, recurse)
        parts: Any = self._graphs
        for graph in parts:
            graph._apply(fn)
        return self

    def _check(self, inputs: Any) -> None:
        home = next((p.device for p in self.prepared.parameters()), None)
        given: list[Tensor] = []
        _torch.tree_map_tensors(given.append, inputs)
        for value in given:
            if home is not None and value.device != home:
                raise DeviceError(
                    "an input is on another device than the model",
                    where=_WHERE,
                    found=f"an input on {value.device}, parameters on {home}",
                    remedy=f"move the batch, x.to({str(home)!r}), or the model",
                )
            if value.is_floating_point() and value.dtype != torch.float32:
                raise UnsupportedError(
                    "the engine quantizes float32 inputs",
                    where=_WHERE,
                    found=f"an input of {value.dtype}",
                    remedy="pass x.float(); under autocast too, which is off inside",
                )

    @contextmanager
    def _no_autocast(self) -> Iterator[None]:
        kind = device_of(self.prepared).type
        try:
            on = torch.is_autocast_enabled(kind)
        except RuntimeError:  # a device that has none
            on = False
        if not on:
            yield
            return
        if not self._warned:
            self._warned = True
            message = "autocast is off inside a deployed model: it computes what its engine does"
            warnings.warn(message, stacklevel=4)
        with torch.autocast(kind, enabled=False):
            yield

    def extra_repr(self) -> str:
        """What the forward holds for."""
        return ", ".join(f"{name}={value}" for name, value in self.emulation.items())


def _run(model: nn.Module, graph: fx.GraphModule, args: Any, kwargs: Any) -> Any:
    refuse_non_finite(model, _WHERE)  # integers have no NaN: training would go on silently
    with torch.no_grad():
        return graph(*args, **kwargs)


_COMPILER: Any = torch.compiler
_integers = _COMPILER.disable(_run)  # kernels are built anew as weights move


def _grids(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    names = ("scale", "zero_point", "fake_quant_enabled")
    return ((n, b) for n, b in model.named_buffers() if n.rpartition(".")[2] in names)


def _check_grids(
    grids: dict[str, Tensor], _: nn.Module, state: Mapping[str, Any], prefix: str, *rest: Any
) -> None:
    """Grids are built in: a state_dict of other ones belongs to another model."""
    for name, before in grids.items():
        now = state.get(f"{prefix}{name}")
        if isinstance(now, Tensor) and not torch.equal(before, now.cpu().to(before.dtype)):
            raise OptionError(
                "this state_dict has other grids than the model that was deployed",
                where="load_state_dict",
                found=f"{name} = {now.flatten()[:3].tolist()}",
                expected=f"{before.flatten()[:3].tolist()}",
                remedy="load it into a prepared model, and call as_deployed on that",
            )


def _check_float32(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise UnsupportedError(
                f"a model is deployed from float32, not from {kind}",
                where=_WHERE,
                found=f"{name!r} in {kind}",
                remedy="pass a float32 copy, copy.deepcopy(model).float(); autocast is off inside",
            )


def _joined(found: Any, wanted: Any) -> Any:
    """The engine's outputs with the gradients of the others, nested as they are."""
    if isinstance(wanted, Tensor):
        return through(found, wanted, "output") if found.requires_grad else wanted
    if isinstance(wanted, dict):
        return type(wanted)({k: _joined(found[k], v) for k, v in wanted.items()})
    if isinstance(wanted, tuple | list):
        parts = [_joined(a, b) for a, b in zip(found, wanted, strict=True)]
        return type(wanted)(*parts) if hasattr(wanted, "_fields") else type(wanted)(parts)
    return wanted


@entry
def as_deployed(
    prepared: nn.Module,
    *,
    engine: Engine | None = None,
    isa: IsaName | Isa | None = None,
    threads: int | None = None,
    backend_config: Any = None,
) -> Deployed:
    """A trainable module whose forward is the int8 model's integers, to the bit.

    At every moment its outputs are those of ``to_int8(model, engine=...)`` of its present state,
    emulated. The gradient of each op is that of its fake-quant form at the engine's own values:
    straight through, zero outside of the range. Qparams are fixed to those that the prepared
    model's fake-quants use. BatchNorm uses its running statistics; gamma and beta are trained
    through the fold, which is redone at each forward. ``train()`` switches dropout, nothing else.

    Its parameters are new ones: make the optimizer afterwards, of ``model.parameters()``.

    Args:
        prepared: A prepared model after training or calibration, FX or eager. It is not changed.
        engine: "fbgemm", "x86", "onednn" or "qnnpack"; None is torch.backends.quantized.engine.
        isa: The instruction set of the kernels, as `emulate` takes it; None is what this process
            runs.
        threads: Number of threads that the kernels run on; None is torch.get_num_threads().
        backend_config: What it was prepared with; None is torch's own.

    Returns:
        A new module in eval mode, on the device of the prepared one.

    Raises:
        UnknownNameError: There is no such engine or isa.
        OptionError: `isa` or `threads` has a value that it can't have.
        DialectError: The model is not a prepared one, or was prepared by PT2E, which has no int8
            kernels.
        UncalibratedError, NonFiniteError: It never saw data; it holds NaN or inf.
        DeviceError: Its parts lie on several devices.
        UnsupportedError: An op has no exact arithmetic on this engine, a parameter can't be
            trained so, a BatchNorm can't be folded, a module has a hook, or it isn't float32.

    Example:
        >>> import torch, fxqfix
        >>> from torch.ao.quantization import get_default_qat_qconfig_mapping
        >>> from torch.ao.quantization.quantize_fx import prepare_qat_fx
        >>> x = torch.linspace(-1, 1, 16).reshape(2, 8)
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 2)).train()
        >>> prepared = prepare_qat_fx(net, get_default_qat_qconfig_mapping("fbgemm"), (x,))
        >>> _ = prepared(x)
        >>> model = as_deployed(prepared, engine="fbgemm")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model(x).square().sum().backward()
        >>> optimizer.step()
        >>> torch.equal(model(x), fxqfix.to_int8(model, engine="fbgemm")(x))
        True
    """
    chosen = check_name("engine", engine or torch.backends.quantized.engine, ENGINES, _WHERE)
    options = isa_of(isa, _WHERE), threads_of(threads, _WHERE)
    home = device_of(prepared, _WHERE)
    _check_float32(prepared)
    model = unwrapped(on_cpu(prepared, _WHERE))
    return _made(model, chosen, *options, backend_config).to(home)


def _made(
    model: nn.Module, engine: Engine, isa: Isa, threads: int, backend_config: Any
) -> Deployed:
    refuse_code(model, _WHERE)
    refuse_non_finite(model, _WHERE)
    own: nn.Module = chain(model, FreezeQParams()).graph_module.eval()
    frozen = dialects.read(frozen_by(own, quantized=True))
    with torch.no_grad(), _torch.quantized_engine(engine), _torch.quiet():
        converted = dialects.read(to_int8(own, engine=engine, backend_config=backend_config))
        sources = Sources(own, frozen, converted)
        integer, places = integers(sources, engine, isa, threads)
        graphs = integer, straight(sources, places)
        deployed = Deployed(own, graphs, dict(integer.meta["emulation"])).train()
        draw_once(*graphs)
    return deployed.eval()

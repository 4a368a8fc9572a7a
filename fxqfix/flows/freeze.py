"""freeze: the prepared model with the qparams that it really uses, fixed."""

from __future__ import annotations

from typing import TypeVar

from torch import fx, nn

from fxqfix import _pt2e, _torch
from fxqfix._devices import device_of
from fxqfix._settings import entry
from fxqfix.dialects import check_kind, check_tool, nothing_prepared, unwrapped
from fxqfix.dialects import prepared as fx_prepared
from fxqfix.dialects._code import keep_hooks
from fxqfix.dialects._wrappers import copied, held_graphs
from fxqfix.errors import DialectError, UnsupportedError
from fxqfix.passes import (
    ExplicitWrites,
    FoldBatchNorm,
    FreezeQParams,
    HoldWeights,
    Pass,
    SplitShared,
    chain,
)

__all__ = ["freeze", "freezing", "frozen_by"]

M = TypeVar("M", bound=nn.Module)


@entry
def freeze(prepared: M) -> M:
    """Fix every qparam to the one that the fake-quants really use, and fold BatchNorm.

    The result is a prepared model still: torch's own `convert_fx` / `convert` / `convert_pt2e`
    takes it and bakes exactly these qparams, and QAT can go on (gradients pass straight through).
    Its parameters are new ones: make a new optimizer, one that is at hand trains the old model. The
    grids do not follow weights that are trained on; `lint` finds those that leave them
    (`weight-saturated`).
    A calibrated (PTQ) model comes back with fake-quants in place of its observers, so that it
    computes what its conversion will. A module that an FX graph calls at several places gets a copy
    per call (tied parameters), because conversion would give all of them the last one's output
    scale. What reads a value after an op wrote over it in place reads that op's result by name, in
    an FX graph: conversion goes by dataflow.

    Args:
        prepared: What `prepare_fx`, `prepare_qat_fx` (FX), `prepare_pt2e`, `prepare_qat_pt2e`
            (PT2E) or `prepare`, `prepare_qat` (eager) returned, after training or calibration. It
            is not changed.

    Returns:
        A new model of the same kind: FX in, FX out; eager in, eager out.

    Raises:
        TraceError: This is no module, or a scripted one.
        DialectError: The model holds no observer and no fake-quant.
        UncalibratedError: An observer never saw data.
        NonFiniteError: An observer holds NaN or inf qparams.

    Example:
        >>> import torch
        >>> from torch.ao.quantization import default_qat_qconfig, prepare_qat
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)).train()
        >>> net.qconfig = default_qat_qconfig
        >>> prepared = prepare_qat(net)
        >>> _ = prepared(torch.ones(1, 1, 2, 2))
        >>> type(freeze(prepared)[0].activation_post_process).__name__
        'FrozenFakeQuantize'
    """
    check_kind(prepared, "freeze")
    device_of(prepared, "freeze")
    return frozen_by(prepared)


def frozen_by(prepared: M, *, quantized: bool = False) -> M:
    """The passes of `freezing`, run; each FX graph that a module holds gets those of its own.

    Args:
        prepared: What `freeze` is given.
        quantized: As for `freezing`.

    Example:
        >>> from torch.ao.quantization import FixedQParamsFakeQuantize, FixedQParamsObserver
        >>> fixed = FixedQParamsObserver.with_args(scale=0.5, zero_point=3)
        >>> print(frozen_by(nn.Sequential(FixedQParamsFakeQuantize(fixed)))[0])
        FrozenFakeQuantize(scale=0.5 zp=3 [0,255] quint8)
    """
    passes = freezing(prepared, quantized=quantized)
    model = unwrapped(prepared)
    held = held_graphs(model)
    if held:
        model = copied(model, "freeze", UnsupportedError)
    for path, inner in held:
        own = chain(inner, *freezing(inner, quantized=quantized)).graph_module
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, own)
    frozen: M = chain(model, *passes, owned=bool(held)).graph_module
    keep_hooks(model, frozen)
    return frozen


def freezing(prepared: nn.Module, *, quantized: bool = False) -> tuple[Pass, ...]:
    """The passes that `freeze` runs.

    Args:
        prepared: What `freeze` is given.
        quantized: Whether what reads behind an in-place op takes its fake-quantized result, which
            an int8 kernel can read, and not the float that training read.

    Raises:
        DialectError: The model holds no observer and no fake-quant.

    Example:
        >>> from torch.ao.quantization import FakeQuantize
        >>> freezing(nn.Sequential(FakeQuantize()))
        (FreezeQParams(uncalibrated=False), FoldBatchNorm(), HoldWeights())
    """
    check_kind(prepared, "freeze")
    prepared = unwrapped(prepared)
    if isinstance(prepared, nn.Module):
        check_tool(prepared, "freeze")
    if _pt2e.is_program(prepared):
        raise DialectError(
            "an ExportedProgram holds no observers",
            where="freeze",
            expected="a prepared model",
            remedy="pass what prepare_pt2e or prepare_qat_pt2e returned, before its conversion",
        )
    graph_module = prepared if isinstance(prepared, fx.GraphModule) else None
    found = any(_torch.is_quantizer(m) for m in prepared.modules())
    if not found and (graph_module is None or not fx_prepared.matches(graph_module)):
        raise nothing_prepared(prepared, "freeze")
    fx_prepared.refuse_equalized(prepared)
    passes = FreezeQParams(), FoldBatchNorm(), HoldWeights()
    if not isinstance(prepared, fx.GraphModule):
        return passes  # an eager module has one grid for all its calls, and its dataflow is code
    return (*passes, SplitShared(), ExplicitWrites(quantized=quantized))

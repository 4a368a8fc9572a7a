"""freeze: the prepared model with the qparams that it really uses, fixed."""

from __future__ import annotations

from typing import TypeVar

from torch import fx, nn

from fxqfix import _pt2e, _torch
from fxqfix._settings import entry
from fxqfix.dialects import check_kind
from fxqfix.errors import DialectError
from fxqfix.passes import (
    ExplicitWrites,
    FoldBatchNorm,
    FreezeQParams,
    HoldWeights,
    Pass,
    SplitShared,
    chain,
)

__all__ = ["freeze", "freezing"]

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
    frozen: M = chain(prepared, *freezing(prepared)).graph_module
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
    if _pt2e.is_program(prepared) or not any(_torch.is_quantizer(m) for m in prepared.modules()):
        raise DialectError(
            f"{type(prepared).__name__} holds no observer and no fake-quant",
            where="freeze",
            expected="a prepared model",
            remedy="pass the model that prepare_fx / prepare_qat_fx / prepare / prepare_qat "
            "/ prepare_pt2e / prepare_qat_pt2e returned, before its conversion; an ExportedProgram "
            "holds none",
        )
    passes = FreezeQParams(), FoldBatchNorm(), HoldWeights()
    if not isinstance(prepared, fx.GraphModule):
        return passes  # an eager module has one grid for all its calls, and its dataflow is code
    return (*passes, SplitShared(), ExplicitWrites(quantized=quantized))

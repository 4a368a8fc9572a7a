"""Routes "inductor" and "inductor:lowered": torch.compile with freezing, and torchao's lowering.

Both run oneDNN's int8 kernels, which Inductor's patterns find: freezing puts the weights into the
graph, where only those with a scale per channel fit. The certificate's kernels are Inductor's own
counters of "inductor", and the ops in the graph of "inductor:lowered". The range of a quantize that
goes into such a kernel is lost; a clamp before the quantize becomes part of the kernel. Clamps on
codes (`pin_ranges="codes"`) make Inductor of torch 2.13 fail at convolutions, and so does compiling
what torchao lowered.

The kernels take a weight's zero point for 0 (pass `float-weights` leaves such a weight float;
`certify` runs it on prepared models), and on CPUs without VNNI they saturate at 16 bits. The
lowered graph fails where a view reads what its convolutions return channels last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxqfix import _inductor
from fxqfix._reasons import innermost
from fxqfix.errors import RouteError
from fxqfix.measure import State, tensors_of
from fxqfix.passes import FloatWeights, PinRanges
from fxqfix.routes._base import Deployed, Route
from fxqfix.routes.export import Dynamic, exported

__all__ = ["ROUTES"]

# Of oneDNN's kernels, as torch calls them.
_LAPSES = ("weight-zero-point", "int16-saturation-by-channel")
_PASSES = (PinRanges(), FloatWeights())
_FLOAT = (
    "no op was lowered to an int8 kernel: Inductor's patterns want weights with per-channel scales"
)


def _compiled(graph_module: fx.GraphModule, batch: tuple[Any, ...], dynamic: Dynamic) -> Deployed:
    module = exported(graph_module, batch, dynamic).module()
    forward = _inductor.Freezing(module, bool(dynamic))
    try:
        with State(module).held():
            kernels = forward.compiled_for(*batch)
    except Exception as error:  # it arrives wrapped
        torch.compiler.reset()  # else it may say another thing the next time
        if not _inductor.without_compiler(error):
            raise
        raise RouteError(
            "Inductor found no C++ compiler",
            where="certify, route inductor",
            found=innermost(error),
            expected="g++ or clang++ on the PATH, or the variable CXX",
            remedy="install one, or certify route 'inductor:lowered', which compiles nothing",
        ) from error
    return _deployed(forward, kernels, module)


def _lowered(graph_module: fx.GraphModule, batch: tuple[Any, ...], dynamic: Dynamic) -> Deployed:
    if dynamic:
        raise RouteError(
            "torchao's lowering takes inputs of one size",
            where="certify, route inductor:lowered",
            found="dynamic_batch=True, or dynamic_shapes",
            remedy="leave it out: a batch of another size is lowered anew",
        )
    forward, kernels = _inductor.lowered_to_x86(
        graph_module, batch, "certify, route inductor:lowered"
    )
    return _deployed(forward, kernels, forward)


def _deployed(forward: Callable[..., Any], kernels: Mapping[str, int], state: Any) -> Deployed:
    def run(*inputs: Any) -> Sequence[Tensor]:
        return list(tensors_of([forward(*inputs)]))

    return Deployed(run, tuple(kernels.items()), () if kernels else (_FLOAT,), state)


ROUTES = (
    Route(
        name="inductor",
        summary="torch.export, then torch.compile with freezing, on CPUs",
        deploy=_compiled,
        lapses=_LAPSES,
        passes=_PASSES,
    ),
    Route(
        name="inductor:lowered",
        summary="torchao's lower_pt2e_quantized_to_x86: the same kernels, without compiling",
        deploy=_lowered,
        lapses=_LAPSES,
        passes=_PASSES,
        extra="pt2e",
        packages=("torchao",),
    ),
)
